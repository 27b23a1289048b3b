"""Models that come with the package, each a packed run in ``weights/``: see docs/weights.md."""

from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..errors import BloodcellError, usage_error

FOLDER = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class Source:
    """The images a model was trained on.

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


READY = {
    "pbc": Source(
        images="blood cells, Acevedo et al. 2020",
        limits="All its images are of one laboratory (Hospital Clínic, Barcelona), one stain, one "
        "kind of camera (CellaVision DM96) and of people without a disease of the blood.",
        licence="cc-by-4.0",
        citation="A. Acevedo, A. Merino, S. Alférez, Á. Molina, L. Boldú, J. Rodellar: “A dataset "
        "of microscopic peripheral blood cell images for development of automatic recognition "
        "systems”, Data in Brief 30 (2020) 105474, "
        "[doi:10.1016/j.dib.2020.105474](https://doi.org/10.1016/j.dib.2020.105474)",
    )
}
"""The models that come with the package, by name."""

DEFAULT_READY = "pbc"  # what predicts where nothing was trained


def ready_path(name: str) -> Path:
    """The folder of a model that comes with the package, a packed run.

    Args:
        name: one of :data:`READY`.

    Raises:
        BloodcellError: the installation lacks its files.
    """
    if not _is_there(name):
        raise BloodcellError(
            f"The model {name} is missing from this installation.",
            "Install the package again: pip install --force-reinstall bloodcell-fastai; or train "
            "a model: bloodcell fit",
        )
    return FOLDER / name


def ready_weights(name: str, arch: str) -> Path:
    """The weights file of a model that comes with the package, to start ``arch`` from.

    Raises:
        BloodcellError: the installation lacks it, or it is of another architecture.
    """
    path = ready_path(name)
    if not _fits(name, arch):
        theirs = Config.load(path / "config.json").arch
        raise usage_error(
            f"The weights {name} are those of {theirs}, not of {arch}.",
            f"Use --arch {theirs}, or other --weights.",
        )
    return path / "model.safetensors"


def ready_for(arch: str) -> str | None:
    """The name of a model of this architecture that comes with the package; None: there is none."""
    return next((name for name in READY if _is_there(name) and _fits(name, arch)), None)


def ready_source(path: Path) -> Source | None:
    """What the packed run in a folder was trained on; None if it does not come with the package."""
    path = Path(path).resolve()
    return READY.get(path.name) if path.parent == FOLDER.resolve() else None


def introduce(name: str, config: Config) -> str:
    """What a model that comes with the package is and is not, for those who use it as it is."""
    source = READY[name]
    return (
        f"THE MODEL THAT COMES WITH THE PACKAGE: {name} ({source.images}), {config.arch} at "
        f"{config.size} px. It tells {', '.join(config.classes)} apart and knows nothing else. "
        f"{source.limits} On other photographs it can be wrong and sure of itself. It is no "
        "medical device: nothing it says may decide about a patient. Train one on photographs of "
        "your own: bloodcell fit --data FOLDER"
    )


def _is_there(name: str) -> bool:
    return all((FOLDER / name / file).is_file() for file in ("config.json", "model.safetensors"))


def _fits(name: str, arch: str) -> bool:
    """Whether an architecture is that of the model, whatever weights timm's tag names."""
    own = Config.load(FOLDER / name / "config.json").arch
    return own.partition(".")[0] == arch.partition(".")[0]
