"""Classes by a table beside the images."""

import io
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ...errors import DataError, MissingFileError
from ...files import decode_text
from ..images import IMAGE_SUFFIXES
from ..listed import ImageIndex
from ..public_sets import PUBLIC_SETS
from ..splits import subset_part
from .files import Files, LabelSource, Reading, some
from .folders import are_cells, parts_of, place_of
from .labels import fold_labels

TABLES = (".csv", ".tsv", ".xlsx", ".xls")
OWN_TABLES = {"photos.csv", "truth.csv", "split.csv", "predictions.csv", "history.csv"}
FILE_COLUMNS = {
    *("path", "file", "filename", "image", "imageid", "imagename", "imagepath", "img"),
    *("name", "id"),
}
LABEL_COLUMNS = {
    *("label", "labels", "class", "classes", "classlabel", "classlabels", "category"),
    *("categories", "celltype", "diagnosis", "target"),
}
SUBSET_COLUMNS = {"split", "subset", "set", "partition"}
PATIENT_COLUMNS = {
    *("patient", "patientid", "subject", "subjectid", "donor", "slide", "slideid", "smear"),
    *("case",),
}
TRUE = ("1", "1.0", "true")
BOX_COLUMNS = {"xmin", "ymin", "xmax", "ymax"}
CODED = {"classlabelsofdataset": "SSL-WBC"}  # public sets by how their tables are called
LARGEST_TABLE = 2**26  # bytes, of one that nobody named
MOST_CLASSES = 100  # in a column that nobody named


class Labels(NamedTuple):
    """What a table says.

    Attributes:
        table: see :class:`~bloodcell_fastai.data.layouts.files.Reading`; ``label`` is empty where
            the table gives none or several.
        unmatched: lines that match no image.
        columns: the columns of files and of labels.
    """

    table: pd.DataFrame
    unmatched: list[str]
    columns: tuple[str, str]


def read_label_table(files: Files, source: LabelSource) -> Reading | None:
    """Images, and a table with the label of each, or several tables."""
    read = label_tables(files, source)
    if not read:
        return None
    table = pd.concat([found.table for found in read.values()], ignore_index=True)
    names = some(read)
    clash = table.groupby("path").label.nunique() > 1
    if clash.any():
        raise DataError(
            f"{clash.sum():,} images have two labels in {names}, such as {clash.idxmax()}.",
            "Correct the tables, or name one: `labels=FILE`.",
        )
    table, listed = table.drop_duplicates("path"), set(table.path)
    table = _with_folders(table, files)
    nameless = table.label == ""
    aside = ~nameless & (table.subset != "") & (parts_of(table.subset) == "")
    left_out = {
        f"not in {names}": [path for path in files.images if str(path) not in listed],
        f"without a label, or with several, in {names}": list(map(Path, table.path[nameless])),
        f"neither for training, validation nor test in {names}": list(map(Path, table.path[aside])),
    }
    used = ~nameless & ~aside
    taken, folded = fold_labels(table[used], table.path[used])
    columns = {" and ".join(found.columns) for found in read.values()}
    return Reading(
        "label table",
        f"{names} tells the class of each image (columns {some(columns)})",
        taken.sort_values("path", ignore_index=True),
        left_out,
        folded
        + tuple(
            f"{name}: {len(found.unmatched):,} lines match no image, such as "
            f"{found.unmatched[0]!r}."
            for name, found in read.items()
            if found.unmatched
        ),
    )


def label_tables(files: Files, source: LabelSource) -> dict[str, Labels]:
    """What the tables of labels say, by their paths from the folder on."""
    if source.labels:
        named = Path(source.labels)
        tables = [named if named.is_file() else files.root / named]
    else:
        tables = [path for path in files.others if may_hold_labels(path)]
    return {
        os.path.relpath(path, files.root) if files.root in path.parents else path.name: found
        for path in tables
        if (found := _labels_in(path, files, source))
    }


def refuse_unmatched(files: Files) -> None:
    """Refuse what looks like a table of labels, but does not tell which images it means.

    Raises:
        BloodcellError: there is one with a column of names of images and a column of labels.
    """
    for path in filter(may_hold_labels, files.others):
        try:
            table = _read_table(path)
        except DataError:
            continue
        columns = [name for name in table if _plain(name) in FILE_COLUMNS]
        if len(columns) != 1 or sum(_plain(name) in LABEL_COLUMNS for name in table) != 1:
            continue
        listed = table[columns[0]]
        found = pd.Series(_find(listed, _images_of(path, files), path.parent), listed.index)
        are_names = listed.map(lambda cell: Path(cell.strip()).suffix.lower() in IMAGE_SUFFIXES)
        lost = listed[found.isna()]
        if are_names.all() and 2 * len(lost) >= len(listed) > 0:
            raise DataError(
                f"{path} looks like a table of labels, but {len(lost):,} of its {len(listed):,} "
                f"lines match no image, or several, such as {lost.iloc[0]!r}.",
                f"Write paths from {path.parent} on into the column {columns[0]}. "
                "`classes_from=folder` goes by the folders alone.",
            )


