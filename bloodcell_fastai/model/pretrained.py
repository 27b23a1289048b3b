"""Pretrained weights that ship with the package, each a bundle in ``weights/``: docs/weights.md."""

from dataclasses import dataclass
from pathlib import Path

from ..config import ResolvedConfig
from ..errors import MissingFileError, UsageError
from ..files import read_json

FOLDER = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class Source:
    """The images a pretrained model was trained on.

    Attributes:
        images: what they show and who published them, in a few words.
        limits: where they come from, and so what the model has never seen.
        licence: of the images, and so of the weights, as the Hugging Face Hub names it.
        citation: of the publication, in Markdown.
    """

    images: str
    limits: str
    licence: str
    citation: str


PRETRAINED = {
    "pbc": Source(
        images="blood cells, Acevedo et al. 2020",
        limits="All its training images are from one laboratory (Hospital Clínic, Barcelona), one "
        "stain, one kind of camera (CellaVision DM96), and people without a disease of the blood.",
        licence="cc-by-4.0",
        citation="A. Acevedo, A. Merino, S. Alférez, Á. Molina, L. Boldú, J. Rodellar: “A dataset "
        "of microscopic peripheral blood cell images for development of automatic recognition "
        "systems”, Data in Brief 30 (2020) 105474, "
        "[doi:10.1016/j.dib.2020.105474](https://doi.org/10.1016/j.dib.2020.105474)",
    )
}
"""The pretrained models that ship with the package, by name."""

DEFAULT_PRETRAINED = "pbc"  # what predicts where no run is


def pretrained_path(name: str) -> Path:
    """The folder of a pretrained model, a run as ``export --format bundle`` writes it.

    Args:
        name: one of :data:`PRETRAINED`.

    Raises:
        BloodcellError: the installation lacks its files.
    """
    if not _is_there(name):
        raise MissingFileError(
            f"The pretrained model {name} is missing from this installation.",
            "Install the package again: pip install --force-reinstall bloodcell-fastai; or train "
            "a model: bloodcell fit",
        )
    return FOLDER / name


def pretrained_weights(name: str, arch: str) -> Path:
    """The weights file of a pretrained model, as initial weights for ``arch``.

    Args:
        name: one of :data:`PRETRAINED`.
        arch: a timm architecture; whatever weights its tag names.

    Raises:
        BloodcellError: the installation lacks it, or it is of another architecture.
    """
    path = pretrained_path(name)
    if not _fits(name, arch):
        raise UsageError(
            f"The pretrained weights {name} are for {_arch(name)}, not for {arch}.",
            f"Use `arch={_arch(name)}`, or other `weights`.",
        )
    return path / "model.safetensors"


def pretrained_for(arch: str) -> str | None:
    """The name of a pretrained model of this architecture; None if there is none."""
    return next((name for name in PRETRAINED if _is_there(name) and _fits(name, arch)), None)


def pretrained_source(path: Path) -> Source | None:
    """What the run in a folder was trained on; None if it does not ship with the package."""
    path = Path(path).resolve()
    return PRETRAINED.get(path.name) if path.parent == FOLDER.resolve() else None


def introduce(name: str, config: ResolvedConfig) -> str:
    """What a pretrained model is and is not, for those who predict with it as it is.

    Args:
        name: one of :data:`PRETRAINED`.
        config: of its run.
    """
    source = PRETRAINED[name]
    return (
        f"PRETRAINED MODEL that ships with the package: {name} ({source.images}), {config.arch} "
        f"at {config.size} px. It knows the classes {', '.join(config.classes)} and no others. "
        f"{source.limits} On images from elsewhere it can be wrong with high confidence. It is no "
        "medical device: do not use its predictions to decide about a patient. To train on your "
        "own images: bloodcell fit --data FOLDER"
    )


def _is_there(name: str) -> bool:
    return all((FOLDER / name / file).is_file() for file in ("config.json", "model.safetensors"))


def _fits(name: str, arch: str) -> bool:
    return _arch(name).partition(".")[0] == arch.partition(".")[0]


def _arch(name: str) -> str:
    return read_json(FOLDER / name / "config.json")["resolved"]["arch"]
