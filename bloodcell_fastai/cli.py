"""The ``bloodcell`` commands: they parse their arguments, call the library and print.

torch and fastai take seconds to import, so every command imports what it needs when it runs.
"""

import contextlib
import functools
import inspect
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from rich.text import Text
from typer import Abort
from typer.exceptions import TyperException
from typer.main import get_command

from .config import LABEL_SOURCE, Config, flags
from .errors import BloodcellError, UsageError, disk_error, printable
from .files import user_home
from .reporter import Reporter, SilentReporter

if TYPE_CHECKING:
    import pandas as pd

    from .serving.predict import Outcome


class PlainConsole(Console):
    """A console that shows text as it is: markup and control characters in it do nothing."""

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
MOST_ROWS, MOST_SIZES = 50, 6  # of a table, and of the sizes of images, in the terminal
INTERRUPTED = 130  # exit code after Ctrl-C

MovedData = Annotated[
    str | None, typer.Option("--data", help="Folder of the run's images, if they have moved.")
]
Device = Annotated[str, typer.Option(help=Config.model_fields["device"].description)]
MinConfidence = Annotated[
    float, typer.Option(help="Flag images of a lower confidence as uncertain, 0 to 1.")
]
Model = Annotated[
    str | None, typer.Argument(help="Name or folder of a run; default: the newest, or pbc.")
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]
_run_option = functools.partial(typer.Option, rich_help_panel="Run")


