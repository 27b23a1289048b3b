"""Names of blood cells in laboratories and data sets, and which of them mean the same cell.

The names are those of the ICSH recommendations for the nomenclature of blood cells (Palmer et al.
2015). The abbreviations are those that haematology analysers print and those of two data sets: PBC
(Acevedo et al. 2020, Data in Brief 30:105474), with SNE, BNE, PMY, MY, MMY, ERB ... in the file
names, and AML-Cytomorphology_LMU (Matek et al. 2019, Nature Machine Intelligence 1:538-544), with
NGS, NGB, LYT, MON, EBO, MMZ ...
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SYNONYMS = {
    "neutrophil": (
        *("NE", "NEU", "NEUT", "PMN", "poly", "neutrophil granulocyte"),
        *("neutrophilic granulocyte", "polymorphonuclear neutrophil"),
    ),
    "segmented neutrophil": ("SNE", "NGS", "SEG", "segmented", "segmented granulocyte"),
    "band neutrophil": ("BNE", "NGB", "band", "stab", "stab neutrophil"),
    "eosinophil": ("EO", "EOSINO", "eosinophil granulocyte", "eosinophilic granulocyte"),
    "basophil": ("BA", "BASO", "basophil granulocyte", "basophilic granulocyte"),
    "lymphocyte": ("LY", "LYM", "LYMPH", "LYMPHO", "LYT", "typical lymphocyte"),
    "atypical lymphocyte": ("LYA",),
    "monocyte": ("MO", "MON", "MONO"),
    "immature granulocyte": ("IG", "IMG"),
    "promyelocyte": ("PMY", "PMO"),
    "bilobed promyelocyte": ("PMB",),
    "myelocyte": ("MY", "MYB"),
    "metamyelocyte": ("MMY", "MMZ", "META"),
    "myeloblast": ("MYO",),
    "monoblast": ("MOB",),
    "erythroblast": ("ERB", "EBO", "NRBC", "normoblast", "nucleated red blood cell"),
    "erythrocyte": ("RBC", "red blood cell", "red cell"),
    "platelet": ("PLT", "thrombocyte"),
    "smudge cell": ("KSC",),
}
"""Names of the cells and their synonyms."""

PART_OF = {
    "segmented neutrophil": "neutrophil",
    "band neutrophil": "neutrophil",
    "promyelocyte": "immature granulocyte",
    "bilobed promyelocyte": "promyelocyte",
    "myelocyte": "immature granulocyte",
    "metamyelocyte": "immature granulocyte",
}
"""Cells that are a kind of another."""


@dataclass(frozen=True)
class ClassMatch:
    """The classes of a data set beside those of a model.

    Attributes:
        mapped: the model's class of each class of the data that has one.
        unknown: classes of the data that the model does not know.
        too_broad: classes of the data of which the model knows several parts, so that an image
            of one has no single right prediction.
        missing: classes of the model that the data lack.
    """

    mapped: dict[str, str]
    unknown: tuple[str, ...]
    too_broad: tuple[str, ...]
    missing: tuple[str, ...]


def match_classes(classes: Sequence[str], theirs: Sequence[str]) -> ClassMatch:
    """Which class of a model (``classes``) each class of a data set (``theirs``) is.

    Names agree whatever their case, number and order of words, or by :data:`SYNONYMS`. A cell
    that the model has no class for counts as the kind it is part of, as a metamyelocyte as an
    immature granulocyte. Names outside the table agree with themselves alone.
    """
    mapped = {name: own for name in theirs if (own := _counterpart(name, classes))}
    left = [name for name in theirs if name not in mapped]
    known = {kind for name in classes for kind in _kinds(name)}
    return ClassMatch(
        mapped,
        unknown=tuple(name for name in left if _cell(name) not in known),
        too_broad=tuple(name for name in left if _cell(name) in known),
        missing=tuple(name for name in classes if name not in mapped.values()),
    )


def _counterpart(name: str, classes: Sequence[str]) -> str | None:
    """The model's class for ``name``; None where there is none, or more than one."""
    if name in classes:
        return name
    for kind in _kinds(name):
        same = [own for own in classes if _cell(own) == kind]
        if same:
            return same[0] if len(same) == 1 else None
    return None


def _kinds(name: str) -> Iterator[str]:
    """The cell a name means, and the ever broader kinds it is part of."""
    kind: str | None = _cell(name)
    while kind:
        yield kind
        kind = PART_OF.get(kind)


def _cell(name: str) -> str:
    """The name of the table for a cell; the words themselves if the table lacks it."""
    words = _words(name)
    return _NAMES.get(words) or " ".join(sorted(words)) or name


def _words(name: str) -> frozenset[str]:
    """The words of a name, in the singular, without their order and case."""
    words = (word.removesuffix("s") for word in re.split(r"[\W_]+", name.casefold()))
    return frozenset(words) - {"", "cell"}


_NAMES = {_words(word): name for name, others in SYNONYMS.items() for word in (name, *others)}
