import json
import subprocess
import sys

import numpy as np

from bloodcell_fastai.data.crop import crop_image
from bloodcell_fastai.data.images import open_image

WITHOUT_THIS_PACKAGE = """
import json, sys
for name in ("bloodcell_fastai", "fastai"):
    sys.modules[name] = None
import timm, torch
from PIL import Image

found = {}
for folder, paths in json.loads(sys.argv[1]).items():
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    prepare = timm.data.create_transform(**config)
    images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        found[folder] = {
            "probabilities": model(images).softmax(dim=1).tolist(),
            "config": config,
            "labels": model.pretrained_cfg["label_names"],
            "classes": model.num_classes,
        }
print(json.dumps(found))
"""


def test_timm_alone_predicts_what_the_run_does(run, vit, exported, expected, tmp_path):
    """In a process that can import neither this package nor fastai."""
    asked = {}
    for each in (run, vit):
        (tmp_path / each.name).mkdir()
        crops = asked[str(exported(each.name, "timm"))] = []
        for number, path in enumerate(expected[each.name].path):
            crops.append(str(tmp_path / each.name / f"{number}.png"))
            crop_image(open_image(path), each.config.crop).image.save(crops[-1])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THIS_PACKAGE, json.dumps(asked)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for each in (run, vit):
        own, table = found[str(exported(each.name, "timm"))], expected[each.name]
        np.testing.assert_allclose(
            own["probabilities"], table.filter(regex="^p_").to_numpy(), atol=1e-5
        )
        assert own["labels"] == list(each.config.classes)
        assert own["classes"] == len(own["labels"])
        assert own["config"]["input_size"] == [3, 64, 64]
        assert own["config"]["crop_mode"] == "squash"
        mean = [0.5, 0.5, 0.5] if each is vit else [0.485, 0.456, 0.406]
        assert own["config"]["mean"] == mean


def test_the_size_is_told_only_where_the_architecture_asks(exported):
    texts = {
        name: json.loads((exported(name, "timm") / "config.json").read_text())
        for name in ("one", "vit")
    }
    assert "img_size" not in texts["one"].get("model_args", {})
    assert texts["vit"]["model_args"]["img_size"] in (64, [64, 64])
    described = texts["one"]["pretrained_cfg"]
    assert (described["first_conv"], described["classifier"]) == ("conv1", "fc")
    assert not {"tag", "license", "url", "hf_hub_id"} & described.keys()
    assert texts["one"]["num_features"] == 512
    assert texts["one"]["global_pool"] == "avg"
