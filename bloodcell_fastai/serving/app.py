"""A run's model as a web page and an HTTP endpoint, on this machine alone."""

import ipaddress
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Literal

import cv2
import numpy as np
import uvicorn
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Message

from .. import __version__
from ..data.demo import CLASSES, COPY_SIZE, draw_photograph
from ..data.splits import count_known, describe_leakage, leakage, photo_groups
from ..errors import BloodcellError, MissingFileError
from ..evaluation.interpretation import Scores, read_metrics
from ..evaluation.report import all_warnings, heat_pictures, load_template, percent, picture
from ..model.calibration import IN_DISTRIBUTION
from ..model.inference import UNLIKE, PredictedBatch, Predictor
from ..model.runs import Run
from ..reporter import Reporter

MAX_FILES = 32  # of a request
MAX_FILE_MB = 20
MAX_BODY = (MAX_FILES * MAX_FILE_MB + 1) * 10**6  # bytes of a request
MIN_CONFIDENCE = 0.5  # below it the predicted class is more likely wrong than right
NEAREST = 3  # training photographs shown beside an image
EXAMPLE_SEED = 7_000  # no photograph of the demo set, whose seeds are far larger
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
}


class ModelCard(BaseModel):
    """What the model is, its scores and its limits."""

    run: str
    arch: str = Field(description="The architecture, by timm's name.")
    start: str = Field(description="The initial weights of the training.")
    size: int = Field(description="Input size in pixels; images are resized to this square.")
    classes: list[str]
    n_train_images: int
    n_train_photos: int | None = Field(description="null: the photographs are not known.")
    calibrated: bool = Field(description="Whether its probabilities are calibrated.")
    min_confidence: float = Field(description="Below it an image is flagged as uncertain.")
    scores: Scores | None = Field(description="null: the run was not evaluated.")
    leakage: str = Field(description="Whether copies of training photographs raise the scores.")
    warnings: list[str]
    limits: list[str] = Field(description="What the model cannot do.")


class Upload(BaseModel):
    """The form of a request."""

    files: list[bytes] = Field(
        min_length=1, max_length=MAX_FILES, description=f"Images of at most {MAX_FILE_MB} MB each."
    )


class Prediction(BaseModel):
    """The prediction for an image."""

    file: str = Field(description="Name of the file as it was sent.")
    predicted: str = Field(description="The class with the highest probability.")
    confidence: float = Field(description="The probability of that class, 0 to 1.")
    flag: Literal["", "uncertain", "unlike training", "no cell", "nearly black", "nearly white"] = (
        Field(description="Why the image needs manual review; empty: no reason was found.")
    )
    probabilities: dict[str, float] = Field(description="Of every class; they sum to 1.")
    distance: float | None = Field(
        None, description="From the training images, 0 to 2; null: there are none to compare with."
    )
    nearest_label: str | None = Field(description="Class of the nearest training image.")


class FileError(BaseModel):
    """A file without a prediction."""

    file: str
    error: str = "This is not an image that can be read."


class Answer(BaseModel):
    """Predictions and errors, each in the order of the files."""

    predictions: list[Prediction]
    errors: list[FileError]


class Refusal(BaseModel):
    """Why a request has no answer."""

    detail: str


class Service:
    """A run's model for many callers at a time; it works for one while the others wait.

    Args:
        run: one with a model.
        min_confidence: below it an image is flagged as uncertain, 0 to 1.
        device: see ``pick_device``.

    Raises:
        BloodcellError: the run has no model, is one of folds, or has a damaged file.
    """

    def __init__(self, run: Run, min_confidence: float = MIN_CONFIDENCE, device: str = "auto"):
        run.require_model()  # an ensemble of folds has no heat maps
        self.predictor = Predictor.load(run, min_confidence=min_confidence, device=device)
        self.card = describe_model(run, self.predictor)
        self._lock = Lock()

    def answer(
        self, files: Sequence[UploadFile], pictures: bool = False
    ) -> tuple[Answer, list[dict]]:
        """Predict the class of uploaded files; also, for each prediction, the pictures of the
        page, if they are wanted."""
        with TemporaryDirectory(prefix="bloodcell-") as folder:
            names = {str(Path(folder, str(n))): file.filename or "" for n, file in enumerate(files)}
            for path, file in zip(names, files, strict=True):
                with Path(path).open("wb") as copy:
                    copyfileobj(file.file, copy)
            with self._lock:
                found = self.predictor.predict(self.predictor.read(list(names)))
                shown = self._pictures(found) if pictures else []
        reference = self.predictor.reference
        labels = {} if reference is None else reference.table.set_index("path").label
        predictions = [
            Prediction(
                file=names[row["path"]],
                probabilities={name: row[f"p_{name}"] for name in self.card.classes},
                nearest_label=labels.get(row.get("nearest")),
                **row,
            )
            for row in found.table.to_dict("records")
        ]
        errors = [FileError(file=names[path]) for path in found.pictures.unreadable]
        return Answer(predictions=predictions, errors=errors), shown

    def _pictures(self, found: PredictedBatch) -> list[dict]:
        """Of each image the ``image``, its ``heat`` map (None if the architecture can have none)
        and the ``nearest`` training photographs, as data URIs."""
        paths, reference = found.pictures.paths, self.predictor.reference
        heat = heat_pictures(self.predictor, found.pictures, found.table.predicted)
        similar = [] if reference is None else reference.photographs(found.features, NEAREST)
        nearest = [
            [row | {"image": picture(row["path"])} for row in photos.to_dict("records")]
            for photos in similar
        ]
        return [
            {
                "image": picture(path),
                "heat": heat[n] if heat else None,
                "nearest": nearest[n] if nearest else [],
            }
            for n, path in enumerate(paths)
        ]


