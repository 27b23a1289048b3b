"""The ``bloodcell`` commands: the door to the library, with no logic of its own.

torch and fastai take seconds to import, so every command imports what it needs when it runs.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer import Abort
from typer.exceptions import TyperException

from .config import Config
from .errors import BloodcellError, disk_error, printable, usage_error
from .reporter import Reporter, SilentReporter

if TYPE_CHECKING:
    import pandas as pd

    from .serving.inference import Outcome
    from .training.runs import Run


class PlainConsole(Console):
    """A console that shows text as it is: names of files hold no markup and give no orders."""

    def render_str(self, text: str, **options) -> Text:
        """Text without markup, emoji codes and control characters."""
        options |= {"markup": False, "emoji": False}
        return super().render_str(printable(text), **options)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = PlainConsole(highlight=False, soft_wrap=True)
errors = PlainConsole(stderr=True, highlight=False, soft_wrap=True)
DEFAULTS = Config()
MOST_ROWS = 50  # of a table in the terminal
INTERRUPTED = 130  # exit code after Ctrl-C

Data = Annotated[
    str | None,
    typer.Option("--data", help="Kaggle zip, a folder with one sub-folder per class, or 'demo'."),
]
Model = Annotated[
    str | None,
    typer.Argument(help="Name, folder, or pbc; the newest if none, pbc if there is no run."),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune MaxViT-nano on blood-cell photographs, and know how good it really is."""


@app.command("data")
def describe_data(
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path(
        "data/contact-sheet.png"
    ),
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Remove the decoded images of all sets, stop.")
    ] = False,
) -> None:
    """Fetch, unpack, check and describe the images."""
    if clear_cache:
        from .data.pixels import cache_root
        from .data.pixels import clear_cache as remove

        console.print(f"{remove() / 1e6:,.0f} MB of decoded images removed from {cache_root()}")
        return
    from .analysis.figures import contact_sheet, save_figure
    from .data.dataset import open_dataset

    reporter = TerminalReporter()
    dataset = open_dataset(data, progress=reporter.progress)
    for warning in dataset.warnings:
        reporter.warn(warning)
    console.print(f"{dataset.root}: {len(dataset.table):,} images")
    _print_table(dataset.counts_with_totals.reset_index(), "Images per subset and class")
    sizes = ", ".join(f"{w}x{h} ({n:,} images)" for (w, h), n in dataset.sizes.items())
    console.print(f"Sizes: {sizes}")
    console.print(f"Original photographs beside them: {len(dataset.originals):,}")
    console.print(f"Unreadable files: {len(dataset.unreadable):,}")
    for path in dataset.unreadable:
        console.print("  " + str(path).replace("\n", "\\n"))
    save_figure(contact_sheet(dataset.table), out)
    console.print(f"Contact sheet: {out}")


