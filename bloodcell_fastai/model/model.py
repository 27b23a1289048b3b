"""timm models: made for an input size, with weights of a file, the hub or the package."""

import difflib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
from fastai.vision.all import Learner, get_model
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from ..errors import BloodcellError, DataError, MissingFileError, UsageError, WeightsWarning
from ..files import atomic_path
from .pretrained import PRETRAINED, pretrained_for, pretrained_weights

HUB_TIMEOUT = 5  # seconds to wait for the hub's first answer; with retries well below 15


if TYPE_CHECKING:

    class TimmModel(nn.Module):
        """What every classifier of timm's has and torch's modules have not."""

        num_classes: int
        pretrained_cfg: dict
        forward_features: Callable[[torch.Tensor], torch.Tensor]
        forward_head: Callable[[torch.Tensor], torch.Tensor]
        get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]

else:
    TimmModel = nn.Module


class TimmBody(nn.Module):
    """A timm model up to its feature map; holds the whole model, so that timm can read it."""

    def __init__(self, model: TimmModel):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, h, w) to features, in the shape the architecture gives them."""
        return self.model.forward_features(x)


class TimmHead(nn.Module):
    """timm's own pooling and classifier, from the feature map to the logits.

    The classifier is the very module inside the body's model. The model itself is kept out of
    torch's sight, or its weights would count as the head's. ``vision_learner`` gives the
    classifier fastai's fresh weights (Kaiming): those timm gives some architectures make first
    logits so large that the frozen epoch is spent on undoing them.
    """

    _model: TimmModel

    def __init__(self, model: TimmModel):
        super().__init__()
        self.classifier = model.get_classifier()
        self.__dict__["_model"] = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features to logits (n, classes)."""
        return self._model.forward_head(x)


def timm_model(learn: Learner) -> TimmModel:
    """The timm model inside a learner of :func:`blood_learner`.

    Returns:
        The model that ``timm.create_model`` made, its classifier included: float32 images
        (n, 3, size, size), normalised, to logits (n, classes).

    Raises:
        AttributeError: the learner is not of :func:`blood_learner`.

    Examples:
        >>> from bloodcell_fastai import Run, load_learner, timm_model
        >>> model = timm_model(load_learner(Run.open("mine")))
        >>> model.pretrained_cfg["architecture"], model.num_classes
        ('resnet18', 4)
    """
    return get_model(learn.model)[0].model


def load_model(
    arch: str, n_out: int, size: int, weights: str | Path = "auto"
) -> tuple[TimmModel, str]:
    """Create a timm model and load its initial weights; see :func:`blood_learner`.

    Returns:
        The model, and what it started from, which is ``none``, ``imagenet`` (with timm's tag),
        ``pbc`` (with what that is) or the name of a file.
    """
    weights = str(weights)
    if weights == "auto":
        weights = pretrained_for(arch) or "imagenet"
        if weights == "imagenet" and (reason := _why_no_pretrained(arch)):
            weights = "none"
            warnings.warn(
                f"RANDOM WEIGHTS: {arch} starts from random weights, because {reason} Expect to "
                "train for longer and to reach less. Give a file of weights as `weights`.",
                WeightsWarning,
                stacklevel=3,
            )
    if weights == "none":
        return _create(arch, n_out, size), "none"
    if weights == "imagenet":
        if reason := _why_no_pretrained(arch):
            raise BloodcellError(
                f"No ImageNet weights for {arch}: {reason}",
                "Give a file of weights, or use `weights=none`.",
            )
        return _create(arch, n_out, size, pretrained=True), f"imagenet ({arch})"
    if weights in PRETRAINED:
        path = pretrained_weights(weights, arch)
        used = f"{weights} ({PRETRAINED[weights].images})"
        return _create_from(path, arch, n_out, size), used
    path = Path(weights)
    return _create_from(path, arch, n_out, size), path.name


