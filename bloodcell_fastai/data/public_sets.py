"""Public sets of blood-cell images: where they are, how they lie in folders, and what misleads.

Nothing is downloaded from here. The reader of data sets names the set it was made for, and the
documentation lists them. Folders, tables and file names are as their own pages, repositories or
articles show them. This module imports nothing that takes time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

LayoutName = Literal[
    "class folders",  # CLASS/image
    "subset folders",  # train/CLASS/image
    "folders of patients",  # patient01/CLASS/image, fold_0/CLASS/image
    "sets side by side",  # SITE/CLASS/image
    "label table",  # images, and a table with the class of each
    "names",  # the class is in the name of the file
    "arrays",  # .npz
    "boxes",  # fields with boxes around many cells: no class for an image, so refused
]
"""How the images of a set lie and where their classes are."""


@dataclass(frozen=True)
class PublicSet:
    """A public set of images.

    Attributes:
        name: as its authors call it.
        source: URL of the page or the record it is downloaded from.
        licence: as the source names it; "not stated" where none was found.
        citation: authors, journal, volume, page, year and DOI of the article; where there is
            none, who published the set and when.
        classes: as its folders, its table or, where those hold numbers, its description write
            them.
        layout: how its images lie.
        about: what misleads, in a sentence or two; empty where nothing does.
        codes: class of each number or letter by which its table or file names tell the class;
            empty where they do not.
    """

    name: str
    source: str
    licence: str
    citation: str
    classes: tuple[str, ...]
    layout: LayoutName
    about: str = ""
    codes: Mapping[str, str] = field(default_factory=dict)


PUBLIC_SETS = (
    PublicSet(
        name="Kaggle blood-cells",
        source="https://www.kaggle.com/datasets/paultimothymooney/blood-cells",
        licence="MIT",
        citation="P. Mooney, Kaggle 2018; the photographs are those of BCCD",
        classes=("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL"),
        layout="subset folders",
        about="Augmented copies of 348 photographs: a random split has copies of one photograph "
        "on both sides. TEST_SIMPLE shows photographs of TEST again.",
    ),
    PublicSet(
        name="Raabin-WBC",
        source="https://raabindata.com/free-data/",
        licence="not stated",
        citation="Z. M. Kouzehkanan et al., Scientific Reports 12:1123 (2022), "
        "doi:10.1038/s41598-021-04426-x",
        classes=("Basophil", "Eosinophil", "Lymphocyte", "Monocyte", "Neutrophil"),
        layout="subset folders",
        about="All basophils are from other smears than the other classes. File names begin with "
        "the smear. TestB holds lymphocytes and neutrophils only.",
    ),
    PublicSet(
        name="PBC",
        source="https://doi.org/10.17632/snkd93bnjr.1",
        licence="CC BY 4.0",
        citation="A. Acevedo, A. Merino, S. Alférez, Á. Molina, L. Boldú, J. Rodellar, Data in "
        "Brief 30:105474 (2020), doi:10.1016/j.dib.2020.105474",
        classes=(
            *("basophil", "eosinophil", "erythroblast", "ig"),
            *("lymphocyte", "monocyte", "neutrophil", "platelet"),
        ),
        layout="class folders",
        about="File names begin with a cell type finer than the folder (`MMY_`, `BNE_`) and do not "
        "tell the person. A model that started from the weights `pbc` has seen these images.",
    ),
    PublicSet(
        name="LISC",
        source="http://users.cecs.anu.edu.au/~hrezatofighi/Data/Leukocyte%20Data.htm",
        licence="research and education only, no redistribution",
        citation="S. H. Rezatofighi, H. Soltanian-Zadeh, Computerized Medical Imaging and Graphics "
        "35:333-343 (2011), doi:10.1016/j.compmedimag.2011.01.003",
        classes=("Baso", "eosi", "lymp", "mixt", "mono", "neut"),
        layout="class folders",
        about="The images are in `Main Dataset`. Beside it, `Ground Truth Segmentation` holds "
        "masks in folders of the same names, and `More Dataset without Ground Truth` images "
        "without a class. `mixt` are fields with cells of several classes.",
    ),
    PublicSet(
        name="AML-Cytomorphology_LMU",
        source="https://doi.org/10.7937/tcia.2019.36f5o9ld",
        licence="CC BY 3.0",
        citation="C. Matek, S. Schwarz, K. Spiekermann, C. Marr, Nature Machine Intelligence "
        "1:538-544 (2019), doi:10.1038/s42256-019-0101-9",
        classes=(
            *("BAS", "EBO", "EOS", "KSC", "LYA", "LYT", "MMZ", "MOB"),
            *("MON", "MYB", "MYO", "NGB", "NGS", "PMB", "PMO"),
        ),
        layout="class folders",
        about="File names do not tell the patient. `annotations.dat` repeats the classes, and "
        "gives those of two later readings for some of the images.",
    ),
    PublicSet(
        name="Bone-Marrow-Cytomorphology_MLL_Helmholtz_Fraunhofer",
        source="https://doi.org/10.7937/TCIA.AXH3-T579",
        licence="CC BY 4.0",
        citation="C. Matek, S. Krappe, C. Münzenmayer, T. Haferlach, C. Marr, Blood 138:1917-1927 "
        "(2021), doi:10.1182/blood.2020010568",
        classes=(
            *("ABE", "ART", "BAS", "BLA", "EBO", "EOS", "FGC", "HAC", "KSC", "LYI", "LYT"),
            *("MMZ", "MON", "MYB", "NGB", "NGS", "NIF", "OTH", "PEB", "PLM", "PMO"),
        ),
        layout="class folders",
        about="Bone marrow, not blood. Large classes are divided into numbered folders "
        "(`ART/0001-1000`), which are no classes. File names do not tell the patient.",
    ),
    PublicSet(
        name="MLL23",
        source="https://doi.org/10.5281/zenodo.14277609",
        licence="CC BY 4.0",
        citation="S. Shetab Boushehri et al., Scientific Data 12:1773 (2025), "
        "doi:10.1038/s41597-025-06223-x",
        classes=(
            *("basophil", "eosinophil", "hairy_cell", "lymphocyte", "lymphocyte_large_granular"),
            *("lymphocyte_neoplastic", "lymphocyte_reactive", "metamyelocyte", "monocyte"),
            *("myeloblast", "myelocyte", "neutrophil_band", "neutrophil_segmented", "normoblast"),
            *("plasma_cell", "promyelocyte", "promyelocyte_atypical", "smudge_cell"),
        ),
        layout="class folders",
        about="Comes as one zip for each class.",
    ),
    PublicSet(
        name="Bodzas 2023",
        source="https://doi.org/10.6084/m9.figshare.22680517",
        licence="CC0",
        citation="A. Bodzas, P. Kodytek, J. Zidek, Scientific Data 10:466 (2023), "
        "doi:10.1038/s41597-023-02378-7",
        classes=(
            *("Basophile", "Eosinophile", "Lymphoblast", "Lymphocyte", "Monocyte", "Myeloblast"),
            *("Neutrophile Band", "Neutrophile Segment", "Normoblast"),
        ),
        layout="class folders",
        about="Files are numbered within each class: the number tells neither patient nor field.",
    ),
    PublicSet(
        name="BCISC",
        source="https://github.com/fpklipic/BCISC",
        licence="Apache-2.0",
        citation="Fan et al., Journal of Biophotonics (2019), doi:10.1002/jbio.201800488",
        classes=("baso", "eosi", "lymp", "mono", "neut"),
        layout="class folders",
        about="PNGs beside a photograph (`5-2(1).png` beside `5-2.jpg`) belong to it and are no "
        "photographs of their own. The number before the dash is the group to keep together.",
    ),
    PublicSet(
        name="DeepBioNet",
        source="https://github.com/usmanalishams/DeepBioNet_dataset_BCCD_WBC_Classifition",
        licence="not stated",
        citation="U. A. Shams et al., Blood Cells, Molecules and Diseases 105:102823 (2024), "
        "doi:10.1016/j.bcmd.2024.102823",
        classes=("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL"),
        layout="class folders",
        about="Augmented copies: `MONOCYTE_original_57.jpg_….jpg` is a copy of photograph 57. The "
        "folder of the detection set beside the classes holds fields with boxes.",
    ),
    PublicSet(
        name="Blood Cells Cancer (ALL)",
        source="https://www.kaggle.com/datasets/mehradaria/leukemia",
        licence="not stated",
        citation="M. Ghaderzadeh, M. Aria, A. Hosseini, F. Asadi, D. Bashash, H. Abolghasemi, "
        "International Journal of Intelligent Systems 37:5113-5133 (2022), doi:10.1002/int.22753",
        classes=("Benign", "Early", "Pre", "Pro"),
        layout="class folders",
        about="`Segmented` shows the images of `Original` again, masked. An image shows many "
        "cells; its name does not tell which of the 89 patients it is of.",
    ),
    PublicSet(
        name="C-NMC 2019",
        source="https://doi.org/10.7937/tcia.2019.dc64i46r",
        licence="CC BY 3.0",
        citation="A. Gupta, R. Gupta, The Cancer Imaging Archive (2019), "
        "doi:10.7937/tcia.2019.dc64i46r",
        classes=("all", "hem"),
        layout="folders of patients",
        about="A fold holds many patients; the file name tells which (`UID_57_29_1_all.bmp` is of "
        "patient 57, `UID_H49_35_1_hem.bmp` of H49). `all` is leukaemia, not everything.",
        codes={"0": "hem", "1": "all"},
    ),
    PublicSet(
        name="SSL-WBC",
        source="https://github.com/zxaoyou/segmentation_WBC",
        licence="not stated",
        citation="X. Zheng, Y. Wang, G. Wang, J. Liu, Micron 107:55-71 (2018), "
        "doi:10.1016/j.micron.2018.01.010",
        classes=("neutrophil", "lymphocyte", "monocyte", "eosinophil", "basophil"),
        layout="label table",
        about="`001.png` is the mask of `001.bmp`, and image 1 of the table. The authors added "
        "some of the classes themselves, without an expert.",
        codes={
            "1": "neutrophil",
            "2": "lymphocyte",
            "3": "monocyte",
            "4": "eosinophil",
            "5": "basophil",
        },
    ),
    PublicSet(
        name="KRD-WBC",
        source="https://doi.org/10.17632/jzdj6h7gms.2",
        licence="CC BY 4.0",
        citation="H. Taha, F. Alizadeh, N. Mohammad, Mendeley Data (2023), "
        "doi:10.17632/jzdj6h7gms.2",
        classes=("Basophils", "Eosinophils", "Lymphocytes", "Monocytes", "Neutrophils"),
        layout="label table",
        about="`mask/mask298.jpg` is the mask of `image/image298.jpg`.",
    ),
    PublicSet(
        name="ALL-IDB1",
        source="https://homes.di.unimi.it/scotti/all/",
        licence="on request, no redistribution",
        citation="R. Donida Labati, V. Piuri, F. Scotti, IEEE International Conference on Image "
        "Processing, 2045-2048 (2011), doi:10.1109/ICIP.2011.6115881",
        classes=("healthy", "ALL"),
        layout="names",
        about="`Im001_1.jpg` shows many cells: the class is that of the patient, and not every "
        "cell of a patient with leukaemia is a blast.",
        codes={"0": "healthy", "1": "ALL"},
    ),
    PublicSet(
        name="ALL-IDB2",
        source="https://homes.di.unimi.it/scotti/all/",
        licence="on request, no redistribution",
        citation="R. Donida Labati, V. Piuri, F. Scotti, IEEE International Conference on Image "
        "Processing, 2045-2048 (2011), doi:10.1109/ICIP.2011.6115881",
        classes=("healthy", "lymphoblast"),
        layout="names",
        about="Single cells (`Im001_1.tif`) cut from the images of ALL-IDB1: the two sets are no "
        "test of one another.",
        codes={"0": "healthy", "1": "lymphoblast"},
    ),
    PublicSet(
        name="BloodMNIST",
        source="https://zenodo.org/records/10519652",
        licence="CC BY 4.0",
        citation="J. Yang et al., Scientific Data 10:41 (2023), doi:10.1038/s41597-022-01721-8",
        classes=(
            *("basophil", "eosinophil", "erythroblast", "immature granulocytes"),
            *("lymphocyte", "monocyte", "neutrophil", "platelet"),
        ),
        layout="arrays",
        about="The images of PBC, cropped and made smaller: no test of a model that has seen "
        "those.",
        codes={
            "0": "basophil",
            "1": "eosinophil",
            "2": "erythroblast",
            "3": "immature granulocytes",
            "4": "lymphocyte",
            "5": "monocyte",
            "6": "neutrophil",
            "7": "platelet",
        },
    ),
    PublicSet(
        name="BCCD",
        source="https://github.com/Shenggan/BCCD_Dataset",
        licence="MIT",
        citation="Shenggan, cosmicad, akshaylamba, GitHub 2017",
        classes=("Platelets", "RBC", "WBC"),
        layout="boxes",
        about="White cells of every type are one class. The photographs are those of the Kaggle "
        "set, which names the type.",
    ),
    PublicSet(
        name="TXL-PBC",
        source="https://github.com/lugan113/TXL-PBC_Dataset",
        licence="MIT",
        citation="L. Gan, X. Li, X. Wang, Scientific Data 12:1694 (2025), "
        "doi:10.1038/s41597-025-05980-z",
        classes=("Platelets", "RBC", "WBC"),
        layout="boxes",
        about="White cells of every type are one class. The images are taken from BCCD, PBC, "
        "Raabin-WBC and another set.",
    ),
)
"""The public sets, one layout after the other."""


def public_sets_table() -> str:
    """All public sets as a Markdown table."""
    lines = ["| Set | Layout | Classes | Licence | What misleads |", "|---|---|---|---|---|"]
    for known in PUBLIC_SETS:
        classes = ", ".join(known.classes)
        name = f"[{known.name}]({known.source}). {known.citation}"
        lines.append(f"| {name} | {known.layout} | {classes} | {known.licence} | {known.about} |")
    return "\n".join(lines) + "\n"
