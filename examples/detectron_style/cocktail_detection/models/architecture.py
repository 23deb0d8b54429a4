"""What the example needs to know of a kind of detector: how it is built, run, and what of it can be distilled."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import Config, ConfigError
from ..data import DetectionBatch

Detection = dict[str, Tensor]
"""Of one image, in the pixels in which it was given: ``boxes`` (n, 4) as x0, y0, x1, y1, ``labels`` (n,) from 1,
``scores`` (n,), and for masks ``masks`` (n, 1, height, width) of probabilities."""


@dataclass(frozen=True)
class Losses:
    """What a detector gives in training.

    Attributes:
        losses: Scalars by name; their sum is the loss.
        features: Maps ``(batch, channels, height, width)`` or sequences of the dense network's, which sparse ones are
            to have as well.
        logits: Class logits of places that do not depend on what the network proposes (anchors, queries), so that two
            networks' can be compared.
    """

    losses: Mapping[str, Tensor]
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Architecture:
    """A kind of detector.

    Attributes:
        build: ``build(cfg, classes)``: the model for so many classes, without a background.
        losses: ``losses(model, batch)``: of a model in train mode.
        detect: ``detect(model, images)``: of a model in eval mode.
        example: ``example(images)``: positional and keyword arguments of a pass in eval mode, to trace it by.
        masks: Whether it learns masks.
        softmax: Whether its logits are of classes that exclude each other, a background among them.
    """

    build: Callable[[Config, int], nn.Module]
    losses: Callable[[nn.Module, DetectionBatch], Losses]
    detect: Callable[[nn.Module, list[Tensor]], list[Detection]]
    example: Callable[[list[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
    masks: bool = False
    softmax: bool = False

    def forward(self, model: nn.Module, batch: DetectionBatch) -> tuple[Any, list[dict[str, Any]]]:
        """``BatchSettings.forward_fn``: losses in train mode, detections in eval mode; and the targets."""
        if model.training:
            return self.losses(model, batch), batch.targets
        return self.detect(model, batch.images), batch.targets


ARCHITECTURES: dict[str, Architecture] = {}
"""By name; put your own here."""


def architecture_of(cfg: Config) -> Architecture:
    """The architecture that a configuration names.

    Raises:
        ConfigError: There is none.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ARCHITECTURES)}"
        raise ConfigError(f"MODEL.META_ARCHITECTURE is {name!r}, which is not known; {hint}")
    return ARCHITECTURES[name]


def build_model(cfg: Config, classes: int) -> nn.Module:
    """The model that a configuration describes, from MODEL.WEIGHTS or at random from SEED.

    Raises:
        ConfigError: It is not known, or the weights are not its.
    """
    architecture = architecture_of(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.SEED)
        model = architecture.build(cfg, classes)
    if cfg.MODEL.WEIGHTS:
        load_weights(model, Path(cfg.MODEL.WEIGHTS).expanduser())
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a model's tensors, or those of its backbone alone; heads of other classes stay as they are.

    Raises:
        ConfigError: The file cannot be read, or holds nothing of the model.
    """
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"MODEL.WEIGHTS: {path} cannot be read as tensors: {error}") from error
    found = found.get("model", found)
    own = model.state_dict()
    for prefix in ("", "backbone.", "backbone.body.", "model."):
        fitting = {f"{prefix}{n}": t for n, t in found.items() if f"{prefix}{n}" in own}
        fitting = {n: t for n, t in fitting.items() if own[n].shape == t.shape}
        if fitting:
            model.load_state_dict(fitting, strict=False)
            return
    raise ConfigError(f"MODEL.WEIGHTS: {path} holds no tensor of the names and shapes of {type(model).__name__}")