def load_weights(model: TimmModel, path: Path, classes: Sequence[str] = ()) -> None:
    """Load a run's ``model.safetensors`` into its timm model, every tensor of it.

    Args:
        model: of the run's architecture.
        path: the file.
        classes: of the config, to be those that the file says its outputs are, in their order.

    Raises:
        BloodcellError: the file is missing, holds more than tensors, or does not fit; the
            message counts the missing, unexpected and misshapen tensors.
    """
    state = read_tensors(path)
    classifier = f"{model.pretrained_cfg.get('classifier')}.weight"
    outputs = len(state[classifier]) if classifier in state and state[classifier].ndim else None
    if outputs is not None and outputs != model.num_classes:
        raise DataError(
            f"classes in config.json lists {model.num_classes} names, but {path} has {outputs} "
            "outputs.",
            "Was the config edited? Copy the run again, with all its files.",
        )
    _check_fit(path, state, model.state_dict(), free=())
    own = None
    with safe_open(path, framework="pt") as file, suppress(KeyError, ValueError, RecursionError):
        own = json.loads((file.metadata() or {})["classes"])
    if classes and own is not None and own != list(classes):
        raise DataError(
            f"classes in config.json are not those of {path}.",
            f"Was the config edited? The weights are for {str(own)[:200]}, in this order.",
        )
    model.load_state_dict(state)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` or ``.pth`` file; nothing in it is executed.

    Raises:
        BloodcellError: the file is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise MissingFileError(
            f"No weights file {path}.",
            f"Use auto, {', '.join(PRETRAINED)}, imagenet, none, or the path of a file.",
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that are no pickle torch's reader raises anything
        raise DataError(
            f"{path} is damaged or holds more than tensors, which could run code when loaded.",
            "Copy it again, or save the model's state_dict() as .safetensors and give that.",
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not (
        isinstance(state, Mapping)
        and all(map(torch.is_tensor, state.values()))
        and all(isinstance(key, str) for key in state)
    ):
        raise DataError(f"{path} is not a table of tensors.", "Give a model's state_dict().")
    return dict(state)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, atomically; an error of the disk is an OSError."""
    plain = {key: value.detach().contiguous() for key, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(plain, metadata))


def check_arch(arch: str) -> None:
    """Refuse an architecture timm does not have, and suggest the nearest names.

    Raises:
        BloodcellError: there is no such architecture.
    """
    known = [*timm.list_models(), *timm.list_pretrained()]
    if arch in known:
        return
    near = difflib.get_close_matches(arch, known, n=3, cutoff=0.4)
    raise UsageError(
        f"timm has no architecture {arch!r}.",
        f"Did you mean {' or '.join(near)}?" if near else "See timm.list_models().",
    )


def _create(arch: str, n_out: int, size: int, **kwargs) -> TimmModel:
    """A timm model that takes ``size`` pixels, tried on an empty image.

    Some architectures accept a size when they are made and fail in their first batch.
    """
    check_arch(arch)  # outside of the block, whose errors are about the size
    try:
        model, _ = create_sized(arch, n_out, size, **kwargs)
        _try_forward(model, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{arch} cannot take {size} px: {reason}.", _size_hint(arch, size)
        ) from None
    return model


def create_sized(arch: str, n_out: int, size: int, **kwargs) -> tuple[TimmModel, dict[str, int]]:
    """A timm model for ``size`` pixels, and what ``timm.create_model`` was told of the size.

    That is ``img_size``, or nothing where the architecture takes any size.

    Raises:
        BloodcellError: timm has no such architecture; nothing is fetched from a hub or a folder,
            which timm would do for some names.
    """
    check_arch(arch)
    sized = {"img_size": size}
    try:
        return timm.create_model(arch, num_classes=n_out, **sized, **kwargs), sized
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(arch, num_classes=n_out, **kwargs), {}


def _try_forward(model: nn.Module, size: int) -> None:
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, size, size))
    model.train()


def _size_hint(arch: str, size: int) -> str:
    below = size // 32 * 32
    fitting = []
    for candidate in (below, below + 32):
        with suppress(AssertionError, RuntimeError, ValueError, ZeroDivisionError):
            _try_forward(create_sized(arch, 2, candidate)[0], candidate)
            fitting.append(str(candidate))
    if not fitting:
        return "Use a multiple of 32."
    return f"Use `size` {' or '.join(fitting)} (multiples of 32)."


def _create_from(path: Path, arch: str, n_out: int, size: int) -> TimmModel:
    """A timm model with the weights of a file, adapted by timm as its own weights are:
    position biases resized, the classifier of other classes dropped."""
    state = read_tensors(path)
    fresh = _create(arch, n_out, size)
    classifier = f"{fresh.pretrained_cfg.get('classifier')}."
    _check_fit(path, state, fresh.state_dict(), free=(classifier, *_RESIZED))
    # In half precision timm would resize the position biases so too.
    state = {key: v.float() if v.is_floating_point() else v for key, v in state.items()}
    rows = [len(value) for key, value in state.items() if key == f"{classifier}weight"]
    if not rows:  # timm drops the file's classifier before loading and expects one to drop
        new = {k: v for k, v in fresh.state_dict().items() if k.startswith(classifier)}
        state, rows = state | new, [n_out]
    overlay = {"state_dict": state, "num_classes": rows[0]}
    return _create(arch, n_out, size, pretrained=True, pretrained_cfg_overlay=overlay)


_RESIZED = ("relative_position", "pos_embed", "attn_mask")  # what depends on the input's size


def _check_fit(path: Path, state: Mapping, expected: Mapping, free: tuple[str, ...]) -> None:
    own, given = (
        {k: v.shape for k, v in tensors.items() if not any(part in k for part in free)}
        for tensors in (expected, state)
    )
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    misshapen = [key for key in own.keys() & given.keys() if own[key] != given[key]]
    if missing or unknown or misshapen:
        raise DataError(
            f"{path} does not fit the architecture: of its {len(expected)} tensors {len(missing)} "
            f"are missing and {len(misshapen)} have another shape; {len(unknown)} are unknown.",
            "Give the `arch` that the weights were trained with.",
        )


def _why_no_pretrained(arch: str) -> str | None:
    """Why timm's weights for ``arch`` cannot be had now; None if they can."""
    check_arch(arch)
    config = timm.get_pretrained_cfg(arch)
    if config is None or not config.has_weights:
        return "timm has no weights for it."
    if not config.hf_hub_id:
        return None
    if isinstance(try_to_load_from_cache(config.hf_hub_id, SAFETENSORS_SINGLE_FILE), str):
        return None
    try:
        url = hf_hub_url(config.hf_hub_id, SAFETENSORS_SINGLE_FILE)
        get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub's client has changed its HTTP library, and its errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return f"Hugging Face cannot be reached ({reason})."
    return None
