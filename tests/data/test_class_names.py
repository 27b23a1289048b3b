from unicodedata import normalize

import pytest

from bloodcell_fastai.data.class_names import PART_OF, SYNONYMS, known_cell, match_classes

KAGGLE = ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")
PBC = (
    *("basophil", "eosinophil", "erythroblast", "ig"),
    *("lymphocyte", "monocyte", "neutrophil", "platelet"),
)

LANGUAGES = {
    "English": {
        "basophil": "Basophils, basophilic granulocyte, basophil cells, BASO",
        "eosinophil": "Eosinophils, eosinophil granulocytes, eosi, Eosino, EO",
        "erythroblast": "Erythroblasts, normoblast, nucleated red blood cells, nRBCs, NRBC",
        "immature granulocyte": "Immature granulocytes, IG",
        "lymphocyte": "Lymphocytes, typical lymphocyte, large lymph, lymphs, lymph, lymp, lympho",
        "monocyte": "Monocytes, mono, MO",
        "neutrophil": "Neutrophils, neutrophil leukocyte, neut, neutro, PMNs, polymorphonuclear",
        "segmented neutrophil": "segmented neutrophils, Neutrophil (segmented), segs",
        "band neutrophil": "band neutrophils, neutrophil_band, bands, band cell, stabs, stab cells",
        "metamyelocyte": "Metamyelocytes, meta",
        "myelocyte": "Myelocytes",
        "promyelocyte": "Promyelocytes",
        "blast": "Blasts, blast cells",
        "atypical lymphocyte": "atypical lymphocytes, reactive lymphocyte, Lymphocyte (variant)",
        "platelet": "Platelets, thrombocytes, PLT",
        "erythrocyte": "Red blood cells, RBCs, erythrocytes",
    },
    "German": {
        "basophil": "Basophiler, Basophile Granulozyten",
        "eosinophil": "Eosinophile, eosinophiler Granulozyt, eosinophilen Granulozyten",
        "erythroblast": "Erythroblasten, Normoblast",
        "immature granulocyte": "unreife Granulozyten",
        "lymphocyte": "Lymphozyt, LYMPHOZYTEN",
        "monocyte": "Monozyten",
        "neutrophil": "Neutrophile, neutrophiler Granulozyt",
        "segmented neutrophil": "Segmentkernige, segmentkerniger neutrophiler Granulozyt",
        "band neutrophil": "Stabkerniger, stabkernige Granulozyten, Stabkernige Neutrophile",
        "metamyelocyte": "Metamyelozyten",
        "myelocyte": "Myelozyt",
        "promyelocyte": "Promyelozyten",
        "blast": "Blasten, Blast",
        "atypical lymphocyte": "atypische Lymphozyten, reaktiver Lymphozyt, lymphatische Reizform",
        "platelet": "Thrombozyten, Blutplättchen",
    },
    "French": {
        "basophil": "polynucléaires basophiles, PNB",
        "eosinophil": "éosinophile, Polynucléaire éosinophile, PNE",
        "erythroblast": "érythroblastes",
        "immature granulocyte": "granulocytes immatures",
        "lymphocyte": "lymphocytes",
        "monocyte": "monocytes",
        "neutrophil": "neutrophiles, polynucléaire neutrophile, PNN",
        "segmented neutrophil": "polynucléaires neutrophiles segmentés",
        "band neutrophil": "neutrophiles non segmentés",
        "metamyelocyte": "métamyélocytes",
        "myelocyte": "myélocyte",
        "promyelocyte": "promyélocytes",
        "blast": "blastes",
        "atypical lymphocyte": "lymphocyte atypique, lymphocytes hyperbasophiles",
        "platelet": "plaquettes, thrombocyte",
    },
    "Italian": {
        "basophil": "basofilo, granulociti basofili",
        "eosinophil": "eosinofili, granulocita eosinofilo",
        "erythroblast": "eritroblasti",
        "immature granulocyte": "granulociti immaturi",
        "lymphocyte": "linfocito, linfociti, linfocita",
        "monocyte": "monocita, monociti",
        "neutrophil": "neutrofili, granulociti neutrofili",
        "segmented neutrophil": "neutrofili segmentati",
        "band neutrophil": "neutrofili a banda, neutrofilo a bastoncello",
        "metamyelocyte": "metamielociti",
        "myelocyte": "mielocita",
        "promyelocyte": "promielociti",
        "blast": "blasti",
        "atypical lymphocyte": "linfociti atipici, linfocito reattivo",
        "platelet": "piastrine",
    },
    "Portuguese": {
        "basophil": "basófilo",
        "eosinophil": "eosinófilos",
        "erythroblast": "eritroblastos",
        "immature granulocyte": "granulócitos imaturos",
        "lymphocyte": "linfócitos",
        "monocyte": "monócito",
        "neutrophil": "neutrófilos",
        "segmented neutrophil": "neutrófilos segmentados",
        "band neutrophil": "bastonetes, bastão, bastões, neutrófilos em banda",
        "metamyelocyte": "metamielócitos",
        "myelocyte": "mielócito",
        "promyelocyte": "promielócitos",
        "blast": "blastos",
        "atypical lymphocyte": "linfócitos atípicos, linfócito reativo",
        "platelet": "plaquetas",
    },
    "Spanish": {
        "basophil": "basófilos",
        "eosinophil": "eosinófilo, granulocito eosinófilo",
        "erythroblast": "eritroblasto",
        "immature granulocyte": "granulocitos inmaduros",
        "lymphocyte": "linfocito, LINFOCITOS, célula linfocito",
        "monocyte": "monocitos",
        "neutrophil": "neutrófilo",
        "segmented neutrophil": "neutrófilo segmentado",
        "band neutrophil": "cayados, neutrófilos en banda, abastonado, bandas",
        "metamyelocyte": "metamielocito",
        "myelocyte": "mielocitos",
        "promyelocyte": "promielocito",
        "blast": "blasto",
        "atypical lymphocyte": "linfocitos atípicos, linfocito reactivo",
        "platelet": "plaqueta, trombocitos",
    },
    "Turkish": {
        "basophil": "bazofil, BAZOFİLLER",
        "eosinophil": "eozinofil, EOZİNOFİL, Eozinofil hücresi",
        "erythroblast": "eritroblastlar, çekirdekli eritrosit",
        "immature granulocyte": "immatür granülosit, olgunlaşmamış granülositler",  # noqa: RUF001
        "lymphocyte": "lenfosit, lenfositler",
        "monocyte": "monosit",
        "neutrophil": "nötrofil, NÖTROFİL",
        "segmented neutrophil": "parçalı, PARÇALI, parçalılar, Parçalı nötrofil",  # noqa: RUF001
        "band neutrophil": "çomak, çomak nötrofil, ÇOMAK",
        "metamyelocyte": "metamiyelosit",
        "myelocyte": "miyelosit",
        "promyelocyte": "promiyelosit",
        "blast": "blastlar",
        "atypical lymphocyte": "atipik lenfosit, reaktif lenfosit",
        "platelet": "trombosit",
    },
    "Chinese": {  # simplified and traditional
        "basophil": "嗜碱性粒细胞, 嗜鹼性粒細胞, 嗜堿性粒細胞, 嗜鹼性球",
        "eosinophil": "嗜酸性粒细胞, 嗜酸性粒細胞, 嗜酸粒细胞",
        "erythroblast": "有核红细胞, 有核紅血球",
        "immature granulocyte": "未成熟粒细胞, 幼稚粒細胞",
        "lymphocyte": "淋巴细胞, 淋巴細胞, 淋巴球",
        "monocyte": "单核细胞, 單核細胞, 單核球",
        "neutrophil": "中性粒细胞, 嗜中性球, 中性粒細胞",
        "segmented neutrophil": "中性分叶核粒细胞, 中性分葉核粒細胞, 分叶核",
        "band neutrophil": "中性杆状核粒细胞, 中性桿狀核粒細胞, 杆状核, 帶狀核",
        "metamyelocyte": "晚幼粒细胞",
        "myelocyte": "中幼粒细胞, 中幼粒細胞",
        "promyelocyte": "早幼粒细胞",
        "blast": "原始细胞",
        "atypical lymphocyte": "异型淋巴细胞, 異形淋巴細胞, 反應性淋巴細胞",
        "platelet": "血小板",
    },
}

