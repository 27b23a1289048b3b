"""For ONNX Runtime: one graph from the pixels of a crop to calibrated probabilities."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from timeit import Timer
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ... import __version__
from ...data.cache import PictureBatch
from ...data.crop import crop_image
from ...data.images import open_image
from ...errors import BloodcellError
from ...files import atomic_path
from ...model.inference import Predictor
from ...model.runs import Run
from ...reporter import Reporter
from .common import largest_difference, probabilities, timm_copy, validation_pictures

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

OPSET = 18  # the first whose Resize knows antialiasing
CHECKED_IMAGES = 32
MAX_DIFFERENCE = 1e-4  # of a probability, from PyTorch, for the same pixels in float32
MAX_RESIZE_DIFFERENCE = 0.02  # of a probability, once ONNX has resized the image itself
TIMED_IMAGES = 16
PREPROCESSING = (
    "images: uint8 RGB (n, height, width, 3), any height and width, not normalised; {part}. "
    "The graph resizes them to {size} x {size} (bilinear with antialiasing, aspect ratio not "
    "kept), scales to 0..1 and normalises. probabilities: float32 (n, {classes}), rows sum to 1."
)
PARTS = {
    "cell": "the crop that bloodcell_fastai.data.crop.crop_image makes around the white cell",
    "frame": "the whole image",
}


def write(run: Run, folder: Path, reporter: Reporter) -> list[str]:
    """Write ``model.onnx`` if its probabilities are PyTorch's, and tell how fast it is; its name.

    Raises:
        BloodcellError: they differ, a package is missing, torch cannot convert the model, or the
            validation images are gone.
    """
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_module(package)
    except ImportError:
        raise BloodcellError(
            f"ONNX export needs the package {package}, which is not installed.",
            'Install it: pip install "bloodcell-fastai[export]"',
        ) from None
    predictor = Predictor.load(run, device="cpu", full_precision=True)
    pictures = validation_pictures(run, predictor, CHECKED_IMAGES)
    with atomic_path(folder / "model.onnx") as temporary:
        write_graph(run, predictor, temporary)
        for line in check_graph(predictor, temporary, pictures):
            reporter.say(line)
    return ["model.onnx"]


class PixelsToProbabilities(nn.Module):
    """A predictor's network with what comes before and after it, for callers without this package.

    Args:
        predictor: its temperature divides the logits (Guo et al. 2017).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.model, _ = timm_copy(predictor, exportable=True)
        self.size, self.temperature = predictor.size, predictor.temperature
        for name in ("mean", "std"):
            values = torch.tensor(self.model.pretrained_cfg[name])
            self.register_buffer(name, values.view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (n, h, w, 3) to probabilities (n, classes).

        The images stay uint8 while they are resized: ONNX Runtime's antialiased Resize is
        then Pillow's algorithm, in integers, and differs from it by one level in the odd pixel.
        """
        pixels = nn.functional.interpolate(
            images.permute(0, 3, 1, 2), (self.size, self.size), mode="bilinear", antialias=True
        )
        inputs = (pixels.float() / 255 - self.mean) / self.std
        return (self.model(inputs) / self.temperature).softmax(dim=1)


def write_graph(run: Run, predictor: Predictor, path: Path) -> None:
    """Write the ONNX graph of :class:`PixelsToProbabilities`.

    Raises:
        BloodcellError: torch cannot convert the architecture.
    """
    size = predictor.size
    example = torch.zeros(2, size + 1, size + 2, 3, dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            PixelsToProbabilities(predictor).eval(),
            (example,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: "n", 1: "height", 2: "width"},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise BloodcellError(
            f"torch cannot convert {predictor.arch} to ONNX: {reason}", "Use `format=timm`."
        ) from error
    assert program is not None  # as dynamo makes it
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which name folders of this machine
    config, prepared = run.config, predictor.model.pretrained_cfg
    program.model.metadata_props.update(
        classes=json.dumps(config.classes),
        preprocessing=PREPROCESSING.format(
            part=PARTS[config.crop], size=size, classes=len(config.classes)
        ),
        size=str(size),
        mean=json.dumps(prepared["mean"]),
        std=json.dumps(prepared["std"]),
        temperature=str(predictor.temperature),
        architecture=config.arch,
        run=run.name,
        warnings=json.dumps(config.warnings),
        made_by=f"bloodcell-fastai {__version__}",
    )
    program.save(path)


def check_graph(predictor: Predictor, path: Path, pictures: PictureBatch) -> list[str]:
    """Compare an ONNX file with PyTorch on images; lines that tell how it did.

    Two differences count: that of the network, for the pixels that PyTorch gets, which Resize
    leaves as they are, and that of the whole way, for the files' own pixels.

    Raises:
        BloodcellError: one of the differences is too large.
    """
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = probabilities(predictor, pictures)
    pixels = pictures.pixels.permute(0, 2, 3, 1).contiguous().numpy()
    crops = [crop_image(open_image(name), predictor.crop).image for name in pictures.paths]
    from_crops = np.concatenate([_run(session, np.asarray(crop)[None]) for crop in crops])
    network = largest_difference(_run(session, pixels), expected)
    whole = largest_difference(from_crops, expected)
    for difference, limit, where in (
        (network, MAX_DIFFERENCE, "for the same pixels"),
        (whole, MAX_RESIZE_DIFFERENCE, "with its own resizing"),
    ):
        if not difference <= limit:  # NaN too
            raise BloodcellError(
                f"The ONNX file's probabilities differ from PyTorch's {where}: on {len(crops)} "
                f"images by up to {difference:.1e}, more than {limit:.0e}. It was not kept.",
                "Use `format=timm`, or try other versions of torch, onnxscript and onnxruntime.",
            )
    few, batch = pixels[:TIMED_IMAGES], pictures.pixels[:TIMED_IMAGES]
    onnx_rate = images_per_second(lambda: _run(session, few), len(few))
    torch_rate = images_per_second(lambda: predictor.forward(batch), len(batch))
    return [
        f"Checked on {len(crops)} validation images: probabilities differ from PyTorch by at "
        f"most {network:.1e}; by {whole:.1e} with the graph's own resizing.",
        f"Speed on the CPU, float32, batches of {len(few)}: ONNX Runtime {onnx_rate:,.1f} "
        f"images/s, PyTorch {torch_rate:,.1f} images/s.",
    ]


def images_per_second(predict: Callable[[], object], images: int) -> float:
    """How many images a second ``predict``, which does ``images`` at a time, does once warm."""
    predict()
    calls, seconds = Timer(predict).autorange()
    return calls * images / seconds


def _run(session: "InferenceSession", images: np.ndarray) -> np.ndarray:
    return session.run(["probabilities"], {"images": images})[0]
