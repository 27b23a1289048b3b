import json
import shutil

import pandas as pd
import pytest

from bloodcell_fastai import BloodcellError, Config, Run, split_table
from bloodcell_fastai.config import ResolvedConfig
from bloodcell_fastai.data.datasets import read_folder
from bloodcell_fastai.data.duplicates import known_photos
from bloodcell_fastai.evaluation.audit import audit, copy_pairs, describe_audit, write_audit


@pytest.fixture(scope="module")
def audited(demo):
    return audit(demo, rebuild=True)


def test_the_photographs_of_the_demo_are_found(audited, demo_table):
    found = audited.table.groupby("photo").path.apply(frozenset)
    truth = demo_table.groupby("photo").path.apply(frozenset)
    assert set(found) == set(truth)
    assert audited.rebuilt


def test_leakage_of_every_split(audited):
    assert audited.leakages["random"] > 0.5
    assert audited.leakages["photo"] == 0
    assert 0 < audited.leakages["official"] < 0.5  # the demo has a field on both sides


def test_the_pair_across_the_official_split_is_named(audited):
    (pair,) = audited.official_pairs
    assert pair["train"] and pair["valid"]
    assert not set(pair["train"]) & set(pair["valid"])
    assert pair["train"][0] in describe_audit(audited)


def test_files(audited, demo, tmp_path):
    written = write_audit(audited, tmp_path, demo.root)
    assert {path.name for path in written} == {
        *("photos.csv", "audit.json", "copies-random.png", "copies-official.png"),
        "known_photos.csv.xz",
    }
    again = known_photos(demo.table.path, tmp_path / "known_photos.csv.xz")
    assert again.photo.tolist() == audited.table.photo.tolist()
    photos = pd.read_csv(tmp_path / "photos.csv")
    assert list(photos.columns) == ["path", "photo"]
    assert (demo.root / photos.path[0]).is_file()
    summary = json.loads((tmp_path / "audit.json").read_text())
    assert summary["n_images"] == len(demo.table)
    assert summary["n_photographs"] == 32
    assert summary["n_fields"] == 31
    assert summary["exact_duplicates"] == 0
    assert summary["contradictory_labels"] == []


def test_a_contradiction_is_reported(audited):
    table = audited.table.copy()
    first = table.photo.iloc[0]
    table.loc[table.index[0], "label"] = "NEUTROPHIL"
    contradicting = type(audited)(table, audited.splits, True)
    (found,) = contradicting.contradictions
    assert found["photo"] == first
    assert found["labels"]["NEUTROPHIL"] == 1
    assert found["overlap"] > 0.5  # copies of one photograph
    assert f"Contradictory labels of field {first}" in describe_audit(contradicting)


def test_pairs_are_a_copy_in_training_and_one_in_validation(audited):
    split = audited.splits["random"].set_index("path")
    pairs = copy_pairs(audited.splits["random"])
    assert len(pairs) == split.label.nunique()
    for train, valid in pairs:
        assert (split.part[train], split.part[valid]) == ("train", "valid")
        assert split.original[train] == split.original[valid]


@pytest.fixture
def run(demo, demo_table, tmp_path):
    run = Run(tmp_path / "mine")
    config = ResolvedConfig(data=str(demo.root))
    run.start(Config(), config, split_table(demo_table, "random"))
    return run


@pytest.mark.slow
def test_the_split_of_a_run_is_measured(demo, run):
    assert audit(demo, rebuild=True, run=run).leakages["run mine"] > 0.5


@pytest.mark.slow
def test_the_data_may_have_been_moved(demo, run, tmp_path):
    moved = read_folder(shutil.copytree(demo.root, tmp_path / "moved"))
    assert audit(moved, rebuild=True, run=run).leakages["run mine"] > 0.5


@pytest.mark.slow
def test_a_run_of_another_data_set_is_refused(demo, run):
    elsewhere = run.table.assign(path=[f"/elsewhere/{i}.jpg" for i in range(len(run.table))])
    run.start(run.asked, run.config, elsewhere)
    with pytest.raises(BloodcellError, match="mine was not validated on images of"):
        audit(demo, run=run)
