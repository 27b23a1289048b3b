import json

import pytest

from bloodcell_fastai import BloodcellError, Config


def test_round_trip(tmp_path):
    config = Config(epochs=3, lr=0.002, classes=("A", "B"), pretrained=True)
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"size": 8},
        {"batch_size": 0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"label_smoothing": 1.0},
        {"seed": -1},
        {"rotate": 720.0},
        {"epochs": 2, "freeze_epochs": 2},
        {"split": "magic"},
        {"crop": "corner"},
    ],
)
def test_nonsense_is_refused_by_name(wrong):
    with pytest.raises(BloodcellError, match=list(wrong)[-1]) as caught:
        Config(**wrong)
    assert caught.value.exit_code == 2
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not JSON"),
        ("[1]", "no table of values"),
        (json.dumps({"epoch": 3}), "unknown option 'epoch'"),
        (json.dumps({"epochs": "3"}), "epochs has the wrong type"),
        (json.dumps({"epochs": True}), "epochs has the wrong type"),
        (json.dumps({"classes": [1]}), "classes has the wrong type"),
        (json.dumps({"epochs": 0}), "epochs is 0"),
    ],
)
def test_an_edited_file_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BloodcellError, match=message):
        Config.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(BloodcellError, match="is missing"):
        Config.load(tmp_path / "config.json")


def test_whole_numbers_do_for_decimals(tmp_path):
    (tmp_path / "config.json").write_text('{"lr": 1}')
    assert Config.load(tmp_path / "config.json").lr == 1


def test_a_run_from_before_there_was_a_choice_saw_whole_frames(tmp_path):
    Config(crop="cell").save(tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    assert Config.load(tmp_path / "config.json").crop == values.pop("crop") == "cell"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Config.load(tmp_path / "config.json").crop == "frame"
