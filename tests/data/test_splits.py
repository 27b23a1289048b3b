import warnings

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bloodcell_fastai import BloodcellError, leakage, split_table
from bloodcell_fastai.data.splits import (
    count_known,
    describe_gaps,
    describe_leakage,
    held_out,
    kept_split,
    photo_groups,
    split_folds,
    subset_part,
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


def single_photos(sizes: dict[str, int]) -> pd.DataFrame:
    """Classes of so many images, each of a photograph of its own, none known."""
    return make_table([(label, "", "") for label, n in sizes.items() for _ in range(n)])


def patients(classes: list[str], copies: int = 3) -> pd.DataFrame:
    """Patients as photographs, each with images of the classes in its string."""
    return make_table(
        [
            (label, "", f"patient{number}")
            for number, its_classes in enumerate(classes)
            for label in its_classes
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


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=2, max_size=5), st.integers(1, 2), st.integers(0, 9))
@example([60, 60, 2], 1, 42)
@example([60, 2, 3, 2, 4, 2], 1, 42)
@example([2, 2], 3, 0)
def test_small_classes_do_not_bend_the_split_of_the_others(sizes, copies, seed):
    """About a fifth of every class, one photograph of a class of less than five."""
    table = make_table(
        [
            (f"class{label}", "", f"{label}-{photo}" if copies > 1 else "")
            for label, n in enumerate(sizes)
            for photo in range(n)
            for _ in range(copies)
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn's, of small classes
        split = split_table(table, seed=seed)
    valid = counts(split, "valid")
    for label, n in enumerate(sizes):
        share = valid[f"class{label}"] / copies
        assert abs(share - n / 5) < 1 if n >= 5 else share == 1
    assert split.groupby(photo_groups(split)).part.nunique().max() == 1
    assert describe_gaps(split) == ()


def test_three_patients_with_every_class_are_split_by_thirds():
    split = split_table(patients(["ABC"] * 3))
    assert counts(split, "valid") == {"A": 3, "B": 3, "C": 3}
    assert split.groupby("photo").part.nunique().max() == 1


def test_a_class_of_two_of_many_patients_is_on_both_sides():
    split = split_table(patients(["A"] * 9 + ["AB"] + ["A"] * 9 + ["AB"]))
    assert counts(split, "valid") == {"A": 12, "B": 3}


@pytest.mark.parametrize("copies", [[1, 1, 98], [98, 1, 1]])
def test_of_a_small_class_the_photograph_with_most_copies_trains(copies):
    rows = [("R", "", f"r{photo}") for photo, n in enumerate(copies) for _ in range(n)]
    rows += [("A", "", f"a{photo}") for photo in range(20)]
    assert counts(split_table(make_table(rows)), "valid") == {"A": 4, "R": 1}


def test_a_class_that_cannot_be_on_both_sides_trains():
    """Of three patients with two of three classes each, one validates."""
    split = split_table(patients(["AB", "AC", "BC"]))
    assert set(counts(split, "train")) == {"A", "B", "C"}
    (missing,) = {"A", "B", "C"} - set(counts(split, "valid"))
    (gap,) = describe_gaps(split)
    assert gap == f"No validation image of {missing}: nothing measures how well it is recognised."


def test_without_small_classes_the_split_is_that_of_the_shipped_results():
    """The first of the folds whose worst class is nearest to a fifth, as in version 0.1."""
    split = split_table(single_photos({"A": 12, "B": 7}), seed=3)
    assert split.index[split.part == "valid"].tolist() == [2, 3, 7, 16]
    photos = [(label, photo) for label, n in (("A", 9), ("B", 6)) for photo in range(n)]
    rows = [(label, "", f"{label}{n}") for label, n in photos for _ in range(1 + n % 3)]
    split = split_table(make_table(rows), seed=3)
    assert set(split.photo[split.part == "valid"]) == {"A2", "A3", "B4"}


@pytest.mark.parametrize("how", ["random", "photo"])
def test_the_seed_decides(how):
    rare = make_table([("R", "", "r1"), ("R", "", "r2")]).assign(path=["/r1.jpg", "/r2.jpg"])
    table = pd.concat([two_classes(), rare], ignore_index=True)
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


def test_two_test_folders_are_both_for_the_end():
    table = split_table(with_test(("TestA", "Test-B")), "photo")
    assert set(table.subset[table.part == "test"]) == {"TestA", "Test-B"}


def test_a_test_folder_beside_a_validation_folder_alone_is_for_the_end():
    table = split_table(with_test(("test_set",)).replace({"subset": {"Train": "val"}}), "photo")
    assert counts(table, "train") == {"A": 8, "B": 8}
    assert set(table.subset[table.part == "test"]) == {"test_set"}


@pytest.mark.parametrize(("folders", "how"), [(["val"], "official"), ([], "photo")])
def test_test_images_of_a_class_that_is_not_trained_on_are_left_out(folders, how):
    rows = [(label, "train", "") for label in "AB" for _ in range(5)]
    rows += [(label, folder, "") for label in "AB" for folder in [*folders, "test"]]
    table = split_table(make_table([*rows, ("C", "test", ""), ("C", "test", "")]), how)
    assert counts(table, "test") == {"A": 1, "B": 1}
    assert set(table.part[table.label == "C"]) == {""}
    assert describe_gaps(table) == (
        "Only in test, never in training: C. The model cannot know it; images left out: 2.",
    )


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
        (("training_set", "Dev Set"), "photo", "official"),
        (("training_set", "test_set"), "photo", "photo"),
        (("val", "test"), "photo", "photo"),
        (("train",), "photo", "photo"),
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
            r"Only in validation, never in training: C \(in valid\)",
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


def test_a_fold_without_a_class_in_training_is_refused():
    """Patients of several classes: each class has two, and both of one are in one fold."""
    table = patients(["AB", "CD", "AC", "BD", "AD", "BC"])
    refused = 0
    for seed in range(20):
        try:
            tables = split_folds(table, 2, seed)
        except BloodcellError as error:
            refused += 1
            assert "none is left to train on" in error.message
            continue
        assert all(set(split.label[split.part == "train"]) == set("ABCD") for split in tables)
    assert refused


def test_the_hint_of_too_many_folds_is_taken():
    table = single_photos({"A": 9, "B": 3})
    with pytest.raises(BloodcellError, match="B has 3 photographs, too few for 4") as caught:
        split_folds(table, 4)
    assert "`folds=3`" in caught.value.hint
    assert len(split_folds(table, 3)) == 3


@pytest.mark.parametrize(("copies", "random"), [(1, False), (2, True)])
def test_a_class_of_one_photograph_is_sent_where_it_can_be_split(copies, random):
    table = make_table([("A", "", "1"), ("A", "", "2"), *[("B", "", "3")] * copies])
    with pytest.raises(BloodcellError, match="B has a single photograph") as caught:
        split_table(table)
    assert ("split=random" in caught.value.hint) == random
    if random:
        split_table(table, "random")


def parts_table(parts: dict[str, str]) -> pd.DataFrame:
    """A table with an image of each class in each part that its word begins with."""
    names = {"t": "train", "v": "valid", "e": "test"}
    rows = [(label, names[each]) for label, letters in parts.items() for each in letters]
    return pd.DataFrame(rows, columns=["label", "part"]).assign(subset="")


@pytest.mark.parametrize(
    ("parts", "sentences"),
    [
        ({"A": "tv", "B": "tv"}, []),
        ({"A": "tve", "B": "tve"}, []),
        (
            {"A": "tv", "B": "t", "C": "t"},
            ["No validation image of B, C: nothing measures how well they are recognised."],
        ),
        (
            {"A": "tve", "B": "te"},
            [
                "No validation image of B: only the test set measures how well it is recognised.",
            ],
        ),
        (
            {"A": "tve", "B": "tv"},
            ["No test image of B: the score of the test set says nothing of it."],
        ),
        (
            {"A": "tve", "B": "t"},
            ["No validation image of B: nothing measures how well it is recognised."],
        ),
    ],
)
def test_the_gaps_of_a_split_in_words(parts, sentences):
    assert list(describe_gaps(parts_table(parts))) == sentences


SUBSETS = {
    "train": (
        "train training training_set trainset tr trn train_data TRAIN Training-Images 01_train "
        "TrainingSet traindata train2 trainA Train_WBC 1.Training C-NMC_training_data "
        "Trainingsdaten entrenamiento entraînement eğitim обучение 训练集"
    ),
    "valid": (
        "val valid validation validation_set dev DevSet eval evaluation val2017 valset Val-1 "
        "Validierung validación validação doğrulama 验证集"
    ),
    "test": (
        "test testing test_set testset TestA Test-A TestB TESTB test_simple test2 tst holdout "
        "hold-out HoldOut held_out_set C-NMC_test_final_phase_data C-NMC_test_prelim_phase_data "
        "Testdaten prueba teste тест 测试集"
    ),
    "": (
        "hem all ALL_train A B1 1 tr1x Tr1 Tr_cells trisomy trap trained developing development "
        "dev1 device evaluable evaluated valine invalid testis attested latest contest Trophozoite "
        "training_wheels stress_test Coombs-test train_masks test_labels train_test TrainTest "
        "trainval train_val holdouts Dataset2 images"
    ),
}


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for part, names in SUBSETS.items() for name in names.split()]
)
def test_what_the_name_of_a_folder_says(name, part):
    assert subset_part(name) == part
    assert subset_part(name.replace("_", " ").replace("-", " ")) == part
    assert subset_part(name.upper()) == subset_part(name.lower()) == part


def test_a_folder_without_a_name_says_nothing():
    assert subset_part("") == subset_part("_") == ""


@settings(max_examples=50)
@given(st.text())
def test_any_name_is_read(name):
    assert subset_part(name) in ("train", "valid", "test", "")