def may_hold_labels(path: Path) -> bool:
    """Whether a file may be a table of labels, by its name."""
    return (
        path.suffix.lower() in TABLES
        and path.name.lower() not in OWN_TABLES
        and "submission" not in path.name.lower()  # an example of one, on Kaggle
        and path.is_file()  # and no link to one that is gone
        and path.stat().st_size <= LARGEST_TABLE
    )


def _labels_in(path: Path, files: Files, source: LabelSource) -> Labels | None:
    """The labels in a table; None for one that nobody named and that holds none.

    Raises:
        BloodcellError: the table was named and cannot be read, or it is not clear which columns
            hold the files and the labels.
    """
    named = bool(source.labels)
    try:
        table = _read_table(path)
    except DataError:
        if named:
            raise
        return None
    if not named and {*map(_plain, table)} >= BOX_COLUMNS:
        raise DataError(
            f"{path} holds boxes around cells, of which an image may have many.",
            "Images of one white cell each are needed: cut the boxes out, into a folder per class. "
            f"If every image shows one cell: `labels={path.name}`.",
        )
    images = _images_of(path, files)
    numbered = [name for name in table if _plain(name) in FILE_COLUMNS]
    found = {
        name: _find(table[name], images, path.parent, by_number=numbered == [name])
        for name in table
    }
    file_column = _file_column(found)
    if file_column is None or (not named and 2 * found[file_column].count(None) > len(table)):
        if not named:
            return None
        raise DataError(
            f"{path.name} has the columns {some(table, 20)}; none names the images of "
            f"{files.root}.",
            "Is it the table of these images?",
        )
    label_column: str | None
    one_hot = _one_hot(table.drop(columns=[file_column, *_flags(table)]))
    if one_hot is not None and not source.label_column:
        label_column, labels = "of each class", one_hot
    else:
        label_column = _label_column(table.drop(columns=file_column), path, source)
        if label_column is None:
            return None
        labels = table[label_column].str.strip().map(_single_label)
    codes = _codes(path, set(labels))
    listed = pd.DataFrame(
        {
            "path": found[file_column],
            "label": labels.replace(codes),
            "subset": _subsets(table, path),
            "group": _column_of(table, PATIENT_COLUMNS, bool),
        }
    )
    matched = listed.path.notna()
    unmatched = list(table[file_column][~matched])
    return Labels(listed[matched], unmatched, (file_column, label_column))


def _read_table(path: Path) -> pd.DataFrame:
    """The cells of a table as text; the first line may be its header or not.

    Raises:
        BloodcellError: the file is missing, or is no table.
    """
    hint = "Give a CSV, TSV or Excel table with a column of files and one of labels."
    if not path.is_file():
        raise MissingFileError(f"No table {path}.", "Check `labels`.")
    options = {"dtype": str, "header": None, "keep_default_na": False}
    try:
        if path.suffix.lower() in (".xlsx", ".xls"):
            table = pd.read_excel(path, **options)
        else:
            text = io.StringIO(decode_text(path.read_bytes()))
            table = pd.read_csv(text, sep=None, engine="python", **options)
    except Exception as error:  # each reader of pandas raises its own
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} is no table that can be read: {reason}.", hint) from None
    header = list(table.iloc[0].str.strip())
    if any(Path(cell).suffix.lower() in IMAGE_SUFFIXES for cell in header):
        header = [f"column {number}" for number in range(1, len(header) + 1)]
    else:
        table = table.iloc[1:].reset_index(drop=True)
    names = [name or f"column {number}" for number, name in enumerate(header, start=1)]
    if len(set(names)) < len(names):
        raise DataError(f"{path} has two columns of one name.", hint)
    return table.set_axis(names, axis=1)


def _images_of(table: Path, files: Files) -> list[str]:
    """The images that a table may be about: those in the folder that its name ends with, else
    those below its own folder, else all."""
    own = _plain(table.stem)
    named = [path for path in files.images if own.endswith(_plain(path.parent.name))]
    below = [path for path in files.images if table.parent in path.parents]
    return list(map(str, named or below or files.images))


def _find(
    column: pd.Series, images: list[str], root: Path, by_number: bool = True
) -> list[str | None]:
    """The image that each cell of a column means: by its path or name, or, if all cells are numbers
    of images and ``by_number`` is true, by its number. Other numbers may count the rows, from 0."""
    index = ImageIndex(images, root)
    found = [index.find(cell) for cell in column]
    if all(found) or not column.str.fullmatch(r"\s*\d+\s*").all():
        return found
    numbers = [re.search(r"(\d+)\D*$", Path(path).stem) for path in images]
    numbered = {
        int(number[1]): path for number, path in zip(numbers, images, strict=True) if number
    }
    meant = [numbered.get(int(cell)) for cell in column]
    # A number may be of several images.
    fits = by_number and all(meant) and len(numbered) == len(images)
    return meant if fits else [None] * len(column)