SETS = {
    "LISC": {
        **{"Baso": "basophil", "eosi": "eosinophil", "lymp": "lymphocyte", "mono": "monocyte"},
        **{"neut": "neutrophil", "mixt": None},
    },
    "SSL-WBC": dict.fromkeys("12345"),  # numbers for names
    "Raabin-WBC": {
        **{"Basophil": "basophil", "Eosinophil": "eosinophil", "Lymphocyte": "lymphocyte"},
        **{"Monocyte": "monocyte", "Neutrophil": "neutrophil"},
    },
    "BloodMNIST": {
        **{name: name for name in PBC if name != "ig"},
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)": "ig",
    },
    "AML-Cytomorphology_LMU": {
        **{"BAS": "basophil", "EBO": "erythroblast", "EOS": "eosinophil", "KSC": None},
        **{"LYA": None, "LYT": "lymphocyte", "MMZ": "ig", "MOB": None, "MON": "monocyte"},
        **{"MYB": "ig", "MYO": None, "NGB": "neutrophil", "NGS": "neutrophil", "PMB": "ig"},
        "PMO": "ig",
    },
    "AML-Cytomorphology_LMU, written out": {
        **{"Neutrophil (segmented)": "neutrophil", "Neutrophil (band)": "neutrophil"},
        **{"Lymphocyte (typical)": "lymphocyte", "Lymphocyte (atypical)": None},
        **{"Promyelocyte (bilobled)": "ig", "Smudge cell": None, "Myeloblast": None},
    },
    "PBC, file names": {
        **{"BA_100102": "basophil", "BNE_1": "neutrophil", "EO_1": "eosinophil"},
        **{"ERB_1": "erythroblast", "IG_1": "ig", "LY_1": "lymphocyte", "MMY_1": "ig"},
        **{
            "MO_1": "monocyte",
            "MY_1": "ig",
            "NEUTROPHIL_1": "neutrophil",
            "PLATELET_1": "platelet",
        },
        **{"PMY_1": "ig", "SNE_1": "neutrophil"},
    },
    "C-NMC": {"all": None, "hem": None},
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_cells_are_known_by_their_names_in_each_language(language):
    for cell, names in LANGUAGES[language].items():
        found = {name: known_cell(name) for name in names.split(", ")}
        assert found == dict.fromkeys(found, cell)


