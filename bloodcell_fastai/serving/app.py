"""A trained run as a web page and as an HTTP endpoint, on this machine alone."""

import ipaddress
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from ..analysis.explain import network_heat_maps
from ..analysis.interpretation import read_results
from ..analysis.report import all_warnings, load_template, percent, picture
from ..data.smears import CLASSES, COPY_SIZE, draw_photograph
from ..data.splits import leakage, photos_known
from ..errors import BloodcellError
from ..files import atomic_path
from ..reporter import Reporter
from ..training.calibration import KNOWN_SHARE
from ..training.learner import TimmBody, TimmHead
from ..training.runs import Run
from ..training.workflow import describe_leakage
from .inference import UNLIKE, Batch, Predictor

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # asked for by its modules too
try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI, File, HTTPException, UploadFile
    from pydantic import BaseModel, Field
except ModuleNotFoundError as error:
    raise BloodcellError(
        f"Serving needs the package {error.name}.", 'pip install "bloodcell-fastai[serve]"'
    ) from error

MAX_FILES = 32  # of a request
MAX_FILE_MB = 20
SURE_ENOUGH = 0.5  # below it the class is likelier wrong than right
KEPT_SECONDS = 300  # how long Gradio keeps a file that was uploaded to the page
NEAREST = 3  # training photographs shown beside an image
NO_IMAGE = "This is no image that can be read."
EXAMPLE_SEED = 7_000  # no field of the demo set, whose seeds are of another order
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


class Scores(BaseModel):
    """How often the model was right on its validation images."""

    photo_accuracy: float = Field(description="Share of the photographs it got right, 0 to 1.")
    photo_accuracy_ci95: tuple[float, float] = Field(description="Its 95 % interval.")
    accuracy: float = Field(description="Share of the images it got right, 0 to 1.")
    accuracy_ci95: tuple[float, float] = Field(description="Its 95 % interval.")
    n_photos: int
    n_images: int
    photos_known: bool = Field(description="False: every image counts as a photograph.")


class ModelCard(BaseModel):
    """What the model is, how good it is, and where that ends."""

    run: str
    arch: str = Field(description="The architecture, by timm's name.")
    start: str = Field(description="The weights it started from.")
    size: int = Field(description="Side of its input in pixels; images are squeezed to it.")
    classes: list[str]
    n_train_images: int
    n_train_photos: int | None = Field(description="null: which photographs is not known.")
    calibrated: bool
    min_confidence: float = Field(description="Below it an image is flagged as uncertain.")
    scores: Scores | None = Field(description="null: the run was not evaluated.")
    leakage: str = Field(description="What the scores are worth, in words.")
    warnings: list[str]
    limits: list[str]


class Prediction(BaseModel):
    """What the model makes of an image."""

    file: str = Field(description="Name of the file as it was sent.")
    predicted: str = Field(description="The likeliest class.")
    confidence: float = Field(description="Its probability, 0 to 1.")
    flag: Literal["", "uncertain", "unlike training", "no cell"] = Field(
        description="Set where a person should look."
    )
    probabilities: dict[str, float] = Field(description="Of every class; they sum to 1.")
    distance: float | None = Field(
        description="From the training images, 0 to 2; null: the run has none to compare with."
    )
    nearest_label: str | None = Field(description="Class of the nearest training image.")


class FileError(BaseModel):
    """A file without an answer."""

    file: str
    error: str


class Answer(BaseModel):
    """What came of a request, each list in the order of its files."""

    predictions: list[Prediction]
    errors: list[FileError]


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str


