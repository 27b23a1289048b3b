import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bloodcell_fastai import Run, export_run
from bloodcell_fastai.evaluation.interpretation import read_metrics
from bloodcell_fastai.files import write_json
from bloodcell_fastai.model.pretrained import PRETRAINED, pretrained_path
from bloodcell_fastai.serving.card import model_card

WARNING = "DRAWN CELLS, not photographed."


def changed(run: Run, folder: Path, **changes) -> Run:
    """A copy of a run with another resolved config."""
    copy = Run(shutil.copytree(run.path, folder))
    copy.start(run.asked, run.config.changed(**changes), run.table)
    return copy


def test_the_card_of_an_interpreted_run(trained, tmp_path):
    run = changed(trained, tmp_path / "scored", warnings=(WARNING,))
    card, metrics = ModelCard(model_card(run, "timm")), read_metrics(run)
    assert (card.data.library_name, card.data.license) == ("timm", None)
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["Accuracy per image"] == round(metrics["accuracy"], 4)
    assert results["Accuracy per photograph"] == round(metrics["photo_accuracy"], 4)
    assert f"| {metrics['accuracy']:.2%} |" in card.text
    for bound in metrics["photo_accuracy_ci95"]:
        assert f"{bound:.2%}" in card.text
    for name, row in metrics["per_class"].items():
        assert f"| {name} | {row['precision']:.4f} | {row['recall']:.4f} |" in card.text
    temperature = f"{run.calibration.temperature:.3f}"
    for words in (WARNING, "no medical device", "no validation image has a copy", temperature):
        assert words in card.text
    assert str(run.root.parent) not in card.content
    assert "{{" not in card.content


def test_any_name_of_a_class_stays_in_its_cell_of_the_table(trained, tmp_path):
    run = changed(trained, tmp_path / "named")
    values = json.loads((run.path / "metrics.json").read_text())
    names = ["all", "a|b", "c\nd", "items"]
    values |= {"classes": names}
    values["per_class"] = dict(zip(names, values["per_class"].values(), strict=True))
    write_json(run.path / "metrics.json", values)
    card = model_card(run, "timm")
    for shown in ("| all |", "| a\\|b |", "| c d |", "| items |"):
        assert f"\n{shown}" in card


def test_a_run_that_was_not_interpreted(trained, tmp_path):
    run = changed(trained, tmp_path / "unscored")
    (run.path / "metrics.json").unlink()
    card = ModelCard(model_card(run, "timm"))
    assert "Not evaluated" in card.text
    assert card.data.eval_results is None


def test_unknown_photographs(trained, tmp_path):
    run = changed(trained, tmp_path / "unknown")
    run.start(run.asked, run.config, run.table.assign(photo=""))
    card = model_card(run, "timm")
    assert "Leakage: unknown" in card
    assert "and 0 photographs" not in card and "for validation.\n" in card


@pytest.mark.parametrize(("crop", "warned"), [("cell", True), ("frame", False)])
@pytest.mark.parametrize("format", ["timm", "onnx"])
def test_it_says_that_the_model_was_trained_on_a_crop(trained, tmp_path, crop, warned, format):
    card = model_card(changed(trained, tmp_path / "crop", crop=crop), format)
    assert ("crop_image" in card) == ("a **crop** around the white cell" in card) == warned


def test_the_card_of_a_pretrained_model_names_its_images(shipped, tmp_path, monkeypatch):
    source = PRETRAINED["pbc"]
    own = (shipped / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    folder = export_run(Run(shipped), "timm")
    assert folder == Path("runs/pbc/export/timm")  # nothing is written into the package
    for card in (own, (folder / "README.md").read_text(encoding="utf-8")):
        assert ModelCard(card).data.license == "cc-by-4.0"
        for words in (source.citation, source.limits, "no medical device", "name their authors"):
            assert words in card
    assert "Not evaluated" not in own


def test_the_card_that_ships_is_what_would_be_written_now():
    path = pretrained_path("pbc")
    assert (path / "README.md").read_text(encoding="utf-8") == model_card(Run(path), "bundle")


def test_the_card_of_a_model_that_started_from_pretrained_weights(trained, tmp_path):
    changes = {"pretrained": True, "initial_weights": "pbc (blood cells)"}
    card = model_card(changed(trained, tmp_path / "started", **changes), "timm")
    assert f"(cc-by-4.0, trained on the images of {PRETRAINED['pbc'].citation})" in card
    assert ModelCard(card).data.license is None


def test_without_known_photographs_there_is_no_accuracy_by_photograph(trained, tmp_path):
    run = Run(shutil.copytree(trained.path, tmp_path / "run"))
    assert "Accuracy per photograph" in model_card(run, "timm")
    values = json.loads((run.path / "metrics.json").read_text())
    (run.path / "metrics.json").write_text(json.dumps(values | {"n_known": 0}))
    card = model_card(run, "timm")
    assert "Accuracy per image" in card
    assert "Accuracy per photograph" not in card
