import pytest

from bloodcell_fastai.data.class_names import PART_OF, SYNONYMS, match_classes

KAGGLE = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")
PBC = (
    *("basophil", "eosinophil", "erythroblast", "ig"),
    *("lymphocyte", "monocyte", "neutrophil", "platelet"),
)


def test_a_model_of_kaggle_on_pbc():
    match = match_classes(KAGGLE, PBC)
    assert match.mapped == {name.lower(): name for name in KAGGLE}
    assert match.unknown == ("basophil", "erythroblast", "ig", "platelet")
    assert (match.missing, match.too_broad) == ((), ())


def test_a_model_of_pbc_on_kaggle():
    match = match_classes(PBC, KAGGLE)
    assert match.mapped == {name: name.lower() for name in KAGGLE}
    assert match.missing == ("basophil", "erythroblast", "ig", "platelet")
    assert (match.unknown, match.too_broad) == ((), ())


@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        ("NEU", "neutrophil"),
        ("Neutrophils", "neutrophil"),
        ("segmented neutrophils", "neutrophil"),
        ("neutrophils_segmented", "neutrophil"),
        ("SNE", "neutrophil"),
        ("BNE", "neutrophil"),
        ("NGS", "neutrophil"),
        ("EO", "eosinophil"),
        ("EOS", "eosinophil"),
        ("Lymphocyte (typical)", "lymphocyte"),
        ("LYT", "lymphocyte"),
        ("lymphs", "lymphocyte"),
        ("MO", "monocyte"),
        ("Mon", "monocyte"),
        ("BA", "basophil"),
        ("BAS", "basophil"),
        ("IG", "ig"),
        ("Immature-Granulocytes", "ig"),
        ("metamyelocyte", "ig"),
        ("MMY", "ig"),
        ("PMY", "ig"),
        ("PMB", "ig"),  # a promyelocyte, and so an immature granulocyte
        ("ERB", "erythroblast"),
        ("nRBCs", "erythroblast"),
        ("Nucleated red blood cells", "erythroblast"),
        ("normoblasts", "erythroblast"),
        ("PLT", "platelet"),
        ("Thrombocytes", "platelet"),
    ],
)
def test_what_one_cell_is_called(theirs, own):
    assert match_classes(PBC, [theirs]).mapped == {theirs: own}


@pytest.mark.parametrize(
    "name", ["RBC", "myeloblast", "LYA", "atypical lymphocyte", "smudge cell", "artefact", "???"]
)
def test_other_things_are_unknown(name):
    match = match_classes(PBC, [name])
    assert match.unknown == (name,)
    assert match.missing == PBC


def test_parts_count_as_the_whole_only_where_the_model_has_no_better_class():
    assert match_classes(KAGGLE, ["metamyelocyte"]).unknown == ("metamyelocyte",)
    fine = ("band neutrophil", "segmented neutrophil", "metamyelocyte", "ig")
    match = match_classes(fine, ["BNE", "MMZ", "myelocyte", "neutrophil"])
    assert match.mapped == {
        "BNE": "band neutrophil",
        "MMZ": "metamyelocyte",
        "myelocyte": "ig",
    }
    assert match.too_broad == ("neutrophil",)  # neither of its two parts is the right class
    assert match.missing == ("segmented neutrophil",)


def test_names_outside_the_table_agree_with_themselves():
    match = match_classes(("cell A", "第一", "++"), ["A", "CELL_A", "第一", "++", "--"])
    assert match.mapped["CELL_A"] == "cell A"
    assert match.mapped["第一"] == "第一"
    assert match.mapped["++"] == "++"
    assert match.unknown == ("--",)


def test_of_two_classes_of_one_name_the_exact_one_is_meant():
    twice = ("NEU", "neutrophils")
    assert match_classes(twice, ["NEU", "neutrophil"]).mapped == {"NEU": "NEU"}
    assert match_classes(twice, ["neutrophil"]).too_broad == ("neutrophil",)


def test_no_name_of_the_table_means_two_cells():
    names = [word for name, others in SYNONYMS.items() for word in (name, *others)]
    for word in names:
        own = next(name for name, others in SYNONYMS.items() if word in (name, *others))
        assert match_classes(list(SYNONYMS), [word]).mapped == {word: own}
    assert {*PART_OF, *PART_OF.values()} <= set(SYNONYMS)
