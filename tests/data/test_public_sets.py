"""The register of public sets: complete, well formed, and true to what the package knows."""

import re
import subprocess
import sys
from typing import get_args

import pytest

from bloodcell_fastai.data.class_names import SYNONYMS, match_classes
from bloodcell_fastai.data.demo import CLASSES
from bloodcell_fastai.data.public_sets import PUBLIC_SETS, LayoutName
from bloodcell_fastai.model.pretrained import DEFAULT_PRETRAINED, PRETRAINED

BY_NAME = {public.name: public for public in PUBLIC_SETS}
URL = r"https?://[\w.-]+\.[a-z]+/[\w.~%/-]*"
DOI = r"10\.\d{4,9}/[\w.()/-]*[\w)]"


def test_names_are_unique():
    names = [public.name.casefold() for public in PUBLIC_SETS]
    assert len(set(names)) == len(names) >= 15


@pytest.mark.parametrize("public", PUBLIC_SETS, ids=lambda public: public.name)
def test_an_entry_is_complete_and_well_formed(public):
    texts = (public.name, public.source, public.licence, public.citation, *public.classes)
    assert all(text and text == " ".join(text.split()) for text in texts)
    assert re.fullmatch(URL, public.source)
    assert public.layout in get_args(LayoutName)
    assert re.search(r"\b20[012]\d\b", public.citation), "no year"
    for doi in re.findall(r"doi:\s*(\S*)", public.citation):
        assert re.fullmatch(DOI, doi)
    if public.source.startswith("https://doi.org/"):
        assert re.fullmatch(DOI, public.source.removeprefix("https://doi.org/"))
    assert len(set(public.classes)) == len(public.classes) > 1
    assert not public.about or re.fullmatch(r"[A-Z`].*[.]", public.about)


@pytest.mark.parametrize("public", PUBLIC_SETS, ids=lambda public: public.name)
def test_codes_name_every_class_once_or_none(public):
    assert not public.codes or sorted(public.codes.values()) == sorted(public.classes)
    assert all(code and code == code.strip() for code in public.codes)


def test_what_the_numbers_of_the_tables_mean():
    assert list(BY_NAME["SSL-WBC"].codes.items()) == [
        *(("1", "neutrophil"), ("2", "lymphocyte"), ("3", "monocyte")),
        *(("4", "eosinophil"), ("5", "basophil")),
    ]
    assert BY_NAME["C-NMC 2019"].codes == {"0": "hem", "1": "all"}
    assert BY_NAME["ALL-IDB1"].codes == {"0": "healthy", "1": "ALL"}
    assert BY_NAME["ALL-IDB2"].codes == {"0": "healthy", "1": "lymphoblast"}
    numbered = enumerate(BY_NAME["BloodMNIST"].classes)
    assert BY_NAME["BloodMNIST"].codes == {str(code): name for code, name in numbered}


@pytest.mark.parametrize(
    "name",
    [
        *("Kaggle blood-cells", "Raabin-WBC", "PBC", "AML-Cytomorphology_LMU"),
        *("DeepBioNet", "SSL-WBC", "KRD-WBC", "BloodMNIST"),
    ],
)
def test_classes_of_these_sets_are_cells_the_package_knows(name):
    classes = BY_NAME[name].classes
    assert tuple(match_classes(tuple(SYNONYMS), classes).mapped) == classes


def test_the_sets_of_the_package_are_the_same_here():
    assert BY_NAME["Kaggle blood-cells"].classes == CLASSES
    (doi,) = re.findall(DOI, BY_NAME["PBC"].citation)
    assert doi in PRETRAINED[DEFAULT_PRETRAINED].citation


def test_blood_mnist_is_pbc_again():
    classes = BY_NAME["BloodMNIST"].classes
    match = match_classes(BY_NAME["PBC"].classes, classes)
    assert list(match.mapped.values()) == list(BY_NAME["PBC"].classes)


def test_the_module_imports_nothing_heavy():
    """A command that lists the sets, as --help, must not wait for torch or pandas."""
    code = "import sys, bloodcell_fastai.data.public_sets; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "fastai", "numpy", "pandas"} & set(done.stdout.split())
