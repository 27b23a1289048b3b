"""Which names of classes in one data set are spellings of one class."""

import re
import unicodedata

import pandas as pd

from ...errors import DataError
from ..class_names import known_cell
from .files import some


def fold_labels(table: pd.DataFrame, place: pd.Series) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """One spelling for each class that is spelt in several ways.

    Unicode is composed (NFC): macOS decomposes the letters of a file's name. Names that differ in
    case, blanks, number or abbreviation are one class if no place holds two of them.

    Args:
        table: with ``label``.
        place: of each image; one place holds each class once.

    Returns:
        The table, and what was taken for one class, a sentence each.

    Raises:
        BloodcellError: two names in one place differ in case and blanks alone.
    """
    said, composed = [], table.label.map(lambda name: unicodedata.normalize("NFC", name))
    if composed.nunique() < table.label.nunique():
        twice = sorted(set(composed[composed != table.label]))
        said.append(f"Two ways to write accents are taken for one class: {some(twice)}.")
    table = table.assign(label=composed)
    for key_of in (_without_case, known_cell):
        keys = {name: key_of(name) for name in set(table.label)}
        counts = table.label.value_counts()
        for key in sorted(set(keys.values()) - {""}):
            names = [name for name in counts.index if keys[name] == key]
            if len(names) == 1:
                continue
            rows = table.label.isin(names)
            if (table.label[rows].groupby(place[rows]).nunique() > 1).any():
                if key_of is known_cell:
                    continue
                raise DataError(
                    f"The classes {some(names)} differ in case and blanks alone.",
                    "Put their images into one folder, or rename one.",
                )
            said.append(f"{some(names)} are taken for one class, {names[0]}.")
            table = table.assign(label=table.label.where(~rows, names[0]))
    return table, tuple(said)


def _without_case(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.casefold()).strip()
