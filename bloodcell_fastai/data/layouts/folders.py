"""Classes by the names of folders, whatever else these tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd

from ...errors import DataError
from ..class_names import known_cell
from ..images import is_image
from ..splits import subset_part
from .files import Files, LabelSource, Reading, as_text, is_mask, some, words_of
from .labels import fold_labels

NEUTRAL = {
    *("images", "image", "img", "imgs", "pictures", "picture", "jpegimages", "data"),
    *("dataset", "datasets", "main", "master", "set"),
    *("figure", "figures", "doc", "docs", "example", "examples", "assets", "plots", "screenshots"),
}
PATIENTS = {
    *("patient", "patients", "pat", "subject", "subj", "donor", "case", "person"),
    *("individual", "slide", "smear", "film", "specimen", "sample", "session", "visit"),
    *("day", "date", "fold", "animal", "paciente", "paziente"),
}
SOURCES = {
    *("batch", "camera", "center", "centre", "clinic", "hospital", "lab", "laboratory", "machine"),
    *("microscope", "part", "scanner", "site"),
}
VERSIONS = {
    *("original", "originals", "raw", "crop", "crops", "cropped", "resized", "segmented"),
    *("processed", "preprocessed", "normalized", "normalised", "enhanced", "grayscale"),
    *("aug", "augment", "augmented", "augmentation"),
}
ROBOFLOW_NAME = r"\.rf\.\w+$"  # of each version of an image, as Roboflow exports them
AUGMENTED_NAME = r"(?i)[_\-. ]+(?:aug|augmented|flip|hflip|vflip|rot|rotated)[^/\\]*$"


@dataclass(frozen=True)
class Place:
    """What the names of the folders above an image say.

    Attributes:
        subset: the first that is called like a training, validation or test set, else like a
            hospital or a part of the data.
        group: the first that is called like a patient or slide.
        version: the first that is called like a version of the images, such as cropped ones.
        names: the others, but those that say nothing, such as ``images``; the version where there
            are no others.
    """

    subset: str
    group: str
    version: str
    names: tuple[str, ...]


@lru_cache(maxsize=100_000)
def place_of(folders: tuple[str, ...]) -> Place:
    """What the names of folders say, from the outermost to the innermost."""
    subsets = [name for name in folders if _is_subset(name)]
    others = [name for name in folders if name not in subsets]
    groups = [name for name in others if _is_one_of(PATIENTS, name)]
    sources = [name for name in others if _is_one_of(SOURCES, name)]
    versions = [name for name in others if _is_made_of(VERSIONS, name)]
    said = {*subsets, *groups, *sources}
    names = [name for name in folders if name not in said and not _is_made_of(NEUTRAL, name)]
    unversioned = [name for name in names if name not in versions]
    subset, group, version = (
        next(iter(each), "") for each in (subsets + sources, groups, versions)
    )
    return Place(subset, group, version, tuple(unversioned or names))


def _is_subset(name: str) -> bool:
    return bool(subset_part(name)) and not known_cell(name)


def _is_one_of(kind: set[str], name: str) -> bool:
    """Whether a folder is called like one of several patients or sources, by a word and more."""
    words = words_of(name)
    return len(words) > 1 and not kind.isdisjoint(words) and not known_cell(name)


def _is_made_of(kind: set[str], name: str) -> bool:
    """Whether a folder is called by words of a kind alone, and numbers."""
    words = {word for word in words_of(name) if not word.isdigit()}
    return bool(words) and words <= kind


def _has_number(name: str) -> bool:
    return any(character.isdigit() for character in name)


def read_folders(files: Files, source: LabelSource) -> Reading | None:
    """Folders of classes, below or above folders of training and test sets, patients, slides or
    other data sets, or below none."""
    table = pd.DataFrame({"path": files.images, "folders": files.folders})
    places = {folders: place_of(folders) for folders in set(table.folders)}
    levels = _levels(places, source, files.root)
    table = table.assign(
        **{
            name: [getattr(levels[folders], name) for folders in table.folders]
            for name in ("label", "subset", "group", "reason")
        }
    )
    table, beside = _with_training_subset(table)
    if source.classes_from == "auto":
        table = table.assign(version=[places[folders].version for folders in table.folders])
        _refuse_versions(table, files.root)
        _refuse_folds(table, files.root)
        _refuse_patients_without_classes(table, files.root)
    labelled = table.reason == ""
    left_out = {
        reason: list(rows.path) for reason, rows in table[~labelled].groupby("reason", sort=False)
    }
    taken = table[labelled]
    if taken.empty:
        return None
    # Folders of one name below one set or one patient would be one folder.
    taken, folded = fold_labels(taken, taken.subset + "\0" + taken.group)
    layout, why = _layout_of(taken), _why_folders(taken, beside)
    taken, copies = _with_copies(taken, files.root)
    return Reading(
        layout,
        why,
        as_text(taken),
        left_out,
        folded + copies + _warn_of_empty(files) + _warn_of_loose(left_out),
    )


@dataclass(frozen=True)
class _Level:
    """What one folder means for the images in it; ``reason``: why they are left out."""

    label: str = ""
    subset: str = ""
    group: str = ""
    reason: str = ""


def _levels(
    places: Mapping[tuple[str, ...], Place], source: LabelSource, root: Path
) -> dict[tuple[str, ...], _Level]:
    """What each folder with images means."""
    if source.classes_from in ("folder", "parent"):
        at = -1 if source.classes_from == "folder" else -2
        return {folders: _level_at(folders, at, places[folders]) for folders in places}
    names = _without_wrapper({folders: place.names for folders, place in places.items()})
    names = _without_innermost(names)
    last = _class_is_last({each for each in names.values() if each}, root)
    tops = {each[0] for each in names.values() if len(each) > 1}
    numbered = len(tops) > 1 and all(map(_has_number, tops))
    found = {}
    for folders, place in places.items():
        own = names[folders]
        if not own:
            where = f"directly in {place.subset}, " if place.subset else ""
            found[folders] = _Level(reason=f"{where}in no folder of a class")
            continue
        subset, above = place.subset, list(own[:-1]) if last else []
        if above and not numbered and not subset:
            subset = above[0]
        # What lies between a data set and its classes are patients, whatever they are called, and
        # slides are below these.
        groups = {place.group, *(above if numbered else above[1:])}
        group = next((name for name in folders if name in groups), "")
        found[folders] = _Level(own[-1] if last else own[0], subset, group)
    return found


def are_one_set(folders: Sequence[Path]) -> bool:
    """Whether folders beside one another are parts of one data set, and not data sets."""
    names = {folder.name for folder in folders}
    if are_cells(names) or any(
        _is_subset(name) or _is_made_of(NEUTRAL, name) or _is_one_of(PATIENTS | SOURCES, name)
        for name in names
    ):
        return True
    return all(any(map(is_image, folder.iterdir())) for folder in folders)


def _level_at(folders: tuple[str, ...], at: int, place: Place) -> _Level:
    if len(folders) < -at:
        return _Level(reason="not deep enough in folders")
    label = folders[at]
    return _Level(
        label,
        "" if place.subset == label else place.subset,
        "" if place.group == label else place.group,
    )


def _without_wrapper(
    names: dict[tuple[str, ...], tuple[str, ...]],
) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The names without first ones that all have in common, while others come after these."""
    while len({each[0] for each in names.values() if each}) == 1 and any(
        len(each) > 1 for each in names.values()
    ):
        names = {folders: each[1:] for folders, each in names.items()}
    return names