@app.command()
def audit(
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Folder for photos.csv, audit.json, pictures.")] = Path(
        "audit"
    ),
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Find the photographs anew from the pixels.")
    ] = False,
    run: Annotated[str | None, typer.Option(help="Look at the split of this run too.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Find the photograph behind each image, and how far each split leaks."""
    from .analysis.audit import audit, describe_audit, write_audit
    from .data.dataset import open_dataset
    from .training.runs import Run

    reporter = TerminalReporter()
    chosen = Run.open(run, runs) if run else None
    dataset = open_dataset(data, progress=reporter.progress)
    for warning in dataset.warnings:
        reporter.warn(warning)
    result = audit(dataset, rebuild, chosen, reporter.progress)
    console.print(describe_audit(result))
    written = write_audit(result, out, dataset.root)
    console.print(f"Written: {', '.join(map(str, written))}")


@app.command()
def fit(
    data: Data = None,
    epochs: Annotated[int, typer.Option(help="Epochs in all, the frozen ones included.")] = 20,
    split: Annotated[str, typer.Option(help="photo, official or random.")] = DEFAULTS.split,
    arch: Annotated[str, typer.Option(help="Any architecture of timm.")] = DEFAULTS.arch,
    weights: Annotated[str, typer.Option(help="auto, pbc, imagenet, none or a file.")] = "auto",
    size: Annotated[int, typer.Option(help="Side of the input, in pixels.")] = DEFAULTS.size,
    crop: Annotated[
        str, typer.Option(help="cell: a square around the white cell; frame: all of it.")
    ] = DEFAULTS.crop,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = DEFAULTS.batch_size,
    lr: Annotated[str, typer.Option(help="Maximum learning rate, or auto: lr_find.")] = "1e-3",
    wd: Annotated[float, typer.Option(help="Weight decay.")] = DEFAULTS.wd,
    freeze_epochs: Annotated[
        int, typer.Option(help="Epochs that train the head alone; -1: 1 if pretrained.")
    ] = DEFAULTS.freeze_epochs,
    label_smoothing: Annotated[
        float, typer.Option(help="Of the loss, 0 to 1.")
    ] = DEFAULTS.label_smoothing,
    freeze_norm: Annotated[
        bool, typer.Option("--freeze-norm", help="Keep batch normalisation's statistics.")
    ] = DEFAULTS.freeze_norm,
    mixup: Annotated[float, typer.Option(help="Alpha of mixup; 0: none.")] = DEFAULTS.mixup,
    patience: Annotated[
        int, typer.Option(help="Stop after so many epochs without progress; 0: never.")
    ] = DEFAULTS.patience,
    flip: Annotated[bool, typer.Option(help="Flip both ways.")] = DEFAULTS.flip,
    rotate: Annotated[float, typer.Option(help="Rotate by up to so many degrees.")] = 180.0,
    zoom: Annotated[float, typer.Option(help="Zoom by up to this, in and out.")] = DEFAULTS.zoom,
    warp: Annotated[float, typer.Option(help="Strength of the perspective.")] = DEFAULTS.warp,
    lighting: Annotated[
        float, typer.Option(help="Strength of brightness and contrast.")
    ] = DEFAULTS.lighting,
    stain: Annotated[
        float, typer.Option(help="Change of the dyes and of the tint, 0 to 1.")
    ] = DEFAULTS.stain,
    sharpness: Annotated[
        float, typer.Option(help="Blurred and sharpened by up to this share, 0 to 1.")
    ] = DEFAULTS.sharpness,
    noise: Annotated[
        float, typer.Option(help="Largest standard deviation, of colours from 0 to 1.")
    ] = DEFAULTS.noise,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = DEFAULTS.seed,
    workers: Annotated[int, typer.Option(help="Decoding threads; -1: by the machine.")] = -1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    compile: Annotated[str, typer.Option(help="torch.compile on CUDA: auto, yes, no.")] = "auto",
    folds: Annotated[
        int, typer.Option(help="Train once per fold of the photographs; 0: a single split.")
    ] = DEFAULTS.folds,
    name: Annotated[str | None, typer.Option(help="Name of the run; the time if left out.")] = None,
    runs: Runs = Path("runs"),
    resume_run: Annotated[
        bool, typer.Option("--resume", help="Go on with --name, or the newest unfinished run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the plan, print it with the time, stop.")
    ] = False,
) -> None:
    """Train a model and keep its best epoch."""
    if resume_run:
        with _processes() as reporter:
            _resume(name, runs, reporter)
        return
    config = Config(
        data=data or "",
        split=split,
        arch=arch,
        weights=weights,
        size=size,
        crop=crop,
        epochs=epochs,
        freeze_epochs=freeze_epochs,
        batch_size=batch_size,
        lr=_learning_rate(lr),
        wd=wd,
        label_smoothing=label_smoothing,
        freeze_norm=freeze_norm,
        mixup=mixup,
        patience=patience,
        seed=seed,
        flip=flip,
        rotate=rotate,
        zoom=zoom,
        warp=warp,
        lighting=lighting,
        stain=stain,
        sharpness=sharpness,
        noise=noise,
        workers=workers,
        device=device,
        compile=compile,
        folds=folds,
    )
    with _processes() as reporter:
        if not folds:
            from .training.workflow import train

            train(config, runs, name, dry_run, reporter)
            return
        from .analysis.crossval import cross_validate

        run = cross_validate(config, runs, name, dry_run, reporter)
        if not dry_run:
            _print_results(run, reporter)


def _resume(name: str | None, runs: Path, reporter: Reporter) -> None:
    from .training.runs import Run, newest_unfinished
    from .training.workflow import resume

    run = Run.open(name, runs) if name else newest_unfinished(runs)
    if not run.config.folds:
        resume(runs, str(run.path), reporter)
        return
    from .analysis.crossval import resume_folds

    _print_results(resume_folds(run, reporter), reporter)


@contextlib.contextmanager
def _processes() -> Iterator[Reporter]:
    """A block in which the processes that ``accelerate launch`` started, if it did, are one job;
    the first of them reports."""
    from .processes import joined

    with joined() as share:
        yield TerminalReporter() if share.rank == 0 else SilentReporter()


@app.command()
def interpret(
    run: Annotated[str | None, typer.Argument(help="Name or folder; the newest if none.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Another data set to score it on: a zip or a folder.")
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="The only folder of --data to look at, such as TEST.")
    ] = None,
    stress: Annotated[
        bool,
        typer.Option("--stress", help="Also under other stain, light, focus, noise, scale …"),
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Score a run on its validation images, or on other data: report, matrix, top losses."""
    from .analysis.interpretation import interpret_external, interpret_run, summarise
    from .analysis.stress import describe_stress, read_stress
    from .training.runs import Run

    if subset and not data:
        raise usage_error("--subset is a part of --data, which is missing.", "Give --data.")
    chosen = Run.open(run, runs)
    if data and stress:
        raise usage_error("--stress is for a run's own images.", "Leave out --data or --stress.")
    if data:
        from .data.dataset import open_dataset

        dataset = open_dataset(data, progress=TerminalReporter().progress)
        result, external, folder = interpret_external(chosen, dataset, subset)
        console.print(summarise(result, chosen.config, external))
        files = "predictions.csv, unknown.csv, metrics.json, report/index.html"
        console.print(f"Written to {folder}: {files}")
        return
    console.print(
        summarise(interpret_run(chosen, stress, TerminalReporter().progress), chosen.config)
    )
    if (measured := read_stress(chosen)) is not None:
        console.print(describe_stress(measured))
    console.print(f"Written to {chosen.path}: predictions.csv, metrics.json, report/index.html")


@app.command()
def predict(
    paths: Annotated[
        list[str],
        typer.Argument(help="Images, folders, patterns, a .txt of paths, or - for such lines."),
    ],
    run: Annotated[
        str | None,
        typer.Option(help="Name, folder, or pbc; the newest if none, pbc if there is no run."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A .csv or .jsonl file to write.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an --out that was cut off.")
    ] = False,
    tta: Annotated[
        bool, typer.Option("--tta", help="Average over 8 views of each image; 8 times as long.")
    ] = False,
    min_confidence: Annotated[
        float, typer.Option(help="Flag images below it for a person to look at, 0 to 1.")
    ] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Tell the class of images, with probabilities, and flag those to look at."""
    from .serving.inference import Predictor, find_images, predict
    from .training.runs import open_model

    with _processes() as reporter:
        predictor = Predictor.load(open_model(run, runs, reporter), tta, min_confidence, device)
        images = find_images(paths, sys.stdin)
        outcome = predict(predictor, images, out, resume, reporter.progress)
    if isinstance(reporter, TerminalReporter):
        _print_outcome(outcome, out)


def _print_outcome(outcome: "Outcome", out: Path | None) -> None:
    if outcome.table is not None:
        shown = outcome.table[["path", "predicted", "confidence", "flag"]]
        _print_table(shown.head(MOST_ROWS), "Predictions")
        if len(shown) > MOST_ROWS:
            console.print(f"{len(shown) - MOST_ROWS:,} more rows.")
        console.print("All rows and the probability of every class: --out FILE.csv")
    console.print(_count_predictions(outcome, out))
    if outcome.unreadable:
        errors.print(f"Unreadable, left out ({len(outcome.unreadable):,}):")
        for path in outcome.unreadable:
            errors.print("  " + path.replace("\n", "\\n"))
        raise typer.Exit(1)


@app.command()
def export(
    run: Model = None,
    format: Annotated[str, typer.Option(help="onnx, timm, fastai or ready.")] = "timm",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; RUN/export/FORMAT if left out.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload it to the Hugging Face Hub (timm only)."),
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write the model of a run for use elsewhere, with a model card."""
    from .serving.export import export_run
    from .training.runs import open_model

    reporter = TerminalReporter()
    export_run(open_model(run, runs, reporter), format, out, push_to_hub, reporter)


@app.command()
def serve(
    run: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 7860,
    min_confidence: Annotated[
        float, typer.Option(help="Flag images below it for a person to look at, 0 to 1.")
    ] = 0.5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Open a web page and an HTTP endpoint that tell the class of images."""
    from .serving.app import serve
    from .training.runs import open_model

    reporter = TerminalReporter()
    serve(open_model(run, runs, reporter), host, port, min_confidence, device, reporter)


def _print_results(run: "Run", reporter: Reporter) -> None:
    from .analysis.interpretation import read_results, summarise

    reporter.say(summarise(read_results(run), run.config))


def _count_predictions(outcome: "Outcome", out: Path | None) -> str:
    found = ", ".join(f"{name} {n:,}" for name, n in sorted(outcome.classes.items()))
    flags = ", ".join(f"{n:,} {name}" for name, n in sorted(outcome.flags.items()))
    return (
        f"{outcome.n_images:,} images predicted"
        + (f" to {out}" if out else "")
        + (f": {found}" if found else "")
        + (f"; flagged: {flags}" if flags else "")
        + (f"; {outcome.already_done:,} were there already" if outcome.already_done else "")
    )


class TerminalReporter(Reporter):
    """Lines, framed warnings and a progress bar, as far as the output is a terminal."""

    def __init__(self):
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        console.print(text)

    def warn(self, text: str) -> None:
        """Print a frame that cannot be missed."""
        frame = Panel(text, title="WARNING", border_style="bold yellow", style="bold")
        errors.print(frame, soft_wrap=False)  # or the frame would cut the text off

    def progress(self, what: str, done: int, total: int) -> None:
        """Show a bar for ``what`` until it is done; nothing where there is no terminal."""
        if not console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._progress.add_task(what, total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done)
        if done >= total:
            self._progress.stop()
            self._progress = None


def _print_table(table: "pd.DataFrame", title: str) -> None:
    grid = Table(title=title, title_justify="left")
    for name in table.columns:
        numeric = table[name].dtype.kind in "if"
        grid.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.itertuples(index=False):
        grid.add_row(*(_cell(value) for value in row))
    console.print(grid)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _learning_rate(text: str) -> float:
    """The number in ``--lr``; 0, which the config reads as "find it", for ``auto``."""
    if text == "auto":
        return 0.0
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise usage_error(f"lr is {text!r}.", "Give --lr auto or a number above 0, such as 1e-3.")


def main() -> None:
    """Run the command line; whatever goes wrong becomes two lines and an exit code."""
    # fastai and torch warn about their own insides, which a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module="PIL")  # of damaged images, which are listed
    warnings.filterwarnings("ignore", message="Glyph")  # a name in letters the font lacks
    _accept_any_name()
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        code = app(prog_name="bloodcell", standalone_mode=False)
        if code == INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except BloodcellError as error:
        if debug:
            raise
        code = _show_error(error)
    except OSError as error:
        if debug:
            raise
        code = _show_error(disk_error(error))
    except TyperException as error:  # a word the command line does not know
        command = context.command_path if (context := getattr(error, "ctx", None)) else "bloodcell"
        # Without a command Typer has printed the help and has no message of its own.
        message = error.format_message()
        code = _show_error(usage_error(message, f"See {command} --help.")) if message else 2
    except (Abort, KeyboardInterrupt):
        code = _show_error(
            BloodcellError("Stopped.", "A fit goes on with: bloodcell fit --resume", INTERRUPTED)
        )
    except Exception as error:
        if debug:
            raise
        code = _show_error(_unexpected(error))
    raise SystemExit(code)


def _accept_any_name() -> None:
    """Names of files may be in any encoding, and the terminal's may lack their letters."""
    for stream, errors_mode in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # it is closed
                stream.reconfigure(errors=errors_mode)


def _unexpected(error: Exception) -> BloodcellError:
    reason = next(iter(str(error).strip().splitlines()), "")
    return BloodcellError(
        f"Unexpected: {type(error).__name__}" + (f": {reason}" if reason else "."),
        "Run it again as bloodcell --debug ... and report what it shows.",
    )


def _show_error(error: BloodcellError) -> int:
    if "RANK" in os.environ:  # of several processes
        from .processes import speaks

        if not speaks(error):
            return error.exit_code
    message, hint = (text.replace("\n", "\\n") for text in (error.message, error.hint))
    errors.print(Text(printable(f"Error: {message}"), style="bold red"))
    if hint:
        errors.print(Text(printable(f"Hint:  {hint}")))
    return error.exit_code


if __name__ == "__main__":
    main()
