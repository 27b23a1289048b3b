"""A run scored on another drawn data set, whose folders are called otherwise."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score
from typer.testing import CliRunner

from bloodcell_fastai import BloodcellError, Predictor, Run, cli, interpret_external
from bloodcell_fastai.data import duplicates
from bloodcell_fastai.data.datasets import read_folder
from bloodcell_fastai.data.demo import make_demo
from bloodcell_fastai.data.duplicates import digest, known_photos, write_known_photos
from bloodcell_fastai.evaluation import external
from bloodcell_fastai.evaluation.interpretation import summarise

NAMES = {"EOSINOPHIL": "EO", "LYMPHOCYTE": "LYT", "NEUTROPHIL": "Segmented neutrophils"}


@pytest.fixture(scope="module")
def other(tmp_path_factory, trained) -> Path:
    """Drawn anew, in folders with other names: no monocyte, a class of noise, and among the
    lymphocytes two images that the run was trained on."""
    home = tmp_path_factory.mktemp("other")
    drawn = read_folder(make_demo(home / "drawn", photos_per_class=3, copies=2, seed=5)).table
    for path, label in zip(drawn.path, drawn.label, strict=True):
        if label in NAMES:
            folder = home / "elsewhere" / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"{len(list(folder.iterdir()))}.jpeg")
    rng = np.random.default_rng(0)
    (home / "elsewhere" / "artefacts").mkdir()
    for number in range(5):
        noise = rng.integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).save(home / "elsewhere" / "artefacts" / f"{number}.png")
    split = trained.table
    lymphocytes = split[(split.label == "LYMPHOCYTE") & (split.part == "train")]
    for number, path in enumerate(lymphocytes.path[:2]):
        shutil.copy(path, home / "elsewhere" / "LYT" / f"seen-{number}.jpeg")
    return home / "elsewhere"


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Run:
    return Run(shutil.copytree(trained.path, tmp_path_factory.mktemp("external") / "mine"))


@pytest.fixture(scope="module")
def scored(run, other):
    return interpret_external(run, read_folder(other))


def test_every_image_is_accounted_for(scored, other, run):
    result, found, folder = scored
    assert folder == run.path / "on" / "elsewhere"
    table = pd.read_csv(folder / "predictions.csv")
    unknown = pd.read_csv(folder / "unknown.csv")
    paths = {path.relative_to(other).as_posix() for path in other.rglob("*.*")}
    left_out = paths - set(table.path) - set(unknown.path)
    assert {Path(path).name for path in left_out} == {"seen-0.jpeg", "seen-1.jpeg"}
    assert not any(Path(path).is_absolute() for path in (*table.path, *table.nearest))
    assert found.excluded == 2
    assert unknown.label.tolist() == ["artefacts"] * 5
    own = {theirs: name for name, theirs in NAMES.items()}
    assert table.label.tolist() == [own[Path(path).parent.name] for path in table.path]
    assert len(table) == result.metrics["n_images"] == len(paths) - 7


def test_predictions_are_those_of_predict(scored, run, other):
    """Images of known and of unknown classes alike, with the same columns and flags."""
    _, _, folder = scored
    predictor = Predictor.load(run, device="cpu")
    for name, more in (
        ("predictions.csv", {"label", "photo", "loss"}),
        ("unknown.csv", {"label", "photo"}),
    ):
        table = pd.read_csv(folder / name, keep_default_na=False)
        again = predictor([other / path for path in table.path])
        assert [column for column in table if column not in more] == list(again)
        assert set(table) - set(again) == more
        assert table.predicted.tolist() == again.predicted.tolist()
        assert table.flag.tolist() == again.flag.tolist()
        for column in ("confidence", "distance"):
            assert np.allclose(table[column], again[column], atol=2e-3)
        assert (run.root / table.nearest[0]).is_file()
        assert (table.nearest.map(lambda path: str(run.root / path)) == again.nearest).mean() > 0.9


def test_a_class_without_images_leaves_the_means_alone(scored):
    result, _, folder = scored
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["per_class"]["MONOCYTE"]["recall"] is None
    assert metrics["per_class"]["MONOCYTE"]["support"] == 0
    table = result.predictions
    there = [name for name in result.classes if name != "MONOCYTE"]
    expected = f1_score(table.label, table.predicted, labels=there, average="macro")
    assert metrics["macro_f1"] == pytest.approx(expected)
    recalls = [(table.predicted[table.label == name] == name).mean() for name in there]
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    report = (folder / "report" / "classification_report.txt").read_text()
    assert "MONOCYTE" not in report
    assert re.search(rf"macro avg +\S+ +\S+ +{metrics['macro_f1']:.4f}", report)


def test_what_is_flagged_as_unlike_training(scored, run):
    _, _, folder = scored
    known, unknown = (
        pd.read_csv(folder / name).distance for name in ("predictions.csv", "unknown.csv")
    )
    found = json.loads((folder / "metrics.json").read_text())["external"]
    limit = run.calibration.distance_threshold
    assert found["flagged_known"] == pytest.approx((known > limit).mean())
    assert found["flagged_unknown"] == pytest.approx((unknown > limit).mean())
    truth = [0] * len(known) + [1] * len(unknown)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, [*known, *unknown]))
    low, high = found["auroc_ci95"]
    assert low <= found["auroc"] <= high
    by_class = {row["theirs"]: row for row in found["classes"]}
    assert by_class["artefacts"]["flagged"] == found["flagged_unknown"]
    assert by_class["artefacts"]["label"] is None
    assert sum(row["images"] for row in found["classes"]) == len(truth)


def test_the_runs_calibration_is_taken_as_it_is(scored, run):
    metrics = scored[0].metrics
    assert metrics["temperature"] == run.calibration.temperature
    assert metrics["ece_uncalibrated"] is not None


def test_the_page_says_first_what_it_is_of(scored):
    _, _, folder = scored
    page = (folder / "report" / "index.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<style>.*</style>|<[^>]*>", "", page, flags=re.DOTALL))
    first = text[: text.index("Model and data")]
    assert "mine on elsewhere" in first
    assert "Another data set" in first
    assert "EO as EOSINOPHIL" in first
    assert "that the data set lacks: MONOCYTE" in first
    assert "does not know: artefacts. Their 5 images" in first
    assert "Left out as trained on: 2 images" in first
    assert "Leakage" not in first
    assert "External testing: on this data set only" in text
    assert "--data" in text
    shown = re.findall(r'data-metric="external\.(\w+)">([^<]*)<', page)
    found = json.loads((folder / "metrics.json").read_text())["external"]
    for name in ("flagged_known", "flagged_unknown", "auroc"):
        assert dict(shown)[name] == f"{100 * found[name]:.1f}\N{NARROW NO-BREAK SPACE}%"


def test_the_terminal_says_so_too(scored, run):
    result, found, _ = scored
    text = summarise(result, run.config, found)
    assert "ANOTHER DATA SET than it was trained on" in text
    assert "Left out as trained on: 2 images" in text
    assert "AUROC of the distance" in text
    assert "Leakage" not in text


def test_the_runs_own_results_stay(scored, run, trained):
    for name in ("predictions.csv", "metrics.json", "report/index.html"):
        assert (run.path / name).read_bytes() == (trained.path / name).read_bytes()


def test_results_have_a_folder_for_each_data_set(scored, run, other, tmp_path):
    assert run.results_on(other) == scored[2]
    assert run.results_on(other, "TEST") == run.path / "on" / "elsewhere-TEST"
    assert run.results_on(tmp_path / "elsewhere") == run.path / "on" / "elsewhere-2"


def test_of_its_own_data_set_only_what_it_has_not_seen_is_left(run, demo):
    found = external.open_external(run, demo)
    split = run.table
    assert set(found.table.path) == set(split.path[split.part != "train"])
    assert found.validated == (split.part == "valid").sum()
    assert found.excluded == (split.part == "train").sum()


def test_copies_of_a_photograph_trained_on_are_not_new(demo_table, tmp_path):
    """Of the Kaggle set, whose copies are known one by one: no file is in both parts."""
    photos = demo_table.photo.unique()
    here = demo_table[demo_table.photo.isin(photos[:2])]
    training, rest = here[::2], demo_table.drop(here[::2].index)
    assert set(training.photo) == set(photos[:2]) == set(here[1::2].photo)
    digests, unknown = rest.path.map(digest), rest.assign(photo="")
    seen = external.seen_in_training(unknown, digests, training.path)
    assert not seen.any()  # it is not known which photograph they are of

    table = tmp_path / "known.csv.xz"
    rows = demo_table.assign(original=demo_table.photo, inliers=9, margin=9)
    write_known_photos(rows, table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external, "known_photos", partial(known_photos, table=table))
        seen = external.seen_in_training(unknown, digests, training.path)
    assert (seen == rest.photo.isin(photos[:2])).all()


def test_lost_training_images_are_reported(trained, other, tmp_path):
    run = Run(shutil.copytree(trained.path, tmp_path / "moved"))
    table = (run.path / "split.csv").read_text()
    (run.path / "split.csv").write_text(table.replace(".jpeg", ".gone"))
    result, found, folder = interpret_external(run, read_folder(other))
    assert found.unchecked == (run.table.part == "train").sum()
    assert found.excluded == 0
    assert result.leakage is None
    assert "NOT CHECKED" in (folder / "report" / "index.html").read_text()


def test_each_file_is_hashed_once(run, demo_table, tmp_path, monkeypatch):
    for label, rows in demo_table.groupby("label"):
        (tmp_path / label).mkdir()
        for path in rows.path[:3]:
            shutil.copy(path, tmp_path / label)
    hashed, blake2b = [], duplicates.hashlib.blake2b
    monkeypatch.setattr(
        duplicates.hashlib, "blake2b", lambda *args, **kw: hashed.append(1) or blake2b(*args, **kw)
    )
    found = external.open_external(run, read_folder(tmp_path))
    in_run = len(run.table)
    assert 12 <= len(hashed) <= 12 + in_run  # those of the run may have been hashed before
    external.open_external(run, read_folder(tmp_path))
    assert len(hashed) <= 12 + in_run
    changed = Path(found.table.path[0])
    changed.write_bytes(changed.read_bytes() + b"more")
    before = len(hashed)
    external.open_external(run, read_folder(tmp_path))
    assert len(hashed) == before + 1


def test_one_subset_alone(run, demo):
    found = external.open_external(run, demo, "test_simple")
    assert set(found.table.subset) == {"TEST_SIMPLE"}
    with pytest.raises(BloodcellError, match="has no subset valid") as caught:
        external.open_external(run, demo, "valid")
    assert "TEST, TEST_SIMPLE, TRAIN" in caught.value.hint


def test_images_of_training_alone_score_nothing(run, tmp_path):
    split = run.table
    for label, rows in split[split.part == "train"].groupby("label"):
        (tmp_path / label).mkdir()
        for path in rows.path[:2]:
            shutil.copy(path, tmp_path / label)
    with pytest.raises(BloodcellError, match="trained on every image of"):
        external.open_external(run, read_folder(tmp_path))


def test_the_pretrained_model_is_scored_on_other_data(
    shipped, trained, demo, tmp_path, monkeypatch
):
    """Its training images are not here to compare with, and its folder is not changed."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in shipped.rglob("*")}
    _, found, folder = interpret_external(Run(shipped), demo)
    assert folder == Path("runs") / "pbc" / "on" / demo.root.name
    assert (folder / "report" / "index.html").is_file()
    assert found.unchecked == (trained.table.part == "train").sum()
    assert {path: path.stat().st_mtime_ns for path in shipped.rglob("*")} == before


def test_the_command_says_what_it_found_and_where_it_is(run, other):
    command = ["interpret", run.name, "--data", str(other), "--runs", str(run.path.parent)]
    done = CliRunner().invoke(cli.app, command, env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert "Unlike training: " in done.output
    written = done.output.splitlines()[-1]
    assert written.startswith(f"Written to {run.path / 'on' / 'elsewhere'}: ")
    for name in written.partition(": ")[2].split(", "):
        assert (run.path / "on" / "elsewhere" / name).is_file()
