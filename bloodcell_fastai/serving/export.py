"""Take a trained run elsewhere: to ONNX, to timm alone, to fastai, and to the Hugging Face Hub."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.models import save_for_hf
from torch import nn

from ..analysis.interpretation import load_learner
from ..config import Config
from ..data.blocks import image_dls, normalization
from ..data.dataset import open_image
from ..data.framing import framed
from ..data.pixels import decode
from ..errors import BloodcellError, usage_error
from ..files import atomic_path, write_text
from ..reporter import Reporter
from ..training.callbacks import precision_callback
from ..training.learner import TimmModel, create_sized, load_weights, timm_model
from ..training.packing import half_precision, pack
from ..training.runs import Run
from .card import model_card

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FORMATS = ("onnx", "timm", "fastai", "ready")
"""What a model can be written as."""

OPSET = 18  # the first whose Resize knows antialiasing
MAX_DIFFERENCE = 1e-4  # of a probability, from PyTorch, for the same pixels in float32
MAX_RESIZE_DIFFERENCE = 0.02  # of a probability, once ONNX has resized the picture itself
MAX_HALF_DIFFERENCE = 0.01  # of a probability, by weights in half precision
CHECKED_IMAGES = 32
HALF_CHECKED_IMAGES = 256
BATCH = 16
TIMED_SECONDS = 2.0
PREPROCESSING = (
    "images: uint8 RGB (n, height, width, 3), any height and width, not normalised; {part}. "
    "The graph resizes them to {size} x {size} (bilinear with antialiasing, aspect ratio not "
    "kept), scales to 0..1 and normalises. probabilities: float32 (n, {classes}), rows sum to 1."
)

PARTS = {
    "cell": "the square around the white cell that bloodcell_fastai.data.framing.framed makes",
    "frame": "the whole picture",
}


def export_run(
    run: Run,
    format: str = "timm",
    out: str | Path | None = None,
    push_to_hub: str | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write a run's best model in another format, with a model card as ``README.md``.

    ``onnx`` writes ``model.onnx``, checked against PyTorch and timed; ``timm`` writes
    ``model.safetensors`` and ``config.json`` for ``timm.create_model("local-dir:…")``;
    ``fastai`` writes ``export.pkl``, for ``fastai.vision.all.load_learner``; ``ready`` writes a
    run for others to use with this package, with half the bytes and without the paths of this
    machine. All of them give calibrated probabilities if the run is calibrated.

    Args:
        run: a run with a model; all formats but ``timm`` need its validation images too.
        format: one of :data:`FORMATS`.
        out: folder of the files; ``export/<format>`` in the run's ``output`` by default.
        push_to_hub: ``USER/NAME`` of a repository on the Hugging Face Hub, made if it is not
            there; ``timm`` only.
        reporter: told what happens.

    Returns:
        The folder.

    Raises:
        BloodcellError: unknown format, no model yet, a package is missing, the ONNX file or the
            weights in half precision do not answer as the model does (they are not kept), the
            run would be written over, or the Hub refuses.

    Examples:
        >>> from bloodcell_fastai import Run, export_run
        >>> folder = export_run(Run.open("mine"), "timm")
        Written to runs/mine/export/timm: config.json, model.safetensors, README.md
        >>> import timm
        >>> timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes
        4
    """
    reporter = reporter or Reporter()
    if format not in FORMATS:
        raise usage_error(f"format is {format!r}.", f"Use one of: {', '.join(FORMATS)}.")
    if push_to_hub:
        _check_push(push_to_hub, format)
    run.require_model()
    folder = Path(out) if out else run.output / "export" / format
    if folder.resolve() == run.path.resolve():
        raise usage_error(
            f"{folder} is the run itself, which would be written over.", "Give another --out."
        )
    files = _WRITERS[format](run, folder, reporter)
    # A packed run names no folder of this machine, and may be one that comes with the package.
    described = Run(folder) if format == "ready" else run
    write_text(folder / "README.md", model_card(described, format, push_to_hub))
    files = [*files, "README.md"]
    reporter.say(f"Written to {folder}: {', '.join(files)}")
    if push_to_hub:
        reporter.say(f"Uploaded: {_push(folder, files, push_to_hub)}")
    return folder


