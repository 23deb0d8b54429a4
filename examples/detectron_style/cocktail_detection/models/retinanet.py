"""RetinaNet, of torchvision."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ..config import Config, ConfigError
from ..data import DetectionBatch
from .architecture import ARCHITECTURES, Architecture, Losses
from .backbones import build_backbone
from .rcnn import detect, example
from .seen import outputs_of, tensors_of
from .unresized import unresized

LEVELS = [2, 3, 4]


def build(cfg: Config, classes: int) -> nn.Module:
    """A one-stage detector; labels begin with 1, and class 0 is not used."""
    width = cfg.MODEL.BACKBONE.FPN_CHANNELS
    backbone = build_backbone(cfg, LEVELS, LastLevelP6P7(width, width))
    found = cfg.MODEL.ANCHORS.SIZES
    if len(found) != len(LEVELS) + 2:
        raise ConfigError(f"MODEL.ANCHORS.SIZES has {len(found)} sizes; RetinaNet has {len(LEVELS) + 2} levels")
    sizes = tuple((size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in found)
    anchors = AnchorGenerator(sizes, (tuple(cfg.MODEL.ANCHORS.RATIOS),) * len(sizes))
    model: nn.Module = RetinaNet(
        backbone,
        num_classes=classes + 1,
        anchor_generator=anchors,
        head=RetinaNetHead(backbone.out_channels, anchors.num_anchors_per_location()[0], classes + 1),
        score_thresh=cfg.TEST.SCORE_THRESH,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    model.transform = unresized(cfg)
    return model


def losses(model: nn.Module, batch: DetectionBatch) -> Losses:
    """Losses by name; the backbone's maps; and every anchor's classes."""
    with outputs_of(model, ["backbone", "head.classification_head"]) as seen:
        found = model(batch.images, batch.targets)
    return Losses(found, tensors_of(seen["backbone"]), [seen["head.classification_head"]])


ARCHITECTURES["RetinaNet"] = Architecture(build, losses, detect, example)
