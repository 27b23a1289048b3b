"""Names of blood cells in laboratories and data sets, and which of them mean the same cell.

The names are those of the ICSH recommendations for the nomenclature of blood cells (Palmer et al.
2015, Int J Lab Hematol 37:287-303). The abbreviations are those that haematology analysers print
and those of data sets:

- PBC (Acevedo et al. 2020, Data in Brief 30:105474): SNE, BNE, PMY, MY, MMY, ERB ... in the file
  names; BloodMNIST, which is made of it, writes out what an immature granulocyte is.
- AML-Cytomorphology_LMU (Matek et al. 2019, Nature Machine Intelligence 1:538-544): NGS, NGB, LYT,
  MON, EBO, MMZ ...; BLA is the blast of the bone marrow set of the same laboratory (Matek et al.
  2021, Blood 138:1917-1927).
- LISC (Rezatofighi and Soltanian-Zadeh 2011, Comput Med Imaging Graph 35:333-343): Baso, eosi,
  lymp, mono, neut.

Left out, because a folder of that name is more often something else, or because it means two
cells: IMG (an analyser's immature granulocyte, everybody's image); SEG and the bare word segmented
in English, French, Italian, Portuguese and Spanish (a folder of masks); ERY (an erythrocyte or an
erythroblast); MYELO (a myelocyte or a myeloblast); the French word polynucléaire and the German
Granulozyt alone (any granulocyte); single letters. MYB and MYO mean what the set from Munich means
by them, a myelocyte and a myeloblast.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unicodedata import category, normalize

SYNONYMS = {
    "neutrophil": (
        *("NE", "NEU", "NEUT", "NEUTRO", "PMN", "poly"),
        *("neutrophilic", "polymorphonuclear", "polymorphonuclear neutrophil"),
        "PNN",  # French, polynucléaire neutrophile
        "neutrófilo",  # Italian, Portuguese, Spanish
        "nötrofil",  # Turkish
        *("中性粒细胞", "嗜中性粒细胞", "嗜中性球", "嗜中性白血球"),
    ),
    "segmented neutrophil": (
        *("SNE", "NGS", "segs", "segmented granulocyte"),
        *("Segmentkerniger", "segmentkerniger Neutrophiler"),  # German
        "neutrophile segmenté",  # French
        *("neutrófilo segmentado", "neutrofilo segmentato"),  # Portuguese and Spanish, Italian
        *("parçalı", "parçalılar", "parçalı nötrofil"),  # Turkish  # noqa: RUF001
        *("分叶核", "分叶核粒细胞", "中性分叶核粒细胞", "分叶核中性粒细胞", "分叶核嗜中性球"),
    ),
    "band neutrophil": (
        *("BNE", "NGB", "band", "stab", "stab neutrophil"),
        *("Stabkerniger", "stabkerniger Neutrophiler"),  # German
        "neutrophile non segmenté",  # French
        *("banda", "neutrófilo banda"),  # Italian, Portuguese, Spanish
        *("neutrofilo a banda", "neutrofilo a bastoncello"),  # Italian
        *("bastão", "bastões", "bastonete"),  # Portuguese
        *("neutrófilo bastonete", "neutrófilo em banda"),  # Portuguese
        *("cayado", "abastonado", "neutrófilo cayado", "neutrófilo abastonado"),  # Spanish
        *("en banda", "neutrófilo en banda"),  # Spanish
        *("çomak", "çomak nötrofil"),  # Turkish
        *("杆状核", "杆状核粒细胞", "中性杆状核粒细胞", "杆状核中性粒细胞"),
        *("带状核", "带状核嗜中性球"),
    ),
    "eosinophil": (
        *("EO", "EOS", "EOSI", "EOSINO", "eosinophilic"),
        "PNE",  # French, polynucléaire éosinophile
        "eosinófilo",  # Italian, Portuguese, Spanish
        "eozinofil",  # Turkish
        *("嗜酸性粒细胞", "嗜酸粒细胞", "嗜酸性球", "嗜伊红性球"),
    ),
    "basophil": (
        *("BA", "BAS", "BASO", "basophilic"),
        "PNB",  # French, polynucléaire basophile
        "basófilo",  # Italian, Portuguese, Spanish
        "bazofil",  # Turkish
        *("嗜碱性粒细胞", "嗜碱粒细胞", "嗜碱性球"),
    ),
    "lymphocyte": (
        *("LY", "LYM", "LYMP", "LYMPH", "LYMPHO", "LYT", "typical lymphocyte"),
        *("small lymphocyte", "large lymphocyte", "small lymph", "large lymph"),
        "Lymphozyt",  # German
        "linfocito",  # Italian, Portuguese, Spanish
        "lenfosit",  # Turkish
        *("淋巴细胞", "淋巴球"),
    ),
    "atypical lymphocyte": (
        *("LYA", "reactive lymphocyte", "variant lymphocyte"),
        *("atypischer Lymphozyt", "reaktiver Lymphozyt", "lymphatische Reizform"),  # German
        *("lymphocyte atypique", "lymphocyte réactionnel", "lymphocyte hyperbasophile"),  # French
        *("linfocito atipico", "linfocito reattivo"),  # Italian; atípico Portuguese and Spanish too
        *("linfócito reativo", "linfocito reactivo"),  # Portuguese, Spanish
        *("atipik lenfosit", "reaktif lenfosit"),  # Turkish
        *("异型淋巴细胞", "异形淋巴细胞", "反应性淋巴细胞", "非典型淋巴细胞", "非典型淋巴球"),
    ),
    "monocyte": (
        *("MO", "MON", "MONO"),
        "Monozyt",  # German
        "monocito",  # Portuguese, Spanish; Italian monocita
        "monosit",  # Turkish
        *("单核细胞", "单核球"),
    ),
    "immature granulocyte": (
        *("IG", "IG (immature granulocytes)"),
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
        "unreifer Granulozyt",  # German
        *("granulocito immaturo", "granulócito imaturo", "granulocito inmaduro"),  # it, pt, es
        *("immatür granülosit", "olgunlaşmamış granülosit"),  # Turkish  # noqa: RUF001
        *("未成熟粒细胞", "幼稚粒细胞"),
    ),
    "promyelocyte": (
        *("PMY", "PMO"),
        "Promyelozyt",  # German
        "promielocito",  # Italian, Portuguese, Spanish
        "promiyelosit",  # Turkish
        "早幼粒细胞",
    ),
    "bilobed promyelocyte": ("PMB", "Promyelocyte (bilobled)"),  # so in AML-Cytomorphology_LMU
    "myelocyte": (
        *("MY", "MYB"),
        "Myelozyt",  # German
        "mielocito",  # Italian, Portuguese, Spanish
        "miyelosit",  # Turkish
        *("中幼粒细胞", "中性中幼粒细胞"),
    ),
    "metamyelocyte": (
        *("MMY", "MMZ", "META"),
        "Metamyelozyt",  # German
        "metamielocito",  # Italian, Portuguese, Spanish
        "metamiyelosit",  # Turkish
        *("晚幼粒细胞", "中性晚幼粒细胞"),
    ),
    "blast": (
        "BLA",
        "Blasten",  # German, plural
        "blaste",  # French
        *("blasto", "blasti"),  # Italian, Portuguese and Spanish; Italian plural
        "blastlar",  # Turkish, plural
        "原始细胞",
    ),
    "myeloblast": (
        "MYO",
        "mieloblasto",  # Italian, Portuguese, Spanish
        "miyeloblast",  # Turkish
        *("原始粒细胞", "原粒细胞"),
    ),
    "monoblast": ("MOB", "原始单核细胞"),
    "erythroblast": (
        *("ERB", "EBO", "NRBC", "normoblast", "nucleated red blood cell"),
        "eritroblasto",  # Italian, Portuguese, Spanish; Turkish eritroblast
        "çekirdekli eritrosit",  # Turkish
        *("有核红细胞", "幼红细胞", "有核红血球"),
    ),
    "erythrocyte": (
        *("RBC", "red blood cell", "red cell"),
        "Erythrozyt",  # German
        *("hématie", "globule rouge"),  # French; hematíe Spanish
        *("eritrocito", "hemácia"),  # Italian, Portuguese and Spanish; Portuguese
        "eritrosit",  # Turkish
        *("红细胞", "红血球"),
    ),
    "platelet": (
        *("PLT", "thrombocyte"),
        *("Thrombozyt", "Blutplättchen"),  # German
        "plaquette",  # French
        *("plaqueta", "trombocito"),  # Portuguese, Spanish
        "piastrina",  # Italian
        "trombosit",  # Turkish
        "血小板",
    ),
    "smudge cell": ("KSC", "smudge"),
}
"""Names of the cells and their synonyms.

