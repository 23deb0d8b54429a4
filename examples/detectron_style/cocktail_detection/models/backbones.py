"""Backbones: what turns images into maps of features."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from ..config import Config, ConfigError

Backbone = Callable[[Config, list[int], ExtraFPNBlock | None], nn.Module]
"""``backbone(cfg, levels, extra)``: a module with ``out_channels`` that returns one map or an ordered dict of maps; of
a feature pyramid, ``levels`` are the stages (1 has stride 4) that it is made of, and ``extra`` adds levels above."""

BACKBONES: dict[str, Backbone] = {}


def register_backbone(name: str) -> Callable[[Backbone], Backbone]:
    """Make a backbone known to configurations by a name."""

    def registered(backbone: Backbone) -> Backbone:
        BACKBONES[name] = backbone
        return backbone

    return registered


def build_backbone(cfg: Config, levels: list[int], extra: ExtraFPNBlock | None = None) -> nn.Module:
    """The backbone that a configuration names: one that is registered, or a ResNet or VGG of torchvision.

    Raises:
        ConfigError: There is none of that name.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name in BACKBONES:
        return BACKBONES[name](cfg, levels, extra)
    resnets = torchvision.models.list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])
    known = resnets + torchvision.models.list_models(torchvision.models, include="vgg*")
    if name not in known:
        near = difflib.get_close_matches(name, [*BACKBONES, *known], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*BACKBONES, *known])}"
        raise ConfigError(f"MODEL.BACKBONE.NAME is {name!r}, which is not known; {hint}")
    return _resnet(cfg, levels, extra) if name in resnets else _vgg(cfg, levels, extra)


def _resnet(cfg: Config, levels: list[int], extra: ExtraFPNBlock | None) -> nn.Module:
    """A ResNet with a feature pyramid."""
    norms = {"BN": nn.BatchNorm2d, "FrozenBN": FrozenBatchNorm2d}
    if cfg.MODEL.BACKBONE.NORM not in norms:
        raise ConfigError(f"MODEL.BACKBONE.NORM is {cfg.MODEL.BACKBONE.NORM!r}; it is one of {', '.join(norms)}")
    if not cfg.MODEL.BACKBONE.FPN:
        raise ConfigError("a ResNet comes with a feature pyramid: leave MODEL.BACKBONE.FPN at true")
    body = torchvision.models.get_model(
        cfg.MODEL.BACKBONE.NAME, weights=None, norm_layer=norms[cfg.MODEL.BACKBONE.NORM]
    )
    widths = [_width(getattr(body, f"layer{i}")) for i in levels]
    layers = {f"layer{i}": str(n) for n, i in enumerate(levels)}
    return BackboneWithFPN(body, layers, widths, cfg.MODEL.BACKBONE.FPN_CHANNELS, extra or LastLevelMaxPool())


def _vgg(cfg: Config, levels: list[int], extra: ExtraFPNBlock | None) -> nn.Module:
    """A VGG: its last map, of stride 16, as in the first detectors; or a feature pyramid."""
    features = torchvision.models.get_model(cfg.MODEL.BACKBONE.NAME, weights=None).features[:-1]
    widths = [m.out_channels for m in features if isinstance(m, nn.Conv2d)]
    if not cfg.MODEL.BACKBONE.FPN:
        features.out_channels = widths[-1]
        return features
    pools = [i for i, m in enumerate(features) if isinstance(m, nn.MaxPool2d)]
    ends = [*(i - 1 for i in pools[1:]), len(features) - 1]  # the last of the stages of strides 2, 4, 8, 16
    chosen = [ends[i] for i in levels if i < len(ends)]
    found = [_width(features[: end + 1]) for end in chosen]
    layers = {str(end): str(n) for n, end in enumerate(chosen)}
    return BackboneWithFPN(features, layers, found, cfg.MODEL.BACKBONE.FPN_CHANNELS, extra or LastLevelMaxPool())


def _width(stage: nn.Module) -> int:
    """Channels of what a stage returns: its last convolution's, as in all of these."""
    return int([m.out_channels for m in stage.modules() if isinstance(m, nn.Conv2d)][-1])
