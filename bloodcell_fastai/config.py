"""The options of a run: each is declared once, in :class:`Config`.

The command line, the checks, the JSON, the table in the docs and :func:`fit_command` come from
that declaration.
"""

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import UsageError

DEFAULT_ARCH = "maxvit_nano_rw_256.sw_in1k"
MAX_BATCH_PIXELS = 2**32  # 52 GB as float32 numbers of three channels
LONGEST_TEXT = 4096  # characters; so long may a path be on Linux
MOST_ENTRIES = 1000

LABEL_SOURCE = ("classes_from", "labels", "label_column")
OF_MACHINE = ("data", "workers", "device")  # what may change while a run is trained

Split = Literal["photo", "official", "random"]
SPLITS: tuple[Split, ...] = get_args(Split)


def _check_text(value: object) -> object:
    """A path as text, within limits. Pydantic's own limits refuse names that are not UTF-8."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and (len(value) > LONGEST_TEXT or "\0" in value):
        limits = f"Input should have at most {LONGEST_TEXT} characters, none of them NUL"
        raise PydanticCustomError("text", limits)
    return value


Text = Annotated[str, BeforeValidator(_check_text)]


def _option(panel: str, default: Any, meaning: str, **limits: float) -> Any:
    """The declaration of an option; ``panel`` is its group in ``bloodcell fit --help``."""
    return Field(default, title=panel, description=meaning, **limits)  # type: ignore[call-overload]


class Config(BaseModel):
    """The options of a run, as they are asked for. They cannot be changed, only copied.

    What each means, its range and its default are in :func:`options_table`. Options carry
    fastai's names where fastai has one.

    Raises:
        UsageError: an option is unknown or its value is not allowed; the message names it.

    Examples:
        >>> from bloodcell_fastai import Config
        >>> config = Config(data="demo", size=128, epochs=5)
        >>> config.split, config.lr
        ('photo', 0.001)
        >>> Config(size=16)
        Traceback (most recent call last):
            ...
        bloodcell_fastai.errors.UsageError: size is 16: input should be greater than or equal to 32.
        Change `size` (default: 256): Input size, in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    data: Text = _option("Data", "", "Folder, archive or demo; empty: find or download.")
    classes_from: Literal["auto", "folder", "parent", "name"] = _option(
        "Data",
        "auto",
        "Class by folder, parent (folder) or (file) name.",
    )
    labels: Text = _option("Data", "", "Table of labels: CSV, TSV or Excel.")
    label_column: Text = _option("Data", "", "Its column of classes; empty: found by its name.")
    split: Split = _option(
        "Data", "photo", "photo (none in both parts), official (the data's own) or random."
    )
    folds: int = _option(
        "Data", 0, "Folds of a cross-validation by photograph; 0: none.", ge=0, le=1000
    )
    arch: Text = _option("Model", DEFAULT_ARCH, "Any architecture of timm.")
    weights: Text = _option(
        "Model", "auto", "Initial weights: auto, pbc, imagenet, none or a file."
    )
    size: int = _option("Model", 256, "Input size, in pixels.", ge=32, le=4096)
    crop: Literal["cell", "frame"] = _option(
        "Model", "cell", "cell: square around the white cell; frame: whole image."
    )
    epochs: int = _option("Training", 20, "Total number of epochs.", ge=1, le=100_000)
    freeze_epochs: int = _option(
        "Training", -1, "First epochs, for the head alone; -1: 1 if pretrained.", ge=-1, le=100_000
    )
    bs: int = _option("Training", 64, "Batch size, in images.", ge=1, le=65_536)
    lr: Annotated[float, Field(gt=0, le=10)] | Literal["auto"] = _option(
        "Training", 1e-3, "Maximum learning rate, at most 10; auto: found with lr_find."
    )
    patience: int = _option(
        "Training", 0, "Epochs without improvement before stopping; 0: never.", ge=0, le=100_000
    )
    seed: int = _option("Training", 42, "Random seed.", ge=0, le=2**32 - 1)
    stain: float = _option(
        "Augmentation", 0.8, "Strength of changes of stain and tint.", ge=0, le=1
    )
    sharpness: float = _option(
        "Augmentation", 0.7, "Strength of blurring and sharpening.", ge=0, le=1
    )
    zoom: float = _option("Augmentation", 1.25, "Largest zoom factor, in and out.", ge=1, le=10)
    workers: int = _option(
        "Run", -1, "Decoding threads; 0: none, -1: as many as useful.", ge=-1, le=1024
    )
    device: Text = _option("Run", "auto", "auto, cpu, cuda, cuda:1 or mps.")

    if not TYPE_CHECKING:  # type checkers and editors take the arguments from the fields

        def __init__(self, **values: Any):
            fields = type(self).model_fields
            if unknown := sorted(values.keys() - fields):
                options = f"Options: {', '.join(fields)}."
                raise UsageError(f"{unknown[0][:100]} is not an option.", options)
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _usage_error(error) from None

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        if self.bs * self.size**2 > MAX_BATCH_PIXELS:
            raise UsageError(
                f"bs is {self.bs} with size {self.size}; no memory holds such a batch.",
                "Use a smaller `bs` or `size`.",
            )
        if self.folds == 1:
            raise UsageError("folds is 1; it must be 0 or at least 2.", "Change `folds`.")
        if self.folds and self.split != "photo":
            raise UsageError(
                f"folds is {self.folds} with split {self.split}; folds are made by photograph.",
                "Use `split=photo` or leave out `folds`.",
            )
        if self.labels and self.classes_from != "auto":
            raise UsageError(
                f"classes_from is {self.classes_from}, and labels names a table of the classes.",
                "Leave out `classes_from` or `labels`.",
            )
        if self.freeze_epochs >= self.epochs:
            raise UsageError(
                f"freeze_epochs is {self.freeze_epochs}; it must be less than epochs, "
                f"{self.epochs}.",
                "Use more `epochs` or fewer `freeze_epochs`.",
            )
        return self

    @property
    def label_source(self) -> dict[str, Any]:
        """The options that say where the labels of the data are."""
        return {name: getattr(self, name) for name in LABEL_SOURCE}

    def changed(self, **changes: Any) -> Self:
        """A copy with other values.

        Raises:
            UsageError: a value is not allowed.
        """
        return type(self)(**(self.model_dump() | changes))


