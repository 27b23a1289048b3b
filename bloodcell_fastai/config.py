"""Every choice of a run in one place: checked when made, saved as JSON beside the results."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from .errors import BloodcellError, usage_error
from .files import read_json, write_json

DEFAULT_ARCH = "maxvit_nano_rw_256.sw_in1k"
SPLITS = ("photo", "official", "random")
CROPS = ("cell", "frame")
COMPILE = ("auto", "yes", "no")


@dataclass(frozen=True)
class Config:
    """The options of a run and what they were resolved to.

    Options carry fastai's names where fastai has one. The attributes from ``classes`` on are
    filled in by the run itself.

    Attributes:
        data: as for :func:`~bloodcell_fastai.open_dataset`; empty to find the data.
        split: ``photo``, ``official`` or ``random``, see :func:`~bloodcell_fastai.split_table`.
        arch: any architecture of timm's.
        weights: what it starts from, see :func:`~bloodcell_fastai.blood_learner`.
        size: side of the input, in pixels.
        crop: ``cell`` or ``frame``, see :mod:`~bloodcell_fastai.data.framing`.
        epochs: all of them.
        freeze_epochs: of these the first ones, which train the head alone; -1 for one if the
            weights are pretrained, else none.
        batch_size: images.
        lr: maximum learning rate of the one-cycle schedule; 0 to find it with ``lr_find``.
        wd: weight decay.
        label_smoothing: of the cross-entropy loss, 0 to 0.99.
        freeze_norm: keep the statistics of batch normalisation.
        mixup: fastai's ``alpha``; 0 for no mixup.
        patience: epochs without progress after which training stops; 0 for never.
        seed: of everything random.
        flip: as ``rotate``, ``zoom``, ``warp``, ``lighting``, ``stain``, ``sharpness`` and
            ``noise`` an argument of :func:`~bloodcell_fastai.augmentation`.
        rotate: largest angle, in degrees.
        zoom: largest factor, in and out.
        warp: fastai's ``max_warp``.
        lighting: fastai's ``max_lighting``.
        stain: change of the dyes and of the tint, 0 to 1.
        sharpness: blurred and sharpened by up to this share, 0 to 1.
        noise: largest standard deviation, of colours from 0 to 1.
        workers: threads that decode images; -1 leaves it to the machine.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        compile: ``auto``, ``yes`` or ``no``, for ``torch.compile`` on CUDA.
        folds: how many, with split ``photo``; 0 for a single split.
        classes: names in the order of the model's outputs.
        pretrained: whether the first weights came from training of any kind.
        weights_used: what ``weights`` came to, in a few words.
        versions: of the libraries and of Python.
        warnings: sentences that stand in the report's first lines.

    Raises:
        BloodcellError: a value is out of range; the message names the field.

    Examples:
        >>> from bloodcell_fastai import Config
        >>> config = Config(data="demo", size=128, epochs=5)
        >>> config.split, config.lr
        ('photo', 0.001)
        >>> Config(size=16)
        Traceback (most recent call last):
            ...
        bloodcell_fastai.errors.BloodcellError: size is 16, which makes no sense.
        Give --size from 32 to 4096.
    """

    data: str = ""
    split: str = "photo"
    arch: str = DEFAULT_ARCH
    weights: str = "auto"
    size: int = 256
    crop: str = "cell"
    epochs: int = 20
    freeze_epochs: int = -1
    batch_size: int = 64
    lr: float = 1e-3
    wd: float = 0.01
    label_smoothing: float = 0.1
    freeze_norm: bool = False
    mixup: float = 0.0
    patience: int = 0
    seed: int = 42
    flip: bool = True
    rotate: float = 180.0
    zoom: float = 1.25
    warp: float = 0.1
    lighting: float = 0.3
    stain: float = 0.8
    sharpness: float = 0.7
    noise: float = 0.03
    workers: int = -1
    device: str = "auto"
    compile: str = "auto"
    folds: int = 0

    classes: tuple[str, ...] = ()
    pretrained: bool = False
    weights_used: str = ""
    versions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self):
        for name, low, high in _RANGES:
            _check_range(name, getattr(self, name), low, high)
        if self.batch_size * self.size**2 > MAX_BATCH_PIXELS:
            raise usage_error(
                f"batch_size is {self.batch_size}, which no memory holds at {self.size} px.",
                "Use a smaller --batch-size or --size.",
            )
        _check_classes(self.classes)
        if self.split not in SPLITS:
            raise usage_error(f"split is {self.split!r}.", f"Use one of: {', '.join(SPLITS)}.")
        if self.crop not in CROPS:
            raise usage_error(f"crop is {self.crop!r}.", f"Use one of: {', '.join(CROPS)}.")
        if self.compile not in COMPILE:
            raise usage_error(f"compile is {self.compile!r}.", f"Use one of: {', '.join(COMPILE)}.")
        if self.folds == 1 or (self.folds and self.split != "photo"):
            raise usage_error(
                f"folds is {self.folds} with split {self.split}.",
                "Use --folds 2 or more, with --split photo.",
            )
        if self.freeze_epochs >= self.epochs:
            raise usage_error(
                f"freeze_epochs ({self.freeze_epochs}) leaves nothing of {self.epochs} epochs.",
                "Use more --epochs or fewer --freeze-epochs.",
            )

    @property
    def start(self) -> str:
        """What the model started from, in words."""
        return "random weights" if self.weights_used == "none" else self.weights_used

    def save(self, path: Path) -> None:
        """Write the config to ``path`` as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Read a config that :meth:`save` wrote.

        Raises:
            BloodcellError: the file is missing, is not JSON, or a field is unknown or of the
                wrong type.
        """
        values = read_json(path, "Is this the folder of a run, as fit wrote it?")
        values.setdefault("crop", "frame")  # a run from before there was a choice
        return cls(**{name: _typed(name, value, path) for name, value in values.items()})


MAX_BATCH_PIXELS = 2**32  # 39 GB as float32 numbers
LONGEST_TEXT = 4096  # characters; so long may a path be on Linux
MOST_ENTRIES = 1000

_RANGES = (
    ("size", 32, 4096),
    ("epochs", 1, 100_000),
    ("freeze_epochs", -1, 100_000),
    ("batch_size", 1, 65_536),
    ("lr", 0, 10),
    ("wd", 0, 10),
    ("label_smoothing", 0, 0.99),
    ("mixup", 0, 10),
    ("patience", 0, 100_000),
    ("seed", 0, 2**32 - 1),
    ("rotate", 0, 180),
    ("zoom", 1, 10),
    ("warp", 0, 1),
    ("lighting", 0, 0.99),
    ("stain", 0, 1),
    ("sharpness", 0, 1),
    ("noise", 0, 1),
    ("workers", -1, 1024),
    ("folds", 0, 1000),
)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN too
        option = "--" + name.replace("_", "-")
        raise usage_error(
            f"{name} is {str(value)[:40]}, which makes no sense.",
            f"Give {option} from {low} to {high}.",
        )


def _check_classes(classes: tuple[str, ...]) -> None:
    """Classes are names of folders, each of them once."""
    if len(set(classes)) < len(classes):
        raise usage_error("classes holds a name twice.", "Was the config edited?")
    for name in classes:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise usage_error(
                f"classes holds {name!r}, which is no name of a folder.", "Was the config edited?"
            )


def _typed(name: str, value: Any, path: Path) -> Any:
    """``value`` if it has the type of the field ``name``; JSON lists become tuples."""
    if name not in {field.name for field in fields(Config)}:
        raise BloodcellError(f"{path}: unknown option {name[:100]!r}.", "Was it edited?")
    expected = get_type_hints(Config)[name]
    texts = value if expected == tuple[str, ...] else [value]
    if isinstance(texts, list) and len(texts) <= MOST_ENTRIES:
        for text in texts:
            if isinstance(text, str) and (len(text) > LONGEST_TEXT or "\0" in text):
                raise BloodcellError(f"{path}: {name} is no sensible text.", "Was it edited?")
        if expected == tuple[str, ...]:
            if all(isinstance(item, str) for item in texts):
                return tuple(texts)
        elif type(value) is expected or (expected is float and type(value) is int):
            return value
    shown = repr(value)
    raise BloodcellError(f"{path}: {name} has the wrong type: {shown[:80]}.", "Was it edited?")
