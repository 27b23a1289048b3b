"""The options of a run: one declaration, from which everything else comes."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bloodcell_fastai import BloodcellError, Config, cli
from bloodcell_fastai.config import (
    SPLITS,
    ResolvedConfig,
    fit_command,
    flags,
    options_table,
)
from bloodcell_fastai.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
PANELS = ["Data", "Model", "Training", "Augmentation", "Run"]
each_option = pytest.mark.parametrize("name", Config.model_fields)


def another(name: str) -> object:
    """A value that an option may have, but not its default."""
    default = Config.model_fields[name].default
    schema = Config.model_json_schema()["properties"][name]
    if "enum" in schema:
        return schema["enum"][-1]
    if isinstance(default, int):
        return default + 2
    if isinstance(default, float):
        return 1.125 * default
    return "my 'own' $HOME"


@each_option
def test_every_option_has_a_panel_a_meaning_and_an_allowed_default(name):
    field = Config.model_fields[name]
    assert field.title in PANELS
    assert field.description.endswith(".")
    assert getattr(Config(**{name: field.default}), name) == field.default
    assert another(name) != field.default


def test_options_of_a_panel_stand_together():
    titles = [field.title for field in Config.model_fields.values()]
    assert list(dict.fromkeys(titles)) == PANELS
    assert titles == sorted(titles, key=PANELS.index)


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"size": 16}, "size is 16: input should be greater than or equal to 32.", "Change `size`"),
        ({"size": 9999}, "size is 9999: input should be less than or equal to 4096.", "`size`"),
        ({"epochs": 0}, "epochs is 0: input should be greater than or equal", "Change `epochs`"),
        ({"epochs": "x"}, "epochs is x: input should be a valid integer", "(default: 20): Total"),
        ({"epochs": 1.5}, "epochs is 1.5: input should be a valid integer", "Change `epochs`"),
        ({"epochs": None}, "epochs is None: input should be a valid integer", "Change `epochs`"),
        ({"seed": ""}, "seed is empty: input should be a valid integer", "Change `seed`"),
        ({"bs": 0}, "bs is 0: input should be greater than or equal to 1.", "Change `bs`"),
        ({"lr": 0}, "lr is 0: input should be greater than 0.", "at most 10; auto: found"),
        ({"lr": float("nan")}, "lr is nan: input should be a finite number", "Change `lr`"),
        ({"lr": "fast"}, "lr is fast: input should be a valid number", "auto: found with lr_find."),
        ({"zoom": float("inf")}, "zoom is inf: input should be a finite number.", "Change `zoom`"),
        ({"split": "magic"}, "input should be 'photo', 'official' or 'random'.", "Change `split`"),
        ({"crop": "corner"}, "crop is corner: input should be 'cell' or 'frame'.", "`crop`"),
        (
            {"data": 3},
            "data is 3: input should be a valid string.",
            "Change `data`: Folder, archive",
        ),
        (
            {"labels": "a.csv", "classes_from": "name"},
            "classes_from is name, and labels names a table of the classes",
            "Leave out `classes_from` or `labels`",
        ),
        ({"data": "a\0"}, "input should have at most 4096 characters, none of", "Change `data`: "),
        ({"arch": "x" * 5000}, "x: input should have at most 4096 characters", "Change `arch`"),
        ({"folds": 1}, "folds is 1; it must be 0 or at least 2.", "Change `folds`."),
        ({"folds": 3, "split": "random"}, "folds is 3 with split random", "Use `split=photo`"),
        ({"freeze_epochs": 20}, "freeze_epochs is 20; it must be less than epochs", "`epochs`"),
        ({"bs": 65536, "size": 4096}, "bs is 65536 with size 4096", "Use a smaller `bs`"),
        ({"batch_size": 3}, "batch_size is not an option.", "Options: data, classes_from,"),
        ({"caf\udce9": 3}, "caf\udce9 is not an option.", "Options: data, classes_from,"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values, message, hint):
    for make in (Config, ResolvedConfig, Config().changed, ResolvedConfig().changed):
        with pytest.raises(UsageError) as caught:
            make(**values)
        assert message in caught.value.message
        assert hint in caught.value.hint
        assert "\n" not in caught.value.message + caught.value.hint
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "values",
    [
        {"classes": ["A", "A"]},
        {"classes": ["A/B"]},
        {"classes": [".."]},
        {"classes": [""]},
        {"classes": "AB"},
        {"classes": [1]},
        {"classes": ["x"] * 1001},
        {"warnings": ["a\0"]},
        {"versions": None},
        {"pretrained": "perhaps"},
    ],
)
def test_what_the_options_came_to_is_checked_too(values):
    with pytest.raises(BloodcellError, match=next(iter(values))) as caught:
        ResolvedConfig(**values)
    assert caught.value.hint == "Was the config edited?"


def test_a_config_is_copied_not_changed():
    config = ResolvedConfig(classes=("A", "B"), lr=0.1)
    copy = config.changed(epochs=3)
    assert (config.epochs, copy.epochs, copy.classes, copy.lr) == (20, 3, ("A", "B"), 0.1)
    assert type(copy) is ResolvedConfig
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 3


def test_json_gives_the_same_config():
    asked = Config(data="caf\udce9", lr="auto", folds=3)
    resolved = ResolvedConfig(**asked.changed(lr=1).model_dump(), classes=("A", "B"))
    for config in (asked, resolved):
        assert type(config)(**json.loads(json.dumps(config.model_dump()))) == config


def test_paths_do_for_texts():
    assert Config(data=Path("a") / "b", weights=Path("w")).data == str(Path("a/b"))


def test_what_the_model_started_from_is_told_in_words():
    assert ResolvedConfig(initial_weights="none").start == "random weights"
    assert ResolvedConfig(initial_weights="pbc (blood cells)").start == "pbc (blood cells)"


def test_splits_are_those_of_the_option():
    assert Config.model_json_schema()["properties"]["split"]["enum"] == list(SPLITS)


@pytest.fixture
def parse(monkeypatch):
    """The config that the command line makes of a command, without training."""
    from bloodcell_fastai.evaluation import cross_validation
    from bloodcell_fastai.training import train

    made = []

    def keep(config, *others):
        made.append(config)

    monkeypatch.setattr(train, "train", keep)
    monkeypatch.setattr(cross_validation, "cross_validate", keep)

    def run(command: str) -> Config:
        program, *words = shlex.split(command)
        assert program == "bloodcell"
        dry = ["--dry-run"]  # after which nothing is read from the run, which is not made
        done = CliRunner().invoke(cli.app, words + dry, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return made.pop()

    return run


@each_option
def test_the_command_of_a_config_asks_for_it_again(name, parse):
    config = Config(**{name: another(name)})
    command = fit_command(config)
    if name in ("workers", "device"):  # of the machine
        assert command == fit_command(Config())
        command = f"{command} {flags(name)[0]} {shlex.quote(str(another(name)))}"
    assert parse(command) == config


def test_the_command_names_what_is_not_the_default(parse):
    assert fit_command(Config()) == "bloodcell fit --epochs 20"
    assert parse("bloodcell fit") == Config()
    many = Config(
        data="/my data/it's", lr="auto", bs=3, folds=5, freeze_epochs=0, epochs=2, size=64
    )
    assert parse(fit_command(many)) == many
    assert "--lr auto" in fit_command(many)
    resolved = ResolvedConfig(**many.changed(lr=0.01).model_dump(), classes=("A", "B"))
    assert parse(fit_command(resolved)) == many.changed(lr=0.01)


def test_a_batch_size_can_be_given_by_fastais_name(parse):
    assert parse("bloodcell fit --bs 7") == parse("bloodcell fit --batch-size 7") == Config(bs=7)


def test_the_table_in_the_docs_is_that_of_the_declaration():
    page = (ROOT / "docs" / "training.md").read_text()
    table = page.partition("<!-- options -->\n")[2].partition("<!-- /options -->")[0]
    assert table.strip() == options_table().strip()


@each_option
def test_the_table_has_a_row_for_every_option(name):
    (row,) = [line for line in options_table().splitlines() if f"`{flags(name)[0]}`" in line]
    assert row.count("|") == 5
    assert str(Config.model_fields[name].default) in row
    assert Config.model_fields[name].description in row


def test_options_need_no_more_than_pydantic():
    code = (
        "import sys\nimport bloodcell_fastai.config\n"
        "assert not {'torch', 'fastai', 'timm', 'pandas', 'numpy', 'typer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