A name stands once: case, accents, the order of the words and the usual endings do not count, so
that *eosinophil* is also German *Eosinophiler* and French *éosinophiles*, and *neutrófilo* is also
Italian *neutrofili*. Nor does the word cell or granulocyte beside another. Chinese is written in
simplified characters; traditional ones are read as these.
"""

PART_OF = {
    "segmented neutrophil": "neutrophil",
    "band neutrophil": "neutrophil",
    "promyelocyte": "immature granulocyte",
    "bilobed promyelocyte": "promyelocyte",
    "myelocyte": "immature granulocyte",
    "metamyelocyte": "immature granulocyte",
    "myeloblast": "blast",
    "monoblast": "blast",
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

    Names agree where they are the same :func:`known_cell`. A cell that the model has no class for
    counts as the kind it is part of, as a metamyelocyte as an immature granulocyte. Names outside
    the table agree with themselves alone, whatever their case, plural and order of words.
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


def known_cell(name: str) -> str:
    """The cell that a class of a data set is named after, as :data:`SYNONYMS` calls it.

    The words of the name, in any order, must be one of the cell's names: nothing else may stand
    there but numbers and what says nothing about the cell, as in ``01_neutrophils``,
    ``lymphocyte (2)`` and ``train_EOSINOPHIL_aug``. A number must be a word of its own: it
    numbers the class, while CD4 is a name.

    Returns:
        The English name, such as "band neutrophil" for ``Stabkernige``; "" where the table does
        not know it.
    """
    words = frozenset(_stem(word) for word in _words(name) if not word.isdecimal()) - _IDLE
    return _NAMES.get(words) or _NAMES.get(words - _GENERIC, "")


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
    words = sorted(word for word in _words(name) if word != "cell")
    return known_cell(name) or " ".join(words) or name


def _words(name: str) -> list[str]:
    """The words of a name in the singular, without case and accents."""
    # The accents of Latin, Greek and Cyrillic alone: in other scripts the marks are vowels.
    text = re.sub("[\u0300-\u036f]", "", normalize("NFKD", name))
    text = re.sub("(?<=[a-z])(?=[A-Z][a-z])", " ", text)  # SegmentedNeutrophil
    text = re.sub("(?<=[A-Z])s(?![A-Za-z])", "", text)  # RBCs
    text = text.casefold().translate(_LETTERS)
    # A plus is a letter: CD34+ is not CD34.
    text = "".join(c if c == "+" or category(c)[0] in "LMN" else " " for c in text)
    return [re.sub("(?<=.{4})s$", "", word) for word in text.split()]


def _stem(word: str) -> str:
    """A word without the endings that differ between singular and plural and between languages.

    They are those of German (-e, -en, -er), French (-e), Italian, Portuguese and Spanish (-a, -e,
    -i, -o) and Turkish (-lar, -ler: lenfositler, but not German Basophiler).
    """
    return re.sub("(?<=.{6})(?:e[nr]?|[aio]|(?<=[lt])l[ae]r)$", "", word)


def _stems(*names: str) -> frozenset[str]:
    return frozenset(_stem(word) for name in names for word in _words(name))


_LETTERS = str.maketrans("ı細單紅葉桿狀異鹼堿帶應", "i细单红叶杆状异碱碱带应")
"""The Turkish dotless i, and the traditional characters of the table as simplified ones."""

_IDLE = _stems(
    *("aug", "augmented", "copy", "crop", "cropped", "dataset", "folder", "image", "img"),
    *("train", "training", "test", "testing", "val", "valid", "validation"),
)
"""Words that say nothing about the cell."""

_GENERIC = _stems(
    *("cell", "granulocyte", "leukocyte", "leucocyte"),
    *("Zelle", "Zellen", "Granulozyt", "Leukozyt"),  # German
    *("cellule", "polynucléaire"),  # French
    *("cellula", "célula", "granulocito", "leucocito"),  # Italian, Portuguese, Spanish
    *("hücre", "hücresi", "hücreler", "hücreleri", "granülosit", "lökosit"),  # Turkish
)
"""Words that may stand beside the kind of cell, as in basophil granulocyte, or be left out."""

_NAMES = {_stems(word): name for name, others in SYNONYMS.items() for word in (name, *others)}
