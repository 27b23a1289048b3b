"""Classes by the names of files."""

import re

import pandas as pd

from ..class_names import known_cell
from ..public_sets import PUBLIC_SETS
from .files import Files, LabelSource, Reading, as_text, some
from .folders import place_of


def read_names(files: Files, source: LabelSource) -> Reading | None:
    """Labels in the names of files: the letters these begin with, or ALL-IDB's last number."""
    stems = [path.stem for path in files.images]
    if are_all_idb(files):
        single_cells = all(path.suffix.lower() in (".tif", ".tiff") for path in files.images)
        name = "ALL-IDB2" if single_cells else "ALL-IDB1"
        codes = next(known.codes for known in PUBLIC_SETS if known.name == name)
        labels = [codes[stem[-1]] for stem in stems]
        why = f"file names end in _0 or _1, as those of {name}"
    else:
        starts = [re.match(r"[^\W\d_]+(?:[ -][^\W\d_]+)*", stem) for stem in stems]
        labels = [start[0] if start else "" for start in starts]
        why = f"file names begin with {some(filter(None, labels))}"
        if source.classes_from == "auto" and not all(map(known_cell, labels)):
            return None
    table = pd.DataFrame({"path": files.images, "label": labels, "subset": "", "group": ""})
    table["subset"] = [place_of(folders).subset for folders in files.folders]
    named = table.label != ""
    return Reading(
        "names", why, as_text(table[named]), {"of other names": list(table.path[~named])}
    )


def are_all_idb(files: Files) -> bool:
    """Whether all images are called as those of ALL-IDB."""
    return all(re.fullmatch(r"Im\d+_[01]", path.stem, re.IGNORECASE) for path in files.images)