def _file_column(found: Mapping[str, list[str | None]]) -> str | None:
    """The column most of whose cells name images; of several the one with a usual name."""
    named = {name: sum(each is not None for each in column) for name, column in found.items()}
    most = [name for name, n in named.items() if n and n == max(named.values())]
    return next((name for name in most if _plain(name) in FILE_COLUMNS), next(iter(most), None))


def _label_column(table: pd.DataFrame, path: Path, source: LabelSource) -> str | None:
    """The column asked for, else the only one with a usual name, else the only one with names of
    cells, else, in a table that was named or that has no header, the only one; None for none in a
    table that nobody named.

    Raises:
        BloodcellError: a named table has no such column, or several.
    """
    columns = f"{path.name} has the columns {some(table, 20)} beside the files"
    if source.label_column:
        if source.label_column not in table:
            raise DataError(
                f"{columns}, and none is called {source.label_column}.", "Change `label_column`."
            )
        return source.label_column
    usual = [name for name in table if _plain(name) in LABEL_COLUMNS]
    cells = [name for name in table if are_cells(set(table[name]))]
    several = [name for name in table if 1 < table[name].nunique() <= MOST_CLASSES]
    nameless = table.shape[1] == 1 and re.fullmatch(r"column \d+", table.columns[0])
    for choice in (usual, cells, several if source.labels or nameless else []):
        if len(choice) == 1:
            return choice[0]
    if not source.labels:
        return None
    raise DataError(
        f"{columns}; it is not clear which holds the classes.", "Say it: `label_column=NAME`."
    )


def _one_hot(table: pd.DataFrame) -> pd.Series | None:
    """The label of each row where every column is a class, with 1 in the one that holds."""
    if table.shape[1] < 2 or not table.isin(["0", "1", "0.0", "1.0"]).all(axis=None):
        return None
    hot = table.isin(["1", "1.0"])
    return hot.idxmax(axis=1).where(hot.sum(axis=1) == 1, "")


def _single_label(cell: str) -> str:
    """The label in a cell that may name that of several cells in one image; empty if they
    differ."""
    labels = {part.strip() for part in re.split("[,;|]", cell)} - {""}
    return labels.pop() if len(labels) == 1 else ""


def _column_of(table: pd.DataFrame, usual: set[str], fits: Callable[[str], bool]) -> pd.Series:
    """The column of a usual name with a cell that fits; else nothing for each row."""
    for name in table:
        if _plain(name) in usual and table[name].map(fits).any():
            return table[name].str.strip()
    return pd.Series("", index=table.index)


def _subsets(table: pd.DataFrame, path: Path) -> pd.Series:
    """The subset of each row: what a column says, or columns such as ``is_valid``, else the name of
    the table, as ``test.csv``."""
    subsets = _column_of(table, SUBSET_COLUMNS, lambda name: bool(subset_part(name)))
    flags = _flags(table)
    if (subsets == "").all() and flags:
        rest = "none" if "train" in flags.values() else "train"
        subsets = pd.Series(rest, index=table.index)
        for name, part in flags.items():
            subsets = subsets.mask(table[name].str.casefold().isin(TRUE), part)
    if (subsets == "").all():
        return subsets.mask(subsets == "", path.stem if subset_part(path.stem) else "")
    return subsets.where(subsets != "", "none")


def _flags(table: pd.DataFrame) -> dict[str, str]:
    """Columns such as ``is_valid`` that tell by true and false whether a row is of a subset, and
    which; fastai has such a column."""
    return {
        name: part
        for name in table
        if (part := subset_part(re.sub("(?i)^is[_ ]?", "", name)))
        and set(table[name].str.casefold()) <= {*TRUE, "0", "0.0", "false"}
    }


def _with_folders(table: pd.DataFrame, files: Files) -> pd.DataFrame:
    """The table with the subset and the patient that folders tell, where no table does."""
    folders = dict(zip(map(str, files.images), files.folders, strict=True))
    places = [place_of(folders[path]) for path in table.path]
    for name in ("subset", "group"):
        told = pd.Series([getattr(place, name) for place in places], index=table.index)
        if name == "subset":
            told = told.where(parts_of(told) != "", "")
        if (table[name] == "").all():
            table = table.assign(**{name: told})
    return table


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _codes(path: Path, labels: set[str]) -> Mapping[str, str]:
    """What numbers mean in the tables of a public set."""
    name = next((name for start, name in CODED.items() if _plain(path.stem).startswith(start)), "")
    codes = next((known.codes for known in PUBLIC_SETS if known.name == name), {})
    return codes if labels <= codes.keys() else {}