def serve(
    run: Run,
    host: str = "127.0.0.1",
    port: int = 7860,
    min_confidence: float = MIN_CONFIDENCE,
    device: str = "auto",
    reporter: Reporter | None = None,
    root_path: str = "",
) -> None:
    """Serve a run until Ctrl-C or SIGTERM; call it in the main thread.

    Args:
        run, min_confidence, device: see :class:`Service`.
        host: address to listen at; any but this machine's own opens the page to the network.
        port: 0 for a free one.
        reporter: told where the page is.
        root_path: see :func:`create_app`.

    Raises:
        BloodcellError: the port is taken, or see :class:`Service`.
    """
    reporter = reporter or Reporter()
    with _listen(host, port) as listener:
        address, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            reporter.warn(
                f"OPEN TO THE NETWORK: whoever reaches port {port} of this machine can use the "
                "model and see training images. There is no password and no encryption."
            )
        app = create_app(Service(run, min_confidence, device), root_path)
        shown = f"[{address}]" if ":" in address else address
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
        reporter.say(f"Serving {run.name} at http://{shown}:{port} until Ctrl-C")
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
        signal.signal(signal.SIGTERM, before)
    reporter.say("Stopped.")


def create_app(service: Service, root_path: str = "") -> Starlette:
    """The page at ``/`` and the endpoint below ``/api``, described at ``/openapi.json``.

    Args:
        service: what predicts.
        root_path: where a proxy shows the page, such as ``/blood``. Everything is there and at
            ``/``, so that a proxy may remove the path from the address or leave it.
    """
    root_path = f"/{root_path.strip('/')}".rstrip("/")
    examples = draw_examples()
    render = partial(
        load_template("serving", "page.html.jinja").render,
        card=service.card,
        examples=list(examples),
        root_path=root_path,
        in_distribution=IN_DISTRIBUTION,
        max_files=MAX_FILES,
        max_file_mb=MAX_FILE_MB,
    )

    async def predict(request: Request) -> Response:
        async with _uploads(request) as files:
            answer, _ = await run_in_threadpool(service.answer, files)
        if not answer.predictions:
            names = ", ".join(error.file for error in answer.errors)
            raise HTTPException(400, f"None of the files is an image: {names}.")
        return JSONResponse(answer.model_dump())

    async def predict_on_page(request: Request) -> Response:
        try:
            async with _uploads(request, examples) as files:
                answer, pictures = await run_in_threadpool(service.answer, files, True)
        except HTTPException as error:
            return HTMLResponse(render(problem=error.detail), error.status_code, HEADERS)
        return HTMLResponse(render(answer=answer, pictures=pictures), headers=HEADERS)

    here = Path(__file__).parent
    fixed = {
        "/": HTMLResponse(render(), headers=HEADERS),
        "/page.css": Response((here / "page.css").read_bytes(), media_type="text/css"),
        "/page.js": Response((here / "page.js").read_bytes(), media_type="text/javascript"),
        "/openapi.json": JSONResponse(describe_api(root_path)),
        "/api/model": JSONResponse(service.card.model_dump()),
    }
    fixed |= {f"/{name}": Response(png, media_type="image/png") for name, png in examples.items()}
    routes = [
        *(Route(path, response, methods=["GET"]) for path, response in fixed.items()),
        Route("/predict", predict_on_page, methods=["POST"]),
        Route("/api/predict", predict, methods=["POST"]),
    ]
    return Starlette(
        routes=[*routes, Mount(root_path, routes=routes)] if root_path else routes,
        exception_handlers={HTTPException: _refuse, ClientDisconnect: _refuse},
    )


def draw_examples() -> dict[str, bytes]:
    """A drawn photograph of each class of the demo, and a picture without blood: PNG files of
    320x240 pixels by their names."""
    pictures = {
        f"drawn-{label.lower()}.png": draw_photograph(label, EXAMPLE_SEED, size=COPY_SIZE)[0]
        for label in CLASSES
    }
    green, red = np.mgrid[:240, :320] * 0.75
    pictures["no-blood.png"] = np.dstack([red, green, np.full_like(red, 128)]).astype(np.uint8)
    return {n: cv2.imencode(".png", rgb[..., ::-1])[1].tobytes() for n, rgb in pictures.items()}