def export_timm(run: Run, folder: Path, reporter: Reporter) -> list[str]:
    """Write ``model.safetensors`` and ``config.json`` as timm reads them; their names.

    The classifier is divided by the run's temperature, so that a plain softmax is calibrated.
    """
    config = run.config
    model, size_arguments = _load(run)
    divide_by_temperature(model, _temperature(run), config.arch)
    model.pretrained_cfg = data_config(model, config)
    files = ["config.json", "model.safetensors"]
    with TemporaryDirectory() as temporary:
        save_for_hf(
            model,
            temporary,
            model_config={"label_names": list(config.classes)},
            model_args=size_arguments,
            safe_serialization=True,
        )
        for name in files:
            with atomic_path(folder / name) as target:
                shutil.copyfile(Path(temporary, name), target)
    return files


def export_fastai(run: Run, folder: Path, reporter: Reporter) -> list[str]:
    """Write the learner's pickle, ``export.pkl``; its name."""
    reporter.warn(
        "PICKLE: whoever loads export.pkl runs whatever it contains. Load none that you did not "
        "make; to pass a model on, use --format timm or onnx."
    )
    learn = load_learner(run)
    for callback in precision_callback(learn.dls.device):  # chosen for this machine
        learn.remove_cb(type(callback))
    divide_by_temperature(timm_model(learn), _temperature(run), run.config.arch)
    with atomic_path(folder / "export.pkl") as temporary:
        learn.export(temporary.absolute())
    return ["export.pkl"]