@pytest.mark.parametrize("name", SETS)
def test_the_classes_of_a_public_set_on_the_eight_of_pbc(name):
    expected = SETS[name]
    match = match_classes(PBC, list(expected))
    assert match.mapped == {theirs: own for theirs, own in expected.items() if own}
    assert match.unknown == tuple(theirs for theirs, own in expected.items() if not own)


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
    ("name", "cell"),
    [
        ("1. Neutrophil", "neutrophil"),
        ("01_neutrophil", "neutrophil"),
        ("7-Basophil", "basophil"),
        ("2、淋巴细胞", "lymphocyte"),
        ("lymphocyte (1)", "lymphocyte"),
        ("lymphocyte_2", "lymphocyte"),
        ("Monocyte - Copy (2)", "monocyte"),
        ("EOSINOPHIL_aug", "eosinophil"),
        ("train_Eosinophil", "eosinophil"),
        ("Platelet images", "platelet"),
        ("monocyte cells cropped", "monocyte"),
        ("Neutrophil_Dataset", "neutrophil"),
        ("neutrophils_segmented", "segmented neutrophil"),
        ("SegmentedNeutrophil", "segmented neutrophil"),
        ("BandNeutrophils", "band neutrophil"),
        ("ImmatureGranulocytes_aug", "immature granulocyte"),
    ],
)
def test_numbering_and_idle_words_do_not_hide_the_cell(name, cell):
    assert known_cell(name) == cell