def _without_innermost(
    names: dict[tuple[str, ...], tuple[str, ...]],
) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The names without last ones that all have in common below others, such as ``crops``."""
    while len({each[-1:] for each in names.values() if each}) == 1 and all(
        len(each) > 1 for each in names.values() if each
    ):
        names = {folders: each[:-1] for folders, each in names.items()}
    return names


def _class_is_last(names: set[tuple[str, ...]], root: Path) -> bool:
    """Whether the class is the last of the names of folders above an image, and not the first.

    Raises:
        BloodcellError: this is not clear.
    """
    single = {each[0] for each in names if len(each) == 1}
    deep = {each for each in names if len(each) > 1}
    below: dict[str, set[str]] = {}
    for each in deep:
        below.setdefault(each[0], set()).add(each[-1])
    lasts = {each[-1] for each in deep}
    if not deep:
        return False
    known_top, known_last = are_cells({*below, *single}), are_cells(lasts)
    if known_top != known_last:
        return known_last
    shared = {name for name in lasts if sum(name in each for each in below.values()) > 1}
    if not known_top:
        if single:
            if single.isdisjoint(lasts) or lasts <= single:
                return lasts <= single
        elif len(lasts) == 1:
            return False
        elif shared == lasts and not all(map(_has_number, lasts)):
            return True
        elif not shared and min(map(len, below.values())) == 1:
            return False
    raise DataError(
        f"It is not clear which folders of {root} are the classes: "
        f"{some({*below, *single})}, or {some(lasts)} below.",
        f"Say it: `classes_from=folder` takes the folder of each image ({some(lasts, 3)}), "
        f"`classes_from=parent` the one above ({some(below, 3)}).",
    )


def are_cells(names: set[str]) -> bool:
    """Whether most of the names are those of cells."""
    known = sum(bool(known_cell(name)) for name in names)
    return known > 1 and 2 * known >= len(names)


def _with_training_subset(table: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Folders of classes beside a test or validation folder are for training; what is beside a
    training folder, in no subset or in one of another name, is left out. True where the first is
    the case."""
    parts = parts_of(table.subset)
    training = "train" in set(parts)
    beside = (parts == "" if training else table.subset == "") & (table.reason == "")
    if not beside.any() or not parts.any():
        return table, False
    others = set(table.label[parts != ""])
    if not training and others & set(table.label[beside]):
        return table.assign(subset=table.subset.mask(beside, "train")), True
    names = some(table.subset[parts != ""])
    return table.assign(reason=table.reason.mask(beside, f"beside {names}")), False