def _takes_config(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command gets an option for each of these fields of :class:`Config`, and a
    config made of those that were given in the place of its first argument. The config checks the
    values, not Typer."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *others = inspect.signature(command).parameters.values()
        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        parameters = [context, *map(_config_option, names), *others]

        @functools.wraps(command)
        def called(context: typer.Context, **values: Any) -> None:
            options = {name: values.pop(name) for name in names}
            sources = {name: context.get_parameter_source(name) for name in options}
            given = [name for name, found in sources.items() if found and found.name != "DEFAULT"]
            command(Config(**{name: options[name] for name in given}), **values)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def _config_option(name: str) -> inspect.Parameter:
    field = Config.model_fields[name]
    option = typer.Option(
        *flags(name),
        help=field.description,
        rich_help_panel=field.title,
        metavar={int: "<int>", float: "<float>"}.get(field.annotation),  # type: ignore[arg-type]
        show_default=field.default != "",
    )
    kind, annotation = inspect.Parameter.POSITIONAL_OR_KEYWORD, Annotated[str, option]
    return inspect.Parameter(name, kind, default=str(field.default), annotation=annotation)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune MaxViT-nano on blood-cell photographs, and know how good it really is."""


@app.command("data")
@_takes_config("data", *LABEL_SOURCE)
def describe_data(
    config: Config,
    out: Annotated[Path, typer.Option(help="File for the contact sheet.")] = Path(
        "data/contact-sheet.png"
    ),
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Only remove the decoded images of all data.")
    ] = False,
) -> None:
    """Find, unpack, check and describe the images."""
    reporter = TerminalReporter()
    if clear_cache:
        from .data.cache import cache_root
        from .data.cache import clear_cache as remove

        reporter.say(f"{remove() / 1e6:,.0f} MB of decoded images removed from {cache_root()}")
        return
    from .data.datasets import open_dataset
    from .evaluation.figures import contact_sheet, save_figure

    dataset = open_dataset(config.data or None, progress=reporter.progress, **config.label_source)
    for warning in dataset.warnings:
        reporter.warn(warning)
    reporter.say(f"{dataset.root}: {len(dataset.table):,} images")
    for line in dataset.describe():
        reporter.say(line)
    counts = dataset.counts_with_totals.reset_index(allow_duplicates=True)  # of a class "subset"
    _print_table(counts, "Images per subset and class")
    sizes = sorted(dataset.sizes.items(), key=lambda item: -item[1])
    some = ", ".join(f"{w}x{h} ({n:,} images)" for (w, h), n in sizes[:MOST_SIZES])
    more = f" and {len(sizes) - MOST_SIZES:,} more" if len(sizes) > MOST_SIZES else ""
    reporter.say(f"Sizes: {some}{more}")
    reporter.say(f"Images whose photograph is known: {dataset.n_known:,}")
    reporter.say(f"Unreadable files: {len(dataset.unreadable):,}")
    for path, reason in dataset.unreadable.items():
        reporter.say("  " + _one_line(f"{path}: {reason}"))
    save_figure(contact_sheet(dataset.table), out)
    reporter.say(f"Contact sheet: {out}")


@app.command()
@_takes_config("data", *LABEL_SOURCE)
def audit(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder for photos.csv, audit.json, figures.")] = Path(
        "audit"
    ),
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Find the photographs again from the pixels.")
    ] = False,
    run: Annotated[str | None, typer.Option(help="Also check the split of this run.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Find the photograph behind each image, and the leakage of each split."""
    from .data.datasets import open_dataset
    from .evaluation.audit import audit, describe_audit, write_audit
    from .model.runs import Run

    reporter = TerminalReporter()
    chosen = Run.open(run, runs) if run else None
    dataset = open_dataset(config.data or None, progress=reporter.progress, **config.label_source)
    for line in dataset.describe():
        reporter.say(line)
    for warning in dataset.warnings:
        reporter.warn(warning)
    result = audit(dataset, rebuild, chosen, reporter.progress)
    reporter.say(describe_audit(result))
    written = write_audit(result, out, dataset.root)
    reporter.say(f"Written: {', '.join(map(str, written))}")


@app.command()
@_takes_config(*Config.model_fields)
def fit(
    config: Config,
    name: Annotated[str | None, _run_option(help="Name of the run; default: the time.")] = None,
    runs: Annotated[Path, _run_option(help="Folder of the runs.")] = Path("runs"),
    resume: Annotated[
        bool,
        _run_option("--resume", help="Continue --name, or the newest unfinished run."),
    ] = False,
    dry_run: Annotated[
        bool, _run_option("--dry-run", help="Only write and print the plan and the time.")
    ] = False,
) -> None:
    """Train a model and keep its best epoch."""
    with _processes() as reporter:
        if resume and dry_run:
            raise UsageError("`dry_run` plans a new run, `resume` continues one.", "Leave out one.")
        if resume:
            _resume(name, runs, config, reporter)
        elif config.folds:
            from .evaluation.cross_validation import cross_validate

            cross_validate(config, runs, name, dry_run, reporter)
        else:
            from .training.train import train

            train(config, runs, name, dry_run, reporter)


def _resume(name: str | None, runs: Path, config: Config, reporter: Reporter) -> None:
    from .model.runs import Run, newest_unfinished
    from .training.train import resume

    run = Run.open(name, runs) if name else newest_unfinished(runs)
    given = {option: getattr(config, option) for option in config.model_fields_set}
    if not run.config.folds:
        resume(runs, str(run.path), reporter, **given)
        return
    from .evaluation.cross_validation import resume_folds

    resume_folds(Run(run.path, given.get("data") or None), reporter, **given)


@contextlib.contextmanager
def _processes() -> Iterator[Reporter]:
    """A block in which the processes that ``accelerate launch`` started, if it did, are one job;
    the first of them reports."""
    from .distributed import joined, rank

    with joined():
        yield SilentReporter() if rank() else TerminalReporter()


@app.command()
@_takes_config(*LABEL_SOURCE)
def interpret(
    config: Config,
    run: Annotated[
        str | None, typer.Argument(help="Name or folder of a run; default: the newest.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Another data set to evaluate on; or the run's own, if it has moved."),
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Evaluate on this folder of --data only, such as TEST.")
    ] = None,
    stress: Annotated[
        bool,
        typer.Option("--stress", help="Also measure robustness to stain, light, focus, noise, …"),
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Evaluate a run on its validation images or on other data; write metrics and a report."""
    from .data.datasets import open_dataset
    from .evaluation.interpretation import interpret_external, interpret_run, summarise
    from .model.runs import Run

    if subset and not data:
        raise UsageError("`subset` is a part of `data`, which is missing.", "Give `data`.")
    reporter = TerminalReporter()
    chosen = Run.open(run, runs)
    dataset = None
    if data:
        dataset = open_dataset(data, progress=reporter.progress, **config.label_source)
        for line in dataset.describe():
            reporter.say(line)
    moved = chosen.moved_to(dataset.root) if dataset and not subset else None
    if dataset and not moved:
        if stress:
            raise UsageError("`stress` is for a run's own images.", "Leave out `data` or `stress`.")
        result, external, folder = interpret_external(chosen, dataset, subset)
        reporter.say(summarise(result, chosen.config, external))
    else:
        chosen = moved or chosen
        folder = chosen.path
        reporter.say(summarise(interpret_run(chosen, stress, reporter.progress), chosen.config))
    reporter.say(f"Written to {folder}: predictions.csv, metrics.json, report/index.html")


@app.command()
def predict(
    paths: Annotated[
        list[str],
        typer.Argument(help="Images, folders, patterns, a .txt of paths, or - for such lines."),
    ],
    run: Annotated[
        str | None, typer.Option(help="Name or folder of a run; default: the newest, or pbc.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A .csv or .jsonl file to write.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an --out that was interrupted.")
    ] = False,
    tta: Annotated[
        bool, typer.Option("--tta", help="Average over 8 views, uncalibrated; 8 times as long.")
    ] = False,
    min_confidence: MinConfidence = 0.0,
    data: MovedData = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Predict the class of images, with probabilities, and flag those for manual review."""
    from .model.inference import Predictor
    from .model.runs import open_model
    from .serving.predict import find_images, predict

    with _processes() as reporter:
        predictor = Predictor.load(
            open_model(run, runs, reporter, data), tta, min_confidence, device
        )
        images = find_images(paths, getattr(sys.stdin, "buffer", sys.stdin))
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
    console.print(f"{outcome}" + (f"; written to {out}" if out else ""))
    if outcome.unreadable:
        errors.print(f"Unreadable, left out ({len(outcome.unreadable):,}):")
        for path, reason in outcome.unreadable.items():
            errors.print("  " + _one_line(f"{path}: {reason}"))
        raise typer.Exit(1)


@app.command()
def export(
    run: Model = None,
    format: Annotated[str, typer.Option(help="onnx, timm, fastai or bundle.")] = "timm",
    data: MovedData = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default: RUN/export/FORMAT.")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload it to the Hugging Face Hub (timm only)."),
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write the model of a run for use elsewhere, with a model card."""
    from .model.runs import open_model
    from .serving.export import export_run

    reporter = TerminalReporter()
    export_run(open_model(run, runs, reporter, data), format, out, push_to_hub, reporter)


@app.command()
def serve(
    run: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="<int>", help="0 for a free one.")
    ] = 7860,
    root_path: Annotated[
        str, typer.Option(help="Path of the page behind a reverse proxy, such as /bloodcell.")
    ] = "",
    data: MovedData = None,
    min_confidence: MinConfidence = 0.5,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Serve a web page and an HTTP endpoint that predict the class of images."""
    from .model.runs import open_model
    from .serving.app import serve

    reporter = TerminalReporter()
    chosen = open_model(run, runs, reporter, data)
    serve(chosen, host, port, min_confidence, device, reporter, root_path)


class TerminalReporter(Reporter):
    """Lines, framed warnings and a progress bar, as far as the output is a terminal."""

    def __init__(self):
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        console.print(_with_flags(text))

    def warn(self, text: str) -> None:
        """Print a frame that cannot be missed."""
        frame = Panel(_with_flags(text), title="WARNING", border_style="bold yellow", style="bold")
        errors.print(frame, soft_wrap=False)  # or the frame would cut the text off

    def progress(self, what: str, done: int, total: int) -> None:
        """Show a bar for ``what`` until it is done; nothing where there is no terminal."""
        if not console.is_terminal:
            return
        if self._progress is None:
            columns = (*Progress.get_default_columns(), MofNCompleteColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            self._progress.add_task(what, total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done)
        if done >= total:
            self._progress.stop()
            self._progress = None


def _print_table(table: "pd.DataFrame", title: str) -> None:
    grid = Table(title=title, title_justify="left")
    for name, kind in zip(table.columns, table.dtypes, strict=True):
        numeric = kind.kind in "if"
        grid.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.itertuples(index=False):
        grid.add_row(*map(_cell, row))
    console.print(grid)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def _with_flags(text: str) -> str:
    """``text`` of the library with its arguments in backticks as the options of the command that
    runs, or else of ``fit``: ```bs=32``` becomes ``--batch-size 32``."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    running = next((word for word in sys.argv[1:] if word in commands), "fit")
    flag = {
        each.name: each.opts[0] if each.param_type_name == "option" else each.name.upper()
        for each in (*commands["fit"].params, *commands[running].params)
    }
    named = re.compile(rf"`({'|'.join(flag)})(?:=([^`\n]*))?`")
    return named.sub(lambda found: f"{flag[found[1]]} {found[2] or ''}".rstrip(), text)


def main() -> None:
    """Run the command line; whatever goes wrong becomes two lines and an exit code."""
    # fastai, timm and torch warn about their own insides, which a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module="timm")
    warnings.filterwarnings("ignore", module="PIL")  # of damaged images, which are listed
    warnings.filterwarnings("ignore", message="Glyph")  # a name in letters the font lacks
    _accept_any_name()
    os.environ.setdefault("HOME", str(user_home()))  # libraries fail without one, each in its way
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        code = app(prog_name="bloodcell", standalone_mode=False)
        if code == INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except TyperException as error:  # a word the command line does not know
        command = context.command_path if (context := getattr(error, "ctx", None)) else "bloodcell"
        # Without a command Typer has printed the help and has no message of its own.
        message = error.format_message()
        code = _show_error(UsageError(message, f"See {command} --help.")) if message else 2
    except (Abort, KeyboardInterrupt):
        code = _show_error(
            BloodcellError("Stopped.", "Continue a fit with: bloodcell fit --resume", INTERRUPTED)
        )
    except Exception as error:
        if debug:
            raise
        code = _show_error(_explained(error))
    raise SystemExit(code)


def _accept_any_name() -> None:
    """Names of files may be in any encoding, and the terminal's may lack their letters."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # it is closed
                stream.reconfigure(
                    errors="surrogateescape" if stream is sys.stdin else "backslashreplace"
                )


def _explained(error: Exception) -> BloodcellError:
    if isinstance(error, BloodcellError):
        return error
    if isinstance(error, OSError):
        return disk_error(error)
    reason = str(error).strip().partition("\n")[0]
    return BloodcellError(
        f"Unexpected: {type(error).__name__}" + (f": {reason}" if reason else "."),
        "Run it again as bloodcell --debug ... and report what it shows.",
    )


def _show_error(error: BloodcellError) -> int:
    if "RANK" in os.environ:  # of several processes
        from .distributed import speaks

        if not speaks(error):
            return error.exit_code
    message, hint = (_one_line(_with_flags(text)) for text in (error.message, error.hint))
    errors.print(f"Error: {message}", style="bold red")
    if hint:
        errors.print(f"Hint:  {hint}")
    return error.exit_code


if __name__ == "__main__":
    main()
