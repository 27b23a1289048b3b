import shutil
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from bloodcell_fastai import BloodcellError, Config, Predictor, Run, train
from bloodcell_fastai.config import DEFAULT_ARCH, ResolvedConfig
from bloodcell_fastai.errors import WeightsWarning
from bloodcell_fastai.model import model as model_module
from bloodcell_fastai.model import pretrained
from bloodcell_fastai.model.model import load_model
from bloodcell_fastai.model.pretrained import PRETRAINED, pretrained_for, pretrained_path
from bloodcell_fastai.model.runs import open_model
from bloodcell_fastai.serving.export.bundle import half_precision

USED = "pbc (blood cells, Acevedo et al. 2020)"
REAL = pretrained.FOLDER / "pbc"


@pytest.fixture
def no_network(monkeypatch):
    def reached(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(model_module, "get_hf_file_metadata", reached)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", reached)


@pytest.mark.parametrize(
    ("arch", "weights"), [("resnet18", "pbc"), ("resnet18", "auto"), ("resnet18.a1_in1k", "auto")]
)
def test_a_model_starts_from_it_without_a_network(shipped, no_network, arch, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error", WeightsWarning)
        model, used = load_model(arch, 3, 64, weights)
    assert used == USED
    theirs, ours = load_file(shipped / "model.safetensors"), model.state_dict()
    for name, value in ours.items():
        assert value.dtype is not torch.float16
        if not name.startswith("fc."):
            assert torch.equal(value, theirs[name].to(value.dtype)), name
    assert ours["fc.weight"].shape == (3, 512)


def test_auto_passes_it_over_for_another_architecture(shipped, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("name or service not known")

    monkeypatch.setattr(model_module, "get_hf_file_metadata", unreachable)
    assert pretrained_for("tf_efficientnet_lite0") is None
    with pytest.warns(WeightsWarning, match="RANDOM WEIGHTS"):
        assert load_model("tf_efficientnet_lite0", 4, 64, "auto")[1] == "none"


def test_the_architecture_must_be_its_own(shipped):
    with pytest.raises(BloodcellError, match="weights pbc are for resnet18, not for r") as refused:
        load_model("resnet34", 4, 64, "pbc")
    assert "`arch=resnet18`" in refused.value.hint


def test_an_installation_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    with pytest.raises(BloodcellError, match="pbc is missing from this installation") as missing:
        load_model("resnet18", 4, 64, "pbc")
    assert "bloodcell fit" in missing.value.hint
    assert pretrained_for("resnet18") is None
    with pytest.raises(BloodcellError, match="missing from this installation"):
        open_model(None, tmp_path / "runs")


def test_position_biases_in_half_precision_are_resized_in_full(demo_table, tmp_path, monkeypatch):
    """As those of the same weights in float32, but for the rounding of the file."""
    small = timm.create_model(DEFAULT_ARCH, num_classes=8, img_size=64)
    for name, value in small.state_dict().items():
        if "relative_position_bias_table" in name:
            value.normal_()
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    run, classes = Run(tmp_path / "pbc"), tuple("abcdefgh")
    run.save_weights(half_precision(small.state_dict()), classes)
    run.start(Config(), ResolvedConfig(classes=classes), demo_table.assign(part="train"))
    save_file(small.state_dict(), tmp_path / "whole.safetensors")
    ours = load_model(DEFAULT_ARCH, 4, 96, "auto")[0].state_dict()
    exact = load_model(DEFAULT_ARCH, 4, 96, tmp_path / "whole.safetensors")[0].state_dict()
    tables = [name for name in exact if "relative_position_bias_table" in name]
    assert any(exact[name].shape != small.state_dict()[name].shape for name in tables)
    for name in tables:
        assert torch.allclose(ours[name], exact[name], atol=5e-3)


def test_a_run_says_that_it_started_from_it(shipped, no_network, demo_root, tmp_path):
    lines = []
    reporter = type("Lines", (), {"say": lines.append, "warn": lines.append})()
    reporter.progress = lambda *args: None
    config = Config(data=str(demo_root), arch="resnet18", size=64, bs=16, device="cpu")
    run = train(config, tmp_path, "plan", dry_run=True, reporter=reporter)
    assert (run.config.initial_weights, run.config.pretrained) == (USED, True)
    assert USED in "\n".join(lines)
    assert not any("RANDOM" in warning for warning in run.config.warnings)


def test_which_model_predicts(shipped, trained, tmp_path, capsys):
    assert open_model(None, tmp_path).path == shipped
    told = capsys.readouterr().err
    for words in ("PRETRAINED MODEL", "pbc", "Acevedo", "one laboratory", "no medical device"):
        assert words in told
    assert all(name in told for name in trained.config.classes)
    root = tmp_path / "runs"
    trained = Run(shutil.copytree(trained.path, root / "trained"))
    assert open_model(None, root).path == trained.path
    assert open_model("trained", root).path == trained.path
    begun = Run.create(root, "begun")
    begun.start(trained.asked, trained.config, trained.table)  # and was stopped in its first epoch
    assert open_model(None, root).path == trained.path
    assert capsys.readouterr().err == ""
    assert open_model("pbc", root).path == shipped
    assert "PRETRAINED MODEL" in capsys.readouterr().err


def test_a_run_of_that_name_comes_first(shipped, trained, tmp_path, capsys):
    own = Run(tmp_path / "pbc")
    own.start(trained.asked, trained.config, trained.table)
    assert open_model("pbc", tmp_path).path == own.path
    assert capsys.readouterr().err == ""


def test_what_ships_with_the_package(demo_table):
    """The real files: small, of the default architecture, described, and fit to predict."""
    assert pretrained_path("pbc") == REAL
    files = [path for path in REAL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert pretrained_for(DEFAULT_ARCH) == "pbc"
    run = Run(REAL)
    for config in (run.asked, run.config):
        assert "/" not in config.data + config.weights
    listed = run.relative(run.table).path
    assert len(listed) == 11_452 and not listed.str.startswith("/").any()
    assert PRETRAINED["pbc"].citation in (REAL / "README.md").read_text(encoding="utf-8")
    table = Predictor.load(run, device="cpu")(demo_table.path[:4])
    assert len(table.filter(like="p_").columns) == len(run.config.classes) == 8
    assert table.distance.between(0, 2).all()
