"""Faster R-CNN and Mask R-CNN, of torchvision."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from ..config import Config, ConfigError
from ..data import DetectionBatch
from .architecture import ARCHITECTURES, Architecture, Detection, Losses
from .backbones import build_backbone
from .seen import outputs_of, tensors_of
from .unresized import unresized

LEVELS = [1, 2, 3, 4]


def build(cfg: Config, classes: int, *, masks: bool) -> nn.Module:
    """A two-stage detector; class 0 is the background."""
    backbone = build_backbone(cfg, LEVELS)
    width, found = backbone.out_channels, cfg.MODEL.ANCHORS.SIZES
    maps = _maps(backbone)
    if maps == 1:
        sizes: tuple[tuple[int, ...], ...] = (tuple(found),)
    elif len(found) == maps:
        sizes = tuple((size,) for size in found)
    else:
        raise ConfigError(f"MODEL.ANCHORS.SIZES has {len(found)} sizes for {maps} levels: give one for each level")
    names = [str(i) for i in range(max(1, maps - 1))]  # the coarsest level only proposes
    fc, heads = cfg.MODEL.ROI_HEADS.FC_DIM, cfg.MODEL.ROI_HEADS
    options: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(sizes, (tuple(cfg.MODEL.ANCHORS.RATIOS),) * len(sizes)),
        "rpn_pre_nms_top_n_train": cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN,
        "rpn_pre_nms_top_n_test": cfg.MODEL.RPN.PRE_NMS_TOPK_TEST,
        "rpn_post_nms_top_n_train": cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN,
        "rpn_post_nms_top_n_test": cfg.MODEL.RPN.POST_NMS_TOPK_TEST,
        "rpn_batch_size_per_image": cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
        "box_roi_pool": MultiScaleRoIAlign(names, 7, 2),
        "box_head": TwoMLPHead(width * 7 * 7, fc),
        "box_predictor": FastRCNNPredictor(fc, classes + 1),
        "box_batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
        "box_score_thresh": cfg.TEST.SCORE_THRESH,
        "box_detections_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
    if masks:
        options |= {
            "mask_roi_pool": MultiScaleRoIAlign(names, 14, 2),
            "mask_head": MaskRCNNHeads(width, (heads.MASK_DIM,) * 4, 1),
            "mask_predictor": MaskRCNNPredictor(heads.MASK_DIM, heads.MASK_DIM, classes + 1),
        }
    model: nn.Module = (MaskRCNN if masks else FasterRCNN)(backbone, **options)
    model.transform = unresized(cfg)
    return model


def _maps(backbone: nn.Module) -> int:
    """How many maps a backbone returns."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    if isinstance(backbone, BackboneWithFPN):
        return len(backbone.body.return_layers) + 1
    return int(getattr(backbone, "maps", 1))


def losses(model: nn.Module, batch: DetectionBatch) -> Losses:
    """Losses by name; the backbone's maps; and of every anchor whether it shows an object."""
    with outputs_of(model, ["backbone", "rpn.head"]) as seen:
        found = model(batch.images, batch.targets)
    return Losses(found, tensors_of(seen["backbone"]), list(seen["rpn.head"][0]))


def detect(model: nn.Module, images: list[Tensor]) -> list[Detection]:
    """What the model finds in each image."""
    found: list[Detection] = model(images)
    return found


def example(images: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model takes a list of images."""
    return (list(images),), {}


ARCHITECTURES["FasterRCNN"] = Architecture(lambda cfg, n: build(cfg, n, masks=False), losses, detect, example)
ARCHITECTURES["MaskRCNN"] = Architecture(lambda cfg, n: build(cfg, n, masks=True), losses, detect, example, masks=True)
