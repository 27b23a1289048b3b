import pandas as pd
import pytest

from bloodcell_fastai import BloodcellError, leakage, split_table
from bloodcell_fastai.data.splits import (
    count_known,
    describe_leakage,
    held_out,
    kept_split,
    photo_groups,
    split_folds,
)


def make_table(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    """An image table from (label, subset, photo); photo is empty where it is not known."""
    table = pd.DataFrame(rows, columns=["label", "subset", "photo"])
    return table.assign(path=[f"/{index}.jpg" for index in range(len(table))])


def two_classes(photos: int = 10, copies: int = 4) -> pd.DataFrame:
    return make_table(
        [
            (label, "", f"{label}{photo}")
            for label in "AB"
            for photo in range(photos)
            for _ in range(copies)
        ]
    )


def counts(table: pd.DataFrame, part: str) -> dict[str, int]:
    return table.label[table.part == part].value_counts().sort_index().to_dict()


def test_random_is_a_stratified_fifth_of_the_images():
    table = split_table(two_classes(), "random")
    assert counts(table, "valid") == {"A": 8, "B": 8}
    assert counts(table, "train") == {"A": 32, "B": 32}


def test_random_validates_every_one_of_many_small_classes():
    """A fifth of 66 images is fewer than there are classes."""
    names = [f"{number:02d}" for number in range(22)]
    table = split_table(make_table([(name, "", "") for name in names for _ in range(3)]), "random")
    assert counts(table, "valid") == dict.fromkeys(names, 1)
    assert counts(table, "train") == dict.fromkeys(names, 2)


def test_random_leaks_and_photo_does_not(demo_table):
    assert leakage(split_table(demo_table, "random")) > 0.5
    assert leakage(split_table(demo_table, "photo")) == 0


def test_photo_takes_about_a_fifth_of_every_class():
    table = split_table(two_classes(), "photo")
    assert counts(table, "valid") == {"A": 8, "B": 8}
    assert not set(table.photo[table.part == "train"]) & set(table.photo[table.part == "valid"])


@pytest.mark.parametrize("how", ["random", "photo"])
def test_the_seed_decides(how):
    table = two_classes()
    again = [split_table(table, how, seed).part.tolist() for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_official_uses_the_folders_and_leaves_test_simple_out(demo_table):
    table = split_table(demo_table, "official")
    parts = table.groupby("subset").part.unique().map(list).to_dict()
    assert parts == {"TRAIN": ["train"], "TEST": ["valid"], "TEST_SIMPLE": [""]}


def test_official_prefers_valid_to_test():
    rows = [(label, subset, "") for label in "AB" for subset in ("train", "valid", "test")]
    table = split_table(make_table(rows), "official")
    assert table.part.tolist() == ["train", "valid", "test"] * 2


def with_test(names: tuple[str, ...] = ("test",)) -> pd.DataFrame:
    """Five photographs of each class in a folder train, and one in each of others."""
    rows = [(label, "Train", f"{label}{i}") for label in "AB" for i in range(5) for _ in range(2)]
    rows += [(label, name, f"{label}{name}") for label in "AB" for name in names]
    return make_table(rows)


@pytest.mark.parametrize("names", [("test",), ("TEST", "TEST_SIMPLE"), ("test_simple",)])
def test_a_test_folder_is_left_for_the_end(names):
    table = split_table(with_test(names), "photo")
    assert counts(table, "train") == {"A": 8, "B": 8}
    assert counts(table, "valid") == {"A": 2, "B": 2}
    assert counts(table, "test") == {"A": 1, "B": 1}
    assert set(table.subset[table.part == "test"]) == {names[0]}
    assert held_out(table).sum() == 2 * len(names)


def test_the_published_protocol_pools_the_test_folder():
    table = split_table(with_test(), "random")
    assert set(table.part[table.subset == "test"]) <= {"train", "valid"}


def test_without_a_training_folder_all_of_it_is_split():
    table = split_table(two_classes().assign(subset="test"), "photo")
    assert set(table.part) == {"train", "valid"}
    assert not held_out(table).any()


@pytest.mark.parametrize(
    ("folders", "how", "kept"),
    [
        (("train", "valid"), "photo", "official"),
        (("train", "val", "test"), "photo", "official"),
        (("train", "valid"), "random", "random"),
        (("TRAIN", "TEST"), "photo", "photo"),
        (("",), "photo", "photo"),
    ],
)
def test_a_split_that_comes_with_the_data_is_kept(folders, how, kept):
    table = make_table([(label, folder, "") for label in "AB" for folder in folders])
    assert kept_split(table, how) == kept


def test_every_photograph_validates_once():
    folds = split_folds(two_classes(), 5)
    valid = [set(table.photo[table.part == "valid"]) for table in folds]
    assert sum(map(len, valid)) == len(set.union(*valid)) == 20


def test_leakage_is_unknown_without_photographs():
    table = two_classes().assign(photo="")
    assert leakage(split_table(table, "random")) is None
    assert count_known(table) == 0
    assert describe_leakage(None, 0, len(table)).startswith("unknown")


def test_photographs_of_the_test_set_alone_say_nothing_of_leakage():
    table = with_test().assign(photo=lambda t: t.photo.where(t.subset == "test", ""))
    assert leakage(split_table(table, "photo")) is None


def test_an_image_without_a_photograph_is_independent_of_all_others():
    table = make_table([("A", "", "x"), ("A", "", "x"), ("A", "", ""), ("B", "", "")])
    assert photo_groups(table).tolist() == ["x", "x", "/2.jpg", "/3.jpg"]
    assert count_known(table) == 2
    split = two_classes().assign(photo=lambda t: t.photo.where(t.label == "A", ""))
    assert leakage(split_table(split, "photo")) == 0
    assert 0 < leakage(split_table(split, "random")) <= 0.5  # half of the images count as single


@pytest.mark.parametrize(
    ("leakage", "n_known", "says"),
    [
        (0.0, 10, "none: no validation image"),
        (
            0.0,
            9,
            "none found: no validation image has a copy of its photograph in training; only 9",
        ),
        (0.25, 10, "25.0% of the validation images have a copy of their own photograph"),
        (0.25, 4, "better than it would be on new photographs; only 4 of 10 images"),
        (1.0, 10, "measures memory"),
    ],
)
def test_leakage_in_words(leakage, n_known, says):
    text = describe_leakage(leakage, n_known, 10)
    assert says in text
    assert ("have a known photograph" in text) == (n_known < 10)


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        ([("A", "", "1"), ("B", "", "2")], "official", "no folders of its own"),
        ([("A", "", "1"), ("A", "", "2"), ("B", "", "3")], "random", "B has a single image"),
        (
            [("A", "", "1"), ("A", "", "2"), ("B", "", "3"), ("B", "", "3")],
            "photo",
            "B has a single photograph",
        ),
        (
            [("A", "train", "1"), ("B", "train", "2"), ("C", "valid", "3")],
            "official",
            "Only in validation, never in training: C",
        ),
        ([("A", "train", "1"), ("A", "valid", "2")], "official", "two classes or more"),
        ([("A", "", "1"), ("B", "", "2")], "photos", "how is 'photos'"),
    ],
)
def test_impossible_splits(rows, how, message):
    with pytest.raises(BloodcellError, match=message):
        split_table(make_table(rows), how)


def test_kaggles_test_folder_is_left_for_the_end(real_data):
    table = split_table(real_data.table, "photo")
    assert table.part[table.subset == "TEST"].unique().tolist() == ["test"]
    assert table.part[table.subset == "TEST_SIMPLE"].unique().tolist() == [""]
    assert leakage(table) == 0
    validated = (table.part == "valid").sum() / (table.subset == "TRAIN").sum()
    assert 0.15 < validated < 0.25


def test_the_published_split(real_data):
    table = split_table(real_data.table, "random")
    assert counts(table, "valid") == {
        "EOSINOPHIL": 627,
        "LYMPHOCYTE": 622,
        "MONOCYTE": 620,
        "NEUTROPHIL": 634,
    }
    assert (table.part == "valid").sum() == 2503


def test_a_class_of_one_photograph_has_no_folds():
    """The hint names no number of folds that is refused too."""
    table = make_table([("A", "", "1"), ("A", "", "1"), ("B", "", "2"), ("B", "", "3")])
    with pytest.raises(BloodcellError, match="A has a single photograph"):
        split_folds(table, 2)
