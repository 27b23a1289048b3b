import re
import shutil

import numpy as np
import pytest

from bloodcell_fastai import BloodcellError, Run, export_run
from bloodcell_fastai.serving.export.onnx import MAX_RESIZE_DIFFERENCE


@pytest.mark.parametrize("name", ["one", "vit"])
@pytest.mark.parametrize("format", ["timm", "onnx", "fastai"])
def test_the_code_of_the_card_gives_the_probabilities_of_the_run(
    name, format, exported, expected, monkeypatch, capsys
):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    folder = exported(name, format)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    first = expected[name].iloc[0]
    shutil.copy(first.path, folder / "cell.jpg")
    monkeypatch.chdir(folder)
    exec(code.replace("FOLDER", "."), {})
    printed = eval(capsys.readouterr().out.strip().splitlines()[-1])
    probabilities = first.filter(regex="^p_")
    assert list(printed) == [column.removeprefix("p_") for column in probabilities.index]
    tolerance = MAX_RESIZE_DIFFERENCE if format == "onnx" else 1e-5  # its graph resizes itself
    np.testing.assert_allclose(
        list(printed.values()), probabilities.to_numpy(float), atol=tolerance
    )


@pytest.mark.parametrize("format", ["timm", "bundle"])
def test_a_run_is_not_overwritten(run, format):
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(BloodcellError, match="is the run itself, which would be overwritten"):
        export_run(run, format, run.path)
    assert (run.path / "config.json").read_bytes() == before


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(BloodcellError, match="onnx, timm, fastai, bundle") as refused:
        export_run(run, "tflite")
    assert refused.value.exit_code == 2
    empty = Run(tmp_path)
    empty.start(run.asked, run.config, run.table)
    with pytest.raises(BloodcellError, match="no model yet"):
        export_run(empty)


@pytest.mark.parametrize("format", ["onnx", "fastai", "bundle"])
def test_it_needs_the_validation_images(run, tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    gone = Run(shutil.copytree(run.path, tmp_path / "gone"), tmp_path / "nowhere")
    with pytest.raises(BloodcellError, match="images.* gone"):
        export_run(gone, format)
    assert not (gone.path / "export").exists()
    assert export_run(gone, "timm") == gone.path / "export" / "timm"