class Service:
    """A run for many callers at a time: the model works for one while the others wait.

    Args:
        run: one with a model.
        min_confidence: below it an image is flagged as uncertain, 0 to 1.
        device: see ``pick_device``.

    Attributes:
        predictor: of the run.
        card: what the model is.

    Raises:
        BloodcellError: see :meth:`Predictor.load`.
    """

    def __init__(self, run: Run, min_confidence: float = SURE_ENOUGH, device: str = "auto"):
        run.require_model()  # of several folds the page could show but one
        self.predictor = Predictor.load(run, min_confidence=min_confidence, device=device)
        self.card = describe_model(run, self.predictor)
        self._lock = Lock()

    def predict(self, paths: Sequence[str]) -> Batch:
        """Predict one or more images; see :meth:`Predictor.stream`."""
        with self._lock:
            batches = list(self.predictor.stream(paths))
        filled = [batch for batch in batches if len(batch.table)] or batches[:1]
        return Batch(
            pd.concat([batch.table for batch in filled], ignore_index=True),
            [path for batch in batches for path in batch.unreadable],
            torch.cat([batch.features for batch in filled]),
        )

    def heat_maps(self, paths: Sequence[str]) -> Sequence[np.ndarray | None]:
        """A heat map of each image, None where the architecture can have none; see
        :func:`~bloodcell_fastai.heat_maps`."""
        model, config = self.predictor.model, self.predictor.config
        network = nn.Sequential(TimmBody(model), TimmHead(model))
        try:
            with self._lock:
                maps = network_heat_maps(network, config.arch, config.size, config.crop, paths)
                return list(maps)
        except BloodcellError:  # it keeps no features with a place in the image
            return [None] * len(paths)

    def nearest(self, features: torch.Tensor, n: int) -> list[pd.DataFrame]:
        """The ``n`` training photographs nearest to each image; none if the run has no
        reference. See :meth:`Reference.photographs`."""
        if self.predictor.reference is None:
            return [pd.DataFrame()] * len(features)
        return self.predictor.reference.photographs(features, n)