class ResolvedConfig(Config):
    """What the options came to: the folder of the data, the learning rate as a number, the device.

    Attributes:
        classes: names of folders, in the order of the model's outputs.
        pretrained: whether the initial weights come from any training.
        initial_weights: what ``weights`` came to: ``none``, ``pbc (...)``, ``imagenet (...)`` or
            a file.
        versions: of Python and the libraries.
        warnings: sentences for the top of the report.
        bits: what the images of 16 bits per sample use of them; None: there are none.
    """

    classes: Annotated[tuple[Text, ...], Field(max_length=MOST_ENTRIES)] = ()
    pretrained: bool = False
    initial_weights: Text = ""
    versions: Annotated[tuple[Text, ...], Field(max_length=MOST_ENTRIES)] = ()
    warnings: Annotated[tuple[Text, ...], Field(max_length=MOST_ENTRIES)] = ()
    bits: Annotated[int, Field(ge=9, le=16)] | None = None

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Each is the name of a folder, which a path may be made of."""
        if len(set(classes)) < len(classes):
            raise UsageError("classes holds a name twice.", "Was the config edited?")
        for name in classes:
            if name in ("", ".", "..") or "/" in name:
                raise UsageError(
                    f"classes holds {name!r}; it must be the name of a folder.",
                    "Was the config edited?",
                )
        return classes

    @property
    def start(self) -> str:
        """What the model started from, in words."""
        return "random weights" if self.initial_weights == "none" else self.initial_weights


def flags(name: str) -> tuple[str, ...]:
    """The option of the command line that sets a field of :class:`Config`, and its short forms."""
    return {"bs": ("--batch-size", "--bs")}.get(name) or ("--" + name.replace("_", "-"),)


def fit_command(config: Config) -> str:
    """The command that asks for ``config`` again: its epochs and every option that is not the
    default, without ``workers`` and ``device``, which are of the machine.

    Examples:
        >>> from bloodcell_fastai import Config
        >>> from bloodcell_fastai.config import fit_command
        >>> fit_command(Config(data="my data", bs=32))
        "bloodcell fit --data 'my data' --epochs 20 --batch-size 32"
    """
    words = ["bloodcell", "fit"]
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if name == "epochs" or (value != field.default and name not in ("workers", "device")):
            words += [flags(name)[0], str(value)]
    return shlex.join(words)


def check_resumed(asked: Config, changes: Mapping[str, object], weights: str) -> None:
    """Refuse to continue a run under other options than it was begun with, those of the machine
    apart.

    Args:
        asked: the options of the run.
        changes: options for the rest of it.
        weights: its file of weights.

    Raises:
        UsageError: one cannot change; the message names it.
    """
    for name, value in changes.items():
        if name not in OF_MACHINE and (begun := getattr(asked, name)) != value:
            raise UsageError(
                f"{name} is {value}, but the run was begun with {begun}.",
                f"Leave out `{name}`, or train another run, which can start from the weights of "
                f"this one: `weights={weights}`.",
            )


def options_table() -> str:
    """All options of ``bloodcell fit`` that make a :class:`Config`, as a Markdown table."""
    lines = ["| Option | Default | Range | Meaning |", "|---|---|---|---|"]
    for name, schema in Config.model_json_schema()["properties"].items():
        flag = " or ".join(f"`{flag}`" for flag in flags(name))
        default = f"`{schema['default']}`" if schema["default"] != "" else ""
        limits = " to ".join(str(schema[key]) for key in ("minimum", "maximum") if key in schema)
        lines.append(f"| {flag} | {default} | {limits} | {schema['description']} |")
    return "\n".join(lines) + "\n"


def _usage_error(error: ValidationError) -> UsageError:
    """The first fault that pydantic found, for a user."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return cause
    name, value = first["loc"][0], str(first["input"])[:60] or "empty"
    message = f"{name} is {value}: {first['msg'].lower()}."
    if (field := Config.model_fields.get(str(name))) is None:
        return UsageError(message, "Was the config edited?")
    default = f" (default: {field.default})" if field.default != "" else ""
    return UsageError(message, f"Change `{name}`{default}: {field.description}")
