"""Coloured shapes in COCO's official layout, a backbone of a few channels, and settings to go with them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import nn

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "detectron_style"

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 7, "name": "circle"}]  # COCO's ids have gaps, too
COLOURS = {3: (220, 60, 40), 7: (40, 90, 220)}
SIZE = 64

TINY = """\
MODEL:
  BACKBONE: {NAME: tiny, FPN_CHANNELS: 8}
  ANCHORS: {SIZES: [8, 16, 24, 32, 48], RATIOS: [1.0]}
  RPN:
    {PRE_NMS_TOPK_TRAIN: 60, PRE_NMS_TOPK_TEST: 40, POST_NMS_TOPK_TRAIN: 40, POST_NMS_TOPK_TEST: 20,
     BATCH_SIZE_PER_IMAGE: 32}
  ROI_HEADS: {BATCH_SIZE_PER_IMAGE: 16, FC_DIM: 16, MASK_DIM: 8}
  DETR:
    {DIM: 16, FFN_DIM: 24, HEADS: 4, ENC_LAYERS: 1, DEC_LAYERS: 1, NUM_QUERIES: 8, STAGES: [16, 16, 24, 32],
     BLOCKS: [1, 1, 1, 1], BLOCK: basic}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64, MAX_SIZE_TRAIN: 96, MAX_SIZE_TEST: 96}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {OPTIMIZER: AdamW, BASE_LR: 3e-3, IMS_PER_BATCH: 4, MAX_ITER: 6, STEPS_PER_EPOCH: 1}
COCKTAIL: {PATTERNS: ["unstructured@0.5", "2:4", "channel@0.5"], RECALIBRATION_BATCHES: 1}
TEST: {DETECTIONS_PER_IMAGE: 10}
"""


def shapes(count: int, seed: int) -> tuple[list[Image.Image], dict[str, Any]]:
    """Images with one to three shapes each, and their annotations: polygons, or RLE in the file's own form."""
    draw = np.random.default_rng(seed)
    pictures, images, annotations = [], [], []
    for i in range(count):
        width, height = SIZE + 16 * (i % 2), SIZE
        picture = Image.new("RGB", (width, height), tuple(int(v) for v in draw.integers(200, 255, 3)))
        pen = ImageDraw.Draw(picture)
        images.append({"id": i + 1, "file_name": f"{i + 1:012d}.png", "width": width, "height": height})
        for place in draw.permutation(4)[: int(draw.integers(1, 4))].tolist():
            side = int(draw.integers(16, 26))
            x, y = 3 + (place % 2) * 32 + int(draw.integers(0, 4)), 3 + (place // 2) * 32 + int(draw.integers(0, 4))
            kind = int(draw.choice([3, 7]))
            if kind == 3:
                pen.rectangle([x, y, x + side - 1, y + side - 1], fill=COLOURS[kind])
                polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
            else:
                pen.ellipse([x, y, x + side - 1, y + side - 1], fill=COLOURS[kind])
                angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
                polygon = np.stack([np.cos(angles), np.sin(angles)], 1) * side / 2 + [x + side / 2, y + side / 2]
                polygon = [round(float(v), 2) for v in polygon.reshape(-1)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": kind,
                    "bbox": [x, y, side, side],
                    "area": float(side * side if kind == 3 else np.pi * side * side / 4),
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
        pictures.append(picture)
    return pictures, {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}


def write_coco(root: Path, train: int = 16, val: int = 6) -> Path:
    """Write ``coco/`` in its official layout; returns the folder that holds it."""
    for split, count, seed in (("train2017", train, 0), ("val2017", val, 1)):
        pictures, annotations = shapes(count, seed)
        folder = root / "coco" / split
        folder.mkdir(parents=True)
        for picture, described in zip(pictures, annotations["images"], strict=True):
            picture.save(folder / described["file_name"])
        path = root / "coco" / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(annotations))
    return root


def write_tiny(folder: Path, root: Path, more: str = "") -> Path:
    """Write a configuration with small settings, and one that inherits from it."""
    (folder / "base.yaml").write_text(TINY)
    path = folder / "tiny.yaml"
    path.write_text(f"_BASE_: base.yaml\nDATASETS: {{ROOT: {root}}}\nOUTPUT_DIR: {folder / 'run'}\n{more}")
    return path


def register_tiny() -> None:
    """Make the backbone ``tiny`` known, as a user would."""
    from cocktail_detection.models import register_backbone
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    @register_backbone("tiny")
    def tiny(cfg: Any, levels: list[int], extra: Any) -> nn.Module:
        widths = (8, 8, 12, 16)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        before = 3
        for i, width in enumerate(widths, 1):
            stages[f"layer{i}"] = nn.Sequential(
                nn.Conv2d(before, width, 3, 4 if i == 1 else 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            before = width
        layers = {f"layer{i}": str(n) for n, i in enumerate(levels)}
        found = [widths[i - 1] for i in levels]
        return BackboneWithFPN(
            nn.Sequential(stages), layers, found, cfg.MODEL.BACKBONE.FPN_CHANNELS, extra or LastLevelMaxPool()
        )