def describe_model(run: Run, predictor: Predictor) -> ModelCard:
    """What the page and the endpoint say about a run's model.

    Raises:
        BloodcellError: a file of the run is damaged.
    """
    config, table = run.config, run.table[run.table.part.isin(["train", "valid"])]
    train, n_known = table[table.part == "train"], count_known(table)
    scores = None
    with suppress(MissingFileError):  # not interpreted yet
        scores = Scores.model_validate(read_metrics(run))
    limits = [
        "This is a research tool and no medical device. Do not use its results in decisions about "
        "a person.",
        f"The model knows only {', '.join(predictor.classes)}: it predicts one of them for any "
        "image.",
        "It learned from the photographs of its training set. With another stain, microscope or "
        "camera it can be much worse: test it on labelled photographs of your own first.",
        "A heat map shows which parts of the image support the predicted class. It does not show "
        "why, and it does not outline a cell.",
    ]
    if predictor.reference is not None:
        limits.append(
            f'The flag "{UNLIKE}" marks images further from the training images than '
            f"{percent(IN_DISTRIBUTION, 0)} of the validation images. It misses some foreign "
            "images and marks some familiar ones."
        )
    if predictor.calibration is None:
        limits.append("Its probabilities are not calibrated: the confidence may be too high.")
    return ModelCard(
        run=run.name,
        arch=config.arch,
        start=config.start,
        size=config.size,
        classes=list(config.classes),
        n_train_images=len(train),
        n_train_photos=photo_groups(train).nunique() if n_known else None,
        calibrated=predictor.calibrated,
        min_confidence=predictor.min_confidence,
        scores=scores,
        leakage=describe_leakage(leakage(table), n_known, len(table)),
        warnings=list(all_warnings(config)),
        limits=limits,
    )


def describe_api(root_path: str) -> dict[str, Any]:
    """The endpoint as an OpenAPI 3.1 document."""
    models = (Answer, ModelCard, Refusal, Upload)
    _, schemas = models_json_schema(
        [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
    )

    def body(model: type[BaseModel], description: str, kind: str = "application/json") -> dict:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        return {"description": description, "content": {kind: {"schema": schema}}}

    predict = {
        "summary": "Predict the class of images, which are deleted before the answer is sent.",
        "requestBody": body(Upload, "The images.", "multipart/form-data") | {"required": True},
        "responses": {
            "200": body(Answer, "At least one file is an image."),
            "400": body(Refusal, "No file is an image, or there is none."),
            "413": body(Refusal, "Too many files, or too large ones."),
        },
    }
    model = {"responses": {"200": body(ModelCard, "What the model is, its scores and limits.")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "bloodcell", "version": __version__},
        "servers": [{"url": root_path or "/"}],
        "paths": {"/api/model": {"get": model}, "/api/predict": {"post": predict}},
        "components": {"schemas": schemas["$defs"]},
    }


@asynccontextmanager
async def _uploads(
    request: Request, examples: Mapping[str, bytes] | None = None
) -> AsyncIterator[list[UploadFile]]:
    """The files of a form, or the example that it names; reading stops where it is too large.

    Raises:
        HTTPException: there are no files, too many, or too large ones.
    """
    left, announced = MAX_BODY, int(request.headers.get("content-length", 0))

    async def receive() -> Message:
        nonlocal left
        if announced <= MAX_BODY:
            message = await request.receive()
            left -= len(message.get("body", b""))
            if left >= 0:
                return message
        raise HTTPException(413, f"Send at most {MAX_BODY // 10**6} MB at a time.")

    async with Request(request.scope, receive).form() as form:
        files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
        if examples and (name := str(form.get("example"))) in examples:
            files = [UploadFile(BytesIO(examples[name]), filename=name)]
        if not files:
            raise HTTPException(400, f"Send 1 to {MAX_FILES} images, each in a field named files.")
        if len(files) > MAX_FILES:
            raise HTTPException(413, f"These are {len(files)} files: send at most {MAX_FILES}.")
        for file in files:
            if (megabytes := (file.size or 0) / 10**6) > MAX_FILE_MB:
                too_large = f"{file.filename} has {megabytes:.1f} MB"
                raise HTTPException(413, f"{too_large}: send files of at most {MAX_FILE_MB} MB.")
        yield files


async def _refuse(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
    return Response(status_code=400)  # whoever asked has gone


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise BloodcellError(
            f"Cannot listen at {host}, port {port}: {error.strerror}.",
            "Choose another `port`, 0 for a free one, or a `host` of this machine.",
        ) from None