@pytest.mark.parametrize("cell", ["éosinophile", "PARÇALI", "nötrofil", "linfócitos", "plättchen"])
def test_composed_and_decomposed_names_are_one(cell):
    composed, decomposed = normalize("NFC", cell), normalize("NFD", cell)
    assert composed != decomposed
    assert known_cell(composed) == known_cell(decomposed)
    assert match_classes([composed], [decomposed]).mapped == {decomposed: composed}


@pytest.mark.parametrize(
    "name",
    [
        *("train", "Training", "training_set", "test", "TestA", "Test-B", "val", "validation"),
        *("images", "img", "JPEGImages", "Images 2", "masks", "neutrophil masks", "Annotations"),
        *("Ground Truth", "Ground Truth Segmentation", "segmented", "segmented_images", "seg"),
        *("Main Dataset", "Dataset 1", "dataset-master", "data", "aug", "crops", "folder (2)"),
        *("patient01", "patient 1", "PMN_slides", "slide 3", "fold_0", "BA12", "MO3"),
        *("A", "B", "n", "1", "007", "class 1", "type 2", "CD4", "CD4 lymphocyte"),
        *("abnormal", "hem", "all", "mixt", "cells", "granulocytes", "polynucléaire", "WBC"),
        *("red", "blood", "immature", "eosin", "lymphoma", "mononuclear", "++", "???", ""),
        *("eosinophil and basophil", "Neutrophil+Monocyte", "eosinophilic myelocyte", "粒细胞"),
    ],
)
def test_other_folders_are_not_cells(name):
    assert known_cell(name) == ""


@pytest.mark.parametrize(
    "names",
    [
        ("1", "2", "01"),
        ("type 1", "type 2", "type"),
        ("class1", "class2"),
        ("Dataset 1", "Dataset 2", "dataset"),
        ("CD4", "CD8", "CD"),
        ("CD34+", "CD34"),
        ("++", "--"),
        ("AB", "ABS"),
        ("train", "test"),
        ("バ", "ハ"),  # a mark that makes another letter
        ("की", "कु"),  # marks that are vowels
    ],
)
def test_names_outside_the_table_are_never_merged(names):
    match = match_classes(names, names)
    assert match.mapped == {name: name for name in names}
    for name in names:
        others = [other for other in names if other.casefold() != name.casefold()]
        assert match_classes(others, [name]).unknown == (name,)


@pytest.mark.parametrize(
    "name", ["RBC", "myeloblast", "LYA", "atypical lymphocyte", "smudge cell", "artefact", "???"]
)
def test_other_things_are_unknown(name):
    match = match_classes(PBC, [name])
    assert match.unknown == (name,)
    assert match.missing == PBC


def test_parts_count_as_the_whole_only_where_the_model_has_no_better_class():
    assert match_classes(KAGGLE, ["metamyelocyte"]).unknown == ("metamyelocyte",)
    assert match_classes(["blast"], ["MYO", "monoblasts"]).missing == ()
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
    match = match_classes(
        ("cell A", "第一", "++", "Hairy cell"), ["A", "CELL_A", "第一", "++", "--", "hairy cells"]
    )
    assert match.mapped["CELL_A"] == "cell A"
    assert match.mapped["第一"] == "第一"
    assert match.mapped["++"] == "++"
    assert match.mapped["hairy cells"] == "Hairy cell"
    assert match.unknown == ("--",)


def test_of_two_classes_of_one_name_the_exact_one_is_meant():
    twice = ("NEU", "neutrophils")
    assert match_classes(twice, ["NEU", "neutrophil"]).mapped == {"NEU": "NEU"}
    assert match_classes(twice, ["neutrophil"]).too_broad == ("neutrophil",)
    numbered = ("lymphocyte 1", "lymphocyte 2")
    assert match_classes(numbered, numbered).mapped == {name: name for name in numbered}
    assert match_classes(numbered, ["lymphocyte"]).too_broad == ("lymphocyte",)


def test_no_name_of_the_table_means_two_cells():
    names = [(word, cell) for cell, others in SYNONYMS.items() for word in (cell, *others)]
    assert {word: known_cell(word) for word, _ in names} == dict(names)
    assert len(dict(names)) == len(names)
    assert {*PART_OF, *PART_OF.values()} <= set(SYNONYMS)