def serve(
    run: Run,
    host: str = "127.0.0.1",
    port: int = 7860,
    min_confidence: float = SURE_ENOUGH,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> None:
    """Serve a run until Ctrl-C; to be called in the main thread.

    Args:
        run: one with a model.
        host: address to listen at; any but this machine's own opens the page to the network.
        port: 0 for a free one.
        min_confidence: below it an image is flagged as uncertain, 0 to 1.
        device: see ``pick_device``.
        reporter: told where the page is.

    Raises:
        BloodcellError: the port is taken, or the run has no model.
    """
    reporter = reporter or Reporter()
    with _listen(host, port) as listener, TemporaryDirectory(prefix="bloodcell-") as folder:
        address, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            reporter.warn(
                f"OPEN TO THE NETWORK: whoever reaches port {port} of this machine can use the "
                "model and see training images. There is no password and no encryption."
            )
        app = create_app(Service(run, min_confidence, device), Path(folder))
        shown = f"[{address}]" if ":" in address else address
        reporter.say(f"Serving {run.name} at http://{shown}:{port} until Ctrl-C")
        with _sigterm_as_ctrl_c(), suppress(KeyboardInterrupt):
            config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
            uvicorn.Server(config).run(sockets=[listener])
    reporter.say("Stopped.")


def create_app(service: Service, folder: Path) -> FastAPI:
    """The endpoint with the page at its root.

    Args:
        service: what answers.
        folder: for the examples and the files that are uploaded to the page; remove it
            afterwards.
    """
    uploads = folder.resolve() / "uploads"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # the one way to tell Gradio
    return gr.mount_gradio_app(
        create_api(service),
        create_page(service, draw_examples(folder / "examples"), uploads),
        path="/",
        theme=_theme(),
        css_paths=Path(__file__).with_name("page.css"),
        max_file_size=f"{MAX_FILE_MB}mb",
        footer_links=[],
        run_history=False,  # Gradio's record of what was asked
        ssr_mode=False,
        mcp_server=False,
    )


def create_api(service: Service) -> FastAPI:
    """The HTTP endpoint; its schema is at ``/openapi.json``."""
    app = FastAPI(
        title="bloodcell",
        version=version("bloodcell-fastai"),
        description=f"Classes of blood cells by run {service.card.run}. {service.card.limits[0]}",
        docs_url=None,  # these pages would load their scripts from elsewhere
        redoc_url=None,
        max_body_size=(MAX_FILES * MAX_FILE_MB + 1) * 10**6,
    )
    refusals = {400: "None of the files is an image.", 413: "Too many files, or too large ones."}

    @app.get("/api/model")
    def model() -> ModelCard:
        """What the model is, how good it is, and where that ends."""
        return service.card

    @app.post(
        "/api/predict",
        responses={code: {"model": Refusal, "description": t} for code, t in refusals.items()},
    )
    def predict(
        files: Annotated[
            list[UploadFile],
            File(description=f"1 to {MAX_FILES} images of at most {MAX_FILE_MB} MB each."),
        ],
    ) -> Answer:
        """Tell the class of images. Files are gone from the server when the answer is there."""
        names = [file.filename or "" for file in files]
        if problem := _refuse(names, [file.size or 0 for file in files]):
            raise HTTPException(413, problem)
        with TemporaryDirectory(prefix="bloodcell-") as folder:
            paths = [_store(file, Path(folder, str(number))) for number, file in enumerate(files)]
            batch = service.predict(paths)
        answer = _answer(service, batch, dict(zip(paths, names, strict=True)))
        if not answer.predictions:
            raise HTTPException(400, f"None of the files is an image: {', '.join(names)}.")
        return answer

    return app


def create_page(service: Service, examples: Sequence[Path], uploads: Path) -> gr.Blocks:
    """The page, for people; answers show the heat map and the nearest training photographs.

    Args:
        service: what answers.
        examples: images to click.
        uploads: folder, resolved, where Gradio puts what is uploaded.
    """
    page = _template()

    def answer(files: Sequence[Path]) -> str:
        if problem := _refuse([file.name for file in files], [f.stat().st_size for f in files]):
            return page.problem(problem)
        return page.answers(*_cards(service, list(map(str, files))), service.card)

    def answer_uploads(sent: list[dict]) -> str:
        files = [Path(file["path"]).resolve() for file in sent]
        if not all(file.is_relative_to(uploads) for file in files):
            raise gr.Error("Only files that were uploaded are read.", print_exception=False)
        return answer(files)

    def answer_example(number: int) -> str:
        return answer([examples[number]])

    listen = {"preprocess": False, "api_visibility": "private"}
    with gr.Blocks(
        title=f"bloodcell: {service.card.run}",
        analytics_enabled=False,
        delete_cache=(KEPT_SECONDS // 5, KEPT_SECONDS),
    ) as blocks:
        gr.HTML(page.header(service.card), apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                files = gr.File(label="Images", file_count="multiple", height=180)
                drawn = gr.Dataset(
                    label="Or an example, drawn by code",
                    components=[gr.Image(type="filepath", render=False)],
                    samples=[[str(path)] for path in examples],
                    type="index",
                )
            with gr.Column(scale=3, min_width=300):
                answers = gr.HTML(page.nothing(), elem_id="answers", apply_default_css=False)
        gr.HTML(page.about(service.card), apply_default_css=False)
        # The files are cleared away, so that the next ones can be dropped.
        files.upload(answer_uploads, files, answers, **listen).then(
            lambda: None, None, files, **listen
        )
        drawn.click(answer_example, drawn, answers, **listen)
    # Left alone, Gradio copies any file and fetches any address that a caller names, for it
    # checks neither in a page that it has not launched itself.
    blocks.has_launched = True
    for component in (files, drawn):
        component.async_move_resource_to_block_cache = _left_where_it_is
    return blocks


def draw_examples(folder: Path) -> list[Path]:
    """Draw a photograph of each kind of cell the demo knows, and a picture of no blood."""
    names = {f"drawn-{label.lower()}.png": label for label in CLASSES}
    pictures = {
        name: draw_photograph(label, EXAMPLE_SEED, size=COPY_SIZE)[0]
        for name, label in names.items()
    }
    width, height = COPY_SIZE
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pictures["no-blood.png"] = np.dstack([red, green, np.full_like(red, 128)]).astype(np.uint8)
    for name, pixels in pictures.items():
        with atomic_path(folder / name) as temporary:
            Image.fromarray(pixels).save(temporary)
    return [folder / name for name in pictures]


def describe_model(run: Run, predictor: Predictor) -> ModelCard:
    """What the page and the endpoint say of a run's model."""
    config, table = run.config, run.table
    train = table[table.part == "train"]
    try:
        metrics = read_results(run).metrics
    except BloodcellError:  # not interpreted yet
        metrics = None
    n_photos = int(train.photo.nunique()) if photos_known(table) else None
    return ModelCard(
        run=run.name,
        arch=config.arch,
        start=config.start,
        size=config.size,
        classes=list(config.classes),
        n_train_images=len(train),
        n_train_photos=n_photos,
        calibrated=predictor.calibration is not None,
        min_confidence=predictor.min_confidence,
        scores=Scores(**{name: metrics[name] for name in Scores.model_fields}) if metrics else None,
        leakage=describe_leakage(metrics["leakage"] if metrics else leakage(table)),
        warnings=list(all_warnings(config)),
        limits=_limits(predictor),
    )


def _limits(predictor: Predictor) -> list[str]:
    """Where the model ends, in plain words."""
    classes = ", ".join(predictor.config.classes)
    limits = [
        "A research tool and no medical device: nothing it says may enter a decision about a "
        "person.",
        f"It knows {classes} and nothing else: whatever it is shown, it answers with one of them.",
        "It learnt from the photographs of its training set. Another laboratory's stain, "
        "microscope or camera can make it worse by any amount: try it on labelled photographs "
        "of your own first.",
        "A heat map shows which parts of the image spoke for the class, not why, and not the "
        "outline of a cell.",
    ]
    if predictor.reference is not None:
        limits.insert(
            2,
            f"{UNLIKE.capitalize()!r} marks images further from the training images than "
            f"{percent(KNOWN_SHARE, 0)} of the validation images were. It catches much that is "
            "foreign, not all of it, and some that is not.",
        )
    if predictor.calibration is None:
        limits.append("Its probabilities are not calibrated: it may be surer than it should be.")
    return limits


def _answer(service: Service, batch: Batch, names: dict[str, str]) -> Answer:
    """A batch in the words of the endpoint; ``names`` of the files by their paths."""
    classes = service.card.classes
    nearest = service.nearest(batch.features, 1)
    predictions = [
        Prediction(
            file=names[row["path"]],
            predicted=row["predicted"],
            confidence=row["confidence"],
            flag=row["flag"],
            probabilities={name: row[f"p_{name}"] for name in classes},
            distance=row.get("distance"),
            nearest_label=photos.label.iloc[0] if len(photos) else None,
        )
        for row, photos in zip(batch.table.to_dict("records"), nearest, strict=True)
    ]
    return Answer(
        predictions=predictions,
        errors=[FileError(file=names[path], error=NO_IMAGE) for path in batch.unreadable],
    )


def _cards(service: Service, paths: Sequence[str]) -> tuple[list[dict], list[str]]:
    """What the page shows of each image, and the names of the files that are none."""
    batch = service.predict(paths)
    rows = batch.table.to_dict("records")
    heat = service.heat_maps(batch.table.path.tolist())
    nearest = service.nearest(batch.features, NEAREST)
    cards = [
        row
        | {
            "file": Path(row["path"]).name,
            "image": picture(row["path"]),
            "heat": None
            if warm is None
            else picture(row["path"], warm, service.predictor.config.crop),
            "bars": sorted(
                ((name, row[f"p_{name}"]) for name in service.card.classes),
                key=lambda bar: -bar[1],
            ),
            "photographs": [
                photo | {"image": picture(photo["path"])} for photo in photos.to_dict("records")
            ],
        }
        for row, warm, photos in zip(rows, heat, nearest, strict=True)
    ]
    return cards, [Path(path).name for path in batch.unreadable]


def _refuse(names: Sequence[str], sizes: Sequence[int]) -> str | None:
    """Why so many files, or files of so many bytes, are not taken; None if they are."""
    if len(names) > MAX_FILES:
        return f"These are {len(names)} files: send at most {MAX_FILES} at a time."
    for name, size in zip(names, sizes, strict=True):
        if size > MAX_FILE_MB * 10**6:
            megabytes = size / 10**6
            return f"{name} has {megabytes:.0f} MB: send files of at most {MAX_FILE_MB} MB."
    return None


async def _left_where_it_is(path: str) -> str:
    return path


def _store(file: UploadFile, path: Path) -> str:
    with path.open("wb") as copy:
        copyfileobj(file.file, copy)
    return str(path)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise BloodcellError(
            f"Cannot listen at {host}, port {port}: {error.strerror}.",
            "Give another --port, 0 for a free one, or a --host of this machine.",
        ) from None


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let a service manager's SIGTERM clean up as well."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _theme() -> gr.themes.Base:
    """System fonts, for Gradio's own are fetched from Google; and grey that can be read."""
    theme = gr.themes.Base(primary_hue="blue", font=FONT, font_mono=MONO)
    return theme.set(body_text_color_subdued="*neutral_600")


def _template():
    """The fragments of the page, each a function that returns escaped HTML."""
    return load_template("serving", "page.html.jinja").module