def _with_copies(table: pd.DataFrame, root: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Images of one name in two formats, such as ``1.jpg`` and ``1.png``, and augmented copies
    beside their image, such as ``1_aug2.png``, are one photograph. A sentence tells the copies."""
    names = table.path.map(lambda path: str(path.relative_to(root).with_suffix("")))
    sources = names.str.replace(AUGMENTED_NAME, "", regex=True)
    exports = names.str.replace(ROBOFLOW_NAME, "", regex=True)
    copied = (sources != names) & sources.isin(set(names))
    photos = names.mask(copied, sources).mask(exports != names, exports)
    same = photos.duplicated(keep=False) & (table.group == "")
    copied = same & (photos != names)
    said = (
        f"{copied.sum():,} images are taken for copies of others by their names, such as "
        f"{names[copied.idxmax()]}: they stay on one side of the split with them.",
    )
    return table.assign(group=table.group.mask(same, photos)), said if copied.any() else ()


def parts_of(subsets: pd.Series) -> pd.Series:
    """What each subset is for: ``train``, ``valid``, ``test`` or empty."""
    return subsets.map({name: subset_part(name) for name in set(subsets)})


def _refuse_versions(table: pd.DataFrame, root: Path) -> None:
    """Refuse versions of the same images: in folders that are called so, or in data sets side by
    side that hold the same file names.

    Raises:
        BloodcellError: there are some.
    """
    taken = table[table.reason == ""]
    parts = parts_of(taken.subset)
    several = taken.groupby([parts, "label"]).version.transform("nunique") > 1
    no_others = len(taken) > 0 and (taken.version == taken.label).all()
    if several.any() or no_others:
        shown = taken.version[several | no_others]
        names = {name or "those of no such name" for name in set(shown)}
        raise DataError(
            f"Below {root}, folders are called like versions of the same images: {some(names)}.",
            "Give one version as `data`, or move the others out of the data set. "
            "`classes_from=folder` takes all, one image perhaps on both sides of the split.",
        )
    sides = taken[(taken.subset != "") & (taken.group == "") & (parts == "")]
    names = sides.path.map(lambda path: path.stem)
    counted = names.str.fullmatch(r"\d+")  # 1.jpg is the first image of any set
    same = pd.DataFrame({"label": sides.label, "name": names})[~counted].duplicated(keep=False)
    if len(same) and same.sum() > len(sides) / 2:
        first = sides.subset.iloc[0]
        raise DataError(
            f"The folders {some(sides.subset)} of {root} hold files of the same names: they look "
            "like versions of the same images.",
            f"Give one of them: `data={root / first}`. `classes_from=folder` takes all.",
        )


def _refuse_folds(table: pd.DataFrame, root: Path) -> None:
    """Refuse the folds of a cross-validation, each with its own training and test sets of the same
    images.

    Raises:
        BloodcellError: there are some.
    """
    taken = table[(table.reason == "") & (table.group != "") & (parts_of(table.subset) != "")]
    rows = zip(taken.folders, taken.group, taken.subset, strict=True)
    above = [group in folders[: folders.index(subset)] for folders, group, subset in rows]
    several = taken[pd.Series(above, taken.index, bool)].groupby("group").subset.nunique() > 1
    if several.sum() > 1:
        folds = list(several.index[several])
        raise DataError(
            f"The folders {some(folds)} of {root} each hold {some(taken.subset)}: they look like "
            "the folds of a cross-validation, with the same images in each.",
            f"Give one of them, such as `data={root / folds[0]}`, or only the images once and "
            "`folds=5`. `classes_from=folder` takes all.",
        )


def _refuse_patients_without_classes(table: pd.DataFrame, root: Path) -> None:
    """Refuse folders called like patients or parts beside folders of classes: they may be classes.

    Raises:
        BloodcellError: there are such folders.
    """
    labelled = table.reason == ""
    lone = {
        name
        for folders in set(table.folders[~labelled])
        for name in folders
        if _is_one_of(PATIENTS | SOURCES, name)
    } - {name for folders in set(table.folders[labelled]) for name in folders}
    if lone and labelled.any():
        raise DataError(
            f"The folders {some(lone)} of {root} are called like patients, slides or parts of a "
            f"data set and hold no folders of classes; {some(table.label[labelled])} look like "
            "classes.",
            "`classes_from=folder` takes the folder of each image for its class. If they are none, "
            "take them out of the data set.",
        )


def _layout_of(table: pd.DataFrame) -> str:
    if (table.group != "").any():
        return "folders of patients"
    parts = parts_of(table.subset)
    if (parts != "").any():
        return "subset folders"
    return "sets side by side" if (table.subset != "").any() else "class folders"


def _why_folders(table: pd.DataFrame, beside: bool) -> str:
    parts, groups = parts_of(table.subset), table.group[table.group != ""]
    said = [f"the folders {some(table.label)} are the classes"]
    subsets = table.subset[table.subset != ""]
    if beside:
        others = some(table.subset[parts != "train"])
        said.append(f"those beside {others} are for training")
    elif (parts != "").any():
        said.append(f"they are in {some(subsets)}")
    elif len(subsets):
        said.append(f"they are in {some(subsets)}, which are kept as subsets")
    if len(groups):
        said.append(
            f"{some(groups)} are taken for patients or slides, each of which stays on one side "
            "of the split"
        )
    return "; ".join(said)


def _warn_of_empty(files: Files) -> tuple[str, ...]:
    """Folders without a file where one of a class or a subset may be meant."""
    names = [path.relative_to(files.root) for path in files.empty if path != files.root]
    meant = [
        str(name)
        for name in names
        if not any(map(is_mask, name.parts)) and not _is_made_of(NEUTRAL, name.name)
    ]
    return (f"Empty folders, which add no class and no image: {some(meant)}.",) if meant else ()


def _warn_of_loose(left_out: Mapping[str, Sequence[Path]]) -> tuple[str, ...]:
    """Images directly in a training, validation or test set, and classes beside one."""
    return tuple(
        f"{len(paths):,} images are {reason}: they are not used."
        for reason, paths in left_out.items()
        if reason.startswith(("directly in ", "beside "))
    )
