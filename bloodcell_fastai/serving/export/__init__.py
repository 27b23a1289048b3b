"""Write a run's model for use elsewhere: one module per format, and the push to the Hub."""

from collections.abc import Callable
from pathlib import Path

from ...errors import UsageError
from ...files import write_text
from ...model.runs import Run
from ...reporter import Reporter
from ..card import model_card
from . import bundle, fastai, hub, onnx, timm

Writer = Callable[[Run, Path, Reporter], list[str]]
"""Writes a run's model into a folder and returns the names of the files."""

WRITERS: dict[str, Writer] = {
    "onnx": onnx.write,
    "timm": timm.write,
    "fastai": fastai.write,
    "bundle": bundle.write,
}
FORMATS = tuple(WRITERS)
"""What a model can be written as."""


def export_run(
    run: Run,
    format: str = "timm",
    out: str | Path | None = None,
    push_to_hub: str | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write a run's best model in another format, with a model card as ``README.md``.

    ``onnx`` writes ``model.onnx``, compared with PyTorch and timed; ``timm`` writes
    ``model.safetensors`` and ``config.json`` for ``timm.create_model("local-dir:…")``;
    ``fastai`` writes ``export.pkl``, for ``fastai.vision.all.load_learner``; ``bundle`` writes a
    run for other users of this package, of half the size and without the folders of this
    machine. All of them give calibrated probabilities if the run is calibrated.

    Args:
        run: a run with a model; all formats but ``timm`` need its validation images too.
        format: one of :data:`FORMATS`.
        out: folder of the files; ``export/<format>`` in the run's ``output`` by default.
        push_to_hub: ``USER/NAME`` of a repository on the Hugging Face Hub, created if it does not
            exist; ``timm`` only.
        reporter: told what happens.

    Returns:
        The folder.

    Raises:
        BloodcellError: unknown format, no model yet, a package is missing, the probabilities of
            the exported model differ from the run's (its file is not kept), the run would be
            overwritten, or the Hub refuses.

    Examples:
        >>> from bloodcell_fastai import Run, export_run
        >>> folder = export_run(Run.open("mine"), "timm")
        Written to runs/mine/export/timm: config.json, model.safetensors, README.md
        >>> import timm
        >>> timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes
        4
    """
    reporter = reporter or Reporter()
    if format not in WRITERS:
        raise UsageError(f"format is {format!r}.", f"Use one of: {', '.join(FORMATS)}.")
    if push_to_hub:
        hub.check(push_to_hub, format)
    run.require_model()
    folder = Path(out) if out else run.output / "export" / format
    if folder.resolve() == run.path.resolve():
        raise UsageError(
            f"{folder} is the run itself, which would be overwritten.", "Give another `out`."
        )
    files = WRITERS[format](run, folder, reporter)
    # A bundle names no folder of this machine, and may be one that ships with the package.
    described = Run(folder) if format == "bundle" else run
    write_text(folder / "README.md", model_card(described, format, push_to_hub))
    files = [*files, "README.md"]
    reporter.say(f"Written to {folder}: {', '.join(files)}")
    if push_to_hub:
        reporter.say(f"Uploaded: {hub.push(folder, files, push_to_hub)}")
    return folder
