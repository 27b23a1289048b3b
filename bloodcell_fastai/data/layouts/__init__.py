"""From the files below a folder to labelled images: one reader per layout, in a registry.

A reader goes by the names of folders and files, and by tables of labels beside them. What it cannot
decide it refuses, with the option that decides it.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import DataError
from ..public_sets import PUBLIC_SETS, LayoutName, PublicSet
from .boxes import refuse_boxes
from .files import Files, LabelSource, Reading, describe_left_out, some
from .folders import are_cells, parts_of, read_folders
from .names import are_all_idb, read_names
from .tables import label_tables, may_hold_labels, read_label_table, refuse_unmatched

Reader = Callable[[Files, LabelSource], Reading | None]


@dataclass(frozen=True)
class Layout:
    """A way to lay out a data set.

    Attributes:
        name: what it is called.
        example: of its files.
        read: its reader, which returns None for files in another layout.
    """

    name: LayoutName
    example: str
    read: Reader

    @property
    def public_sets(self) -> list[PublicSet]:
        """The public sets in this layout."""
        return [known for known in PUBLIC_SETS if known.layout == self.name]


LAYOUTS = (
    Layout("class folders", "CLASS/image.jpg", read_folders),
    Layout("subset folders", "train/CLASS/image.jpg, test/CLASS/image.jpg", read_folders),
    Layout("folders of patients", "patient01/CLASS/image.jpg", read_folders),
    Layout("sets side by side", "HOSPITAL/CLASS/image.jpg", read_folders),
    Layout("label table", "images/image.jpg, labels.csv", read_label_table),
    Layout("names", "Neutrophil_1.jpg", read_names),
    # Written out as folders before it is read, as an archive is.
    Layout("arrays", "bloodmnist.npz", read_folders),
    Layout("boxes", "JPEGImages/image.jpg, Annotations/image.xml", refuse_boxes),
)
"""The layouts that are recognised, in the order in which they are tried."""


def read_layout(root: Path, source: LabelSource, skip: Iterable[Path] = ()) -> Reading:
    """The labelled images below a folder, by the reader that recognises its layout.

    Args:
        root: the folder.
        source: what the user has said.
        skip: folders below it to pass over.

    Raises:
        BloodcellError: there are no images, fewer than two classes, or more than one way to tell
            the classes; the message says what was found.
    """
    files = Files.below(root, skip)
    if not files.images:
        found = describe_left_out(files.left_out, root)
        raise DataError(
            " ".join((f"No images in {root}.", *found)),
            "It should hold one folder of images per class.",
        )
    if source.labels:
        readers: tuple[Reader, ...] = (read_label_table,)
    elif source.classes_from == "name":
        readers = (read_names,)
    elif source.classes_from in ("folder", "parent"):
        readers = (read_folders,)
    elif are_all_idb(files):
        readers = (read_names,)
    else:
        readers = tuple(dict.fromkeys(layout.read for layout in LAYOUTS))
    first = None
    for read in readers:
        reading = read(files, source)
        first = first or reading
        if reading is not None and reading.table.label.nunique() > 1:
            break
    else:
        if source == LabelSource():
            refuse_unmatched(files)
        raise _no_classes(files, first)
    warnings = reading.warnings + _warn_of_shared(reading)
    if read is read_folders and source.classes_from == "auto":
        warnings += _compare_with_table(files, reading, source)
    left_out = {why: paths for why, paths in (reading.left_out | files.left_out).items() if paths}
    return replace(reading, left_out=left_out, warnings=warnings)


def _no_classes(files: Files, found: Reading | None) -> DataError:
    """The error for a folder with fewer than two classes."""
    if found is not None and found.table.label.nunique() == 1:
        return DataError(
            f"Only one class in {files.root}: {found.table.label.iloc[0]}.",
            "Give a folder with one sub-folder per class, two or more.",
        )
    left_out = {"in no folder of a class": files.images} | files.left_out
    tables = [path.name for path in files.others if may_hold_labels(path)]
    table = f" or `labels={tables[0]}`" if tables else ""
    return DataError(
        " ".join((f"No classes in {files.root}.", *describe_left_out(left_out, files.root))),
        "Give a folder with one sub-folder per class, or say where the classes are: "
        f"`classes_from=folder`, `classes_from=name`{table}.",
    )


def _warn_of_shared(reading: Reading) -> tuple[str, ...]:
    """Patients that the folders or the table have both in the training and in the test set."""
    known = reading.table[reading.table.group != ""]
    parts = parts_of(known.subset)
    shared = parts[parts != ""].groupby(known.group).nunique() > 1
    if not shared.any():
        return ()
    return (
        f"{some(shared.index[shared])}: in the training set and in that for validation or the end. "
        "If these are the same patients, the score is too good.",
    )


def _compare_with_table(files: Files, reading: Reading, source: LabelSource) -> tuple[str, ...]:
    """A warning if a table beside folders of cells gives other classes.

    Raises:
        BloodcellError: there is a table of labels beside folders without the names of cells, which
            gives other classes or does not tell which images it means.
    """
    other = None
    with suppress(DataError):  # of tables that are not needed
        other = read_label_table(files, source)
    cells = are_cells(set(reading.table.label))
    if other is None:
        if not cells:
            refuse_unmatched(files)
        return ()
    both = reading.table.merge(other.table, on="path", suffixes=("", "_table"))
    pairs = both[["label", "label_table"]].drop_duplicates()
    if not pairs.label.duplicated().any() and not pairs.label_table.duplicated().any():
        return ()
    name = next(iter(label_tables(files, source)))
    if cells:
        return (f"{name} gives other classes than the folders, which are taken: {other.why}.",)
    raise DataError(
        f"The folders {some(reading.table.label)} of {files.root} and the table {name} tell "
        "different classes.",
        f"Say which: `classes_from=folder` or `labels={name}`.",
    )
