"""Detectors, by the names that configurations call them."""

from . import detr, rcnn, retinanet
from .architecture import ARCHITECTURES, Architecture, Detection, Losses, architecture_of, build_model
from .backbones import BACKBONES, register_backbone

__all__ = [
    "ARCHITECTURES",
    "BACKBONES",
    "Architecture",
    "Detection",
    "Losses",
    "architecture_of",
    "build_model",
    "detr",
    "rcnn",
    "register_backbone",
    "retinanet",
]