def export_onnx(run: Run, folder: Path, reporter: Reporter) -> list[str]:
    """Write ``model.onnx`` if it answers as PyTorch does, and tell how fast it is; its name.

    Raises:
        BloodcellError: it answers otherwise, or the validation images are gone.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    paths = validation_images(run, CHECKED_IMAGES)
    with atomic_path(folder / "model.onnx") as temporary:
        _write_graph(run, temporary)
        for line in _check_graph(run, temporary, paths):
            reporter.say(line)
    return ["model.onnx"]


def export_ready(run: Run, folder: Path, reporter: Reporter) -> list[str]:
    """Write a packed run, if its weights in half precision answer as the run's; its files' names.

    Raises:
        BloodcellError: they answer otherwise, or the validation images are gone.
    """
    paths = validation_images(run, HALF_CHECKED_IMAGES)
    model, _ = _load(run)
    state = half_precision(model.state_dict())
    difference = _half_difference(run, state, paths)
    if not difference <= MAX_HALF_DIFFERENCE:  # NaN too
        raise BloodcellError(
            f"In half precision the model answers otherwise: on {len(paths)} images a probability "
            f"differs by {difference:.1e}, more than {MAX_HALF_DIFFERENCE}. Nothing was written.",
            "Use --format timm, which keeps every digit.",
        )
    files = pack(run, folder, state)
    size = sum((folder / name).stat().st_size for name in files)
    reporter.say(
        f"Checked on {len(paths)} validation images: weights in half precision change a "
        f"probability by at most {difference:.1e}. {size / 1e6:.1f} MB in all."
    )
    return files


def _half_difference(run: Run, state: dict[str, torch.Tensor], paths: list[str]) -> float:
    """By how much a probability of a run changes at most on images with other weights."""
    config = run.config
    pictures = np.stack([decode(path, config.size, config.crop) for path in paths])

    def answers(predict: Callable[[torch.Tensor], np.ndarray]) -> np.ndarray:
        return _in_batches(lambda batch: predict(_normalised(batch, config.arch)), pictures)

    return _difference(answers(_predictor(run)), answers(_predictor(run, state)))


_WRITERS = {
    "onnx": export_onnx,
    "timm": export_timm,
    "fastai": export_fastai,
    "ready": export_ready,
}


class PixelsToProbabilities(nn.Module):
    """A classifier with all that comes before and after it, for callers without this package.

    Args:
        model: images (n, 3, size, size) to logits.
        size: side of the model's input in pixels.
        mean: of each channel, subtracted after scaling to 0..1.
        std: of each channel, divided by.
        temperature: divides the logits (Guo et al. 2017).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float = 1.0,
    ):
        super().__init__()
        self.model, self.size, self.temperature = model, size, temperature
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (n, h, w, 3) to probabilities (n, classes).

        The pictures stay uint8 while they are resized: ONNX Runtime's antialiased Resize is
        then Pillow's algorithm, in integers, and differs from it by one level in the odd pixel.
        """
        pixels = nn.functional.interpolate(
            images.permute(0, 3, 1, 2), (self.size, self.size), mode="bilinear", antialias=True
        )
        inputs = (pixels.float() / 255 - self.mean) / self.std
        return (self.model(inputs) / self.temperature).softmax(dim=1)


def data_config(model: TimmModel, config: Config) -> dict:
    """timm's ``pretrained_cfg`` for a run's model: how to prepare pictures, what to adapt.

    What describes the first weights and not these (address, tag, licence, test size) is left out.
    """
    kept = {k: v for k, v in model.pretrained_cfg.items() if k not in _OF_THE_FIRST_WEIGHTS}
    mean, std = _statistics(config.arch)
    return kept | {
        "input_size": (3, config.size, config.size),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": mean,
        "std": std,
        "num_classes": len(config.classes),
        "pool_size": None,
        "custom_load": False,
    }


_OF_THE_FIRST_WEIGHTS = {
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "tag"),
    *("license", "origin_url", "description", "notes"),
    *("test_input_size", "test_crop_pct", "test_pool_size"),
    *("label_offset", "label_names", "label_descriptions"),
}


def divide_by_temperature(model: TimmModel, temperature: float, arch: str) -> None:
    """Make ``model`` give its logits divided by ``temperature``, through its last layer.

    Raises:
        BloodcellError: the last layer is not a linear one.
    """
    if temperature == 1:
        return
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        raise BloodcellError(
            f"The classifier of {arch} cannot take up the calibration temperature.",
            "Use --format onnx, which divides the logits in its graph.",
        )
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.div_(temperature)


def validation_images(run: Run, count: int) -> list[str]:
    """Paths of ``count`` validation images of a run, evenly spread; fewer if it has fewer.

    Raises:
        BloodcellError: none of them is there any more.
    """
    table = run.table
    there = [path for path in table.path[table.part == "valid"] if Path(path).is_file()]
    if not there:
        raise BloodcellError(
            f"The validation images of {run.name} are gone, and with nothing to check it on no "
            "file is written.",
            f"Put the data back to {run.config.data or 'where it was'}.",
        )
    spread = np.linspace(0, len(there) - 1, min(count, len(there))).round().astype(int)
    return [there[index] for index in spread]


def _write_graph(run: Run, path: Path) -> None:
    config = run.config
    model, _ = _load(run, exportable=True)
    module = PixelsToProbabilities(
        model, config.size, *_statistics(config.arch), _temperature(run)
    ).eval()
    example = torch.zeros(2, config.size + 1, config.size + 2, 3, dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            module,
            (example,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: "n", 1: "height", 2: "width"},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise BloodcellError(
            f"torch cannot turn {config.arch} into ONNX: {reason}", "Use --format timm."
        ) from error
    assert program is not None  # as dynamo makes it
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which name folders of this machine
    program.model.metadata_props.update(_graph_metadata(run))
    program.save(path)


def _graph_metadata(run: Run) -> dict[str, str]:
    config = run.config
    mean, std = _statistics(config.arch)
    return {
        "classes": json.dumps(config.classes),
        "preprocessing": PREPROCESSING.format(
            size=config.size, classes=len(config.classes), part=PARTS[config.crop]
        ),
        "size": str(config.size),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "temperature": str(_temperature(run)),
        "architecture": config.arch,
        "run": run.name,
        "warnings": json.dumps(config.warnings),
        "made_by": f"bloodcell-fastai {version('bloodcell-fastai')}",
    }


def _check_graph(run: Run, path: Path, paths: list[str]) -> list[str]:
    """Compare an ONNX file with the run's model on images; lines that tell how it did.

    Two differences count: that of the network, from pixels of the run's size, which Resize
    leaves as they are, and that of the whole way, from the files' own pixels, against the
    pictures that the library resizes with Pillow.
    """
    from onnxruntime import InferenceSession

    config = run.config
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    predict = _predictor(run)
    images = [open_image(name) for name in paths]
    parts = [framed(image, config.crop) for image in images]
    resized = np.stack([decode(name, config.size, config.crop) for name in paths])
    network = _difference(
        _in_batches(lambda batch: _run(session, batch), resized),
        _in_batches(lambda batch: predict(_normalised(batch, config.arch)), resized),
    )
    dls = image_dls(paths, config.arch, config.size, BATCH, config.crop, device="cpu")
    whole = _difference(
        np.concatenate([_run(session, np.asarray(part)[None]) for part in parts]),
        np.concatenate([predict(batch) for (batch,) in dls.valid]),
    )
    _refuse(network, MAX_DIFFERENCE, "for the same pixels", paths)
    _refuse(whole, MAX_RESIZE_DIFFERENCE, "once it has resized the pictures", paths)
    batch = resized[:BATCH]
    onnx_rate = images_per_second(lambda: _run(session, batch), len(batch))
    torch_rate = images_per_second(lambda: predict(_normalised(batch, config.arch)), len(batch))
    return [
        f"Checked on {len(paths)} validation images: probabilities differ from PyTorch by at "
        f"most {network:.1e}; by {whole:.1e} with the resizing, from Pillow's.",
        f"Speed on the CPU, float32, batches of {len(batch)}: ONNX Runtime {onnx_rate:,.1f} "
        f"images/s, PyTorch {torch_rate:,.1f} images/s.",
    ]


def images_per_second(predict: Callable[[], object], images: int) -> float:
    """How many images a second ``predict``, which does ``images`` at a time, does once warm."""
    predict()
    begin, calls = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < TIMED_SECONDS or not calls:
        predict()
        calls += 1
    return calls * images / seconds


def _predictor(run: Run, state: dict | None = None) -> Callable[[torch.Tensor], np.ndarray]:
    """The run's own model, at will with other weights, on normalised batches, in float32 on the
    CPU."""
    model, _ = _load(run)
    if state:
        model.load_state_dict(state)
    temperature = _temperature(run)

    @torch.inference_mode()
    def predict(batch: torch.Tensor) -> np.ndarray:
        return (model(torch.as_tensor(batch)) / temperature).softmax(dim=1).numpy()

    return predict


def _run(session: "InferenceSession", images: np.ndarray) -> np.ndarray:
    return session.run(["probabilities"], {"images": images})[0]


def _in_batches(predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    starts = range(0, len(images), BATCH)
    return np.concatenate([predict(images[start : start + BATCH]) for start in starts])


def _normalised(images: np.ndarray, arch: str) -> torch.Tensor:
    mean, std = map(torch.tensor, _statistics(arch))
    return ((torch.tensor(images) / 255 - mean) / std).permute(0, 3, 1, 2)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def _refuse(difference: float, limit: float, where: str, paths: list[str]) -> None:
    if not difference <= limit:  # NaN too
        raise BloodcellError(
            f"The ONNX file does not answer as PyTorch does {where}: on {len(paths)} images a "
            f"probability differs by {difference:.1e}, more than {limit:.0e}. It was not kept.",
            "Use --format timm, or try other versions of torch, onnxscript and onnxruntime.",
        )


def _load(run: Run, **kwargs) -> tuple[TimmModel, dict[str, int]]:
    """The run's model as timm makes it, on the CPU, and what timm was told of the size."""
    config = run.config
    model, size_arguments = create_sized(config.arch, len(config.classes), config.size, **kwargs)
    load_weights(model, run.path / "model.safetensors", config.classes)
    return model.eval(), size_arguments


def _temperature(run: Run) -> float:
    return calibration.temperature if (calibration := run.calibration) else 1.0


def _statistics(arch: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels, as the batches are normalised with."""
    transform = normalization(arch)
    values = (transform.mean, transform.std)
    mean, std = ([round(v, 6) for v in value.flatten().tolist()] for value in values)
    return mean, std


def _require(*packages: str) -> None:
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            raise BloodcellError(
                f"ONNX export needs the package {package}, which is not installed.",
                'Install it: pip install "bloodcell-fastai[export]"',
            ) from None


def _check_push(repo_id: str, format: str) -> None:
    """Refuse what the Hub would refuse, before any work is done."""
    if format != "timm":
        raise usage_error(f"--push-to-hub does not take {format}.", "Use --format timm.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if repo_id.count("/") != 1:
        raise usage_error("--push-to-hub names no repository.", "Give it as USER/NAME.")
    if not get_token():
        raise BloodcellError(
            "There is no Hugging Face token here.", "Log in: hf auth login, or set HF_TOKEN."
        )


def _push(folder: Path, files: list[str], repo_id: str) -> str:
    """Upload ``files`` and nothing else of ``folder``; the address of the repository."""
    api = HfApi()
    try:
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Upload a model of bloodcell-fastai",
        )
    except Exception as error:  # the hub's client has changed its HTTP library, and its errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BloodcellError(
            f"The Hugging Face Hub did not take {repo_id}: {reason}",
            f"Check the network and the token (hf auth whoami), and try again; {folder} is whole.",
        ) from error
    return str(url)
