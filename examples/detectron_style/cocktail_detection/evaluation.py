"""Detections measured as COCO does, by pycocotools; and a score for each image, which merging compares by."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from .catalog import RegisteredDataset
from .data import DetectionBatch, Target
from .models import Architecture, Detection

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The first of what COCOeval computes, in percent."""

Result = dict[str, Any]
"""A detection in COCO's format of results."""


@torch.no_grad()
def predictions(
    model: nn.Module,
    architecture: Architecture,
    batches: Iterable[DetectionBatch],
    categories: Sequence[int],
    device: torch.device,
) -> list[Result]:
    """What a model finds, as results in the pixels of the images' files.

    Args:
        model: As it stands; run in eval mode, which it is left in.
        architecture: Its kind.
        batches: Images to look at.
        categories: Category ids in the order of labels.
        device: Of the model.
    """
    model.eval()
    out: list[Result] = []
    for batch in batches:
        found = architecture.detect(model, [image.to(device) for image in batch.images])
        for detection, image, target in zip(found, batch.images, batch.targets, strict=True):
            out += results_of(detection, image.shape[-2:], target, categories)
    return out


def results_of(detection: Detection, shown: Sequence[int], target: Target, categories: Sequence[int]) -> list[Result]:
    """One image's detections as results, put back to the size of the image's file."""
    height, width = target["size"]
    boxes = detection["boxes"].double().cpu() * torch.tensor([width / shown[1], height / shown[0]] * 2)
    boxes[:, 2:] -= boxes[:, :2]
    rows = [
        {"image_id": target["image_id"], "category_id": categories[label - 1], "bbox": box, "score": score}
        for label, box, score in zip(
            detection["labels"].tolist(), boxes.tolist(), detection["scores"].tolist(), strict=True
        )
    ]
    if "masks" in detection and rows:
        masks = detection["masks"].float()
        if tuple(shown) != (height, width):
            masks = F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)
        for row, mask in zip(rows, (masks[:, 0] > 0.5).byte().cpu().numpy(), strict=True):
            rle = mask_utils.encode(np.asfortranarray(mask))
            row["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return rows


def coco_metrics(
    dataset: RegisteredDataset, image_ids: Sequence[int], results: Sequence[Result], kinds: Sequence[str]
) -> dict[str, dict[str, float]]:
    """COCO's average precisions in percent, by kind (``"bbox"``, ``"segm"``) and name.

    Args:
        dataset: What is there to be found.
        image_ids: The images that were looked at.
        results: What was found in them.
        kinds: What is measured. ``nan`` stands for what cannot be: no object of that size is there.
    """
    truth = coco_of(dataset)
    out: dict[str, dict[str, float]] = {}
    for kind in kinds:
        if not results:
            out[kind] = dict.fromkeys(STATISTICS, 0.0)
            continue
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
            rows = [{k: v for k, v in r.items() if kind == "segm" or k != "segmentation"} for r in results]
            evaluation = COCOeval(truth, truth.loadRes(rows), kind)
            evaluation.params.imgIds = list(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        found = zip(STATISTICS, evaluation.stats.tolist(), strict=False)
        out[kind] = {name: 100 * value if value >= 0 else float("nan") for name, value in found}
    return out


def coco_of(dataset: RegisteredDataset) -> COCO:
    """A data set as pycocotools has it; areas and crowds are filled in where annotations lack them."""
    found = copy.deepcopy({k: dataset.annotations[k] for k in ("images", "annotations", "categories")})
    for annotation in found["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    coco = COCO()
    coco.dataset = {"info": {}, **found}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


THRESHOLDS = torch.linspace(0.5, 0.95, 10)


def image_precisions(output: Sequence[Detection], targets: Sequence[Target]) -> Tensor:
    """The trainer's ``metric``: for each image the average precision of its boxes, over IoU 0.5 … 0.95.

    COCO's figure is of all images together and no mean of anything; this one is, so that merging can compare networks
    image by image. An image without objects has 1 where nothing is found in it, else 0.
    """
    return torch.stack([_image_precision(d, t) for d, t in zip(output, targets, strict=True)])


def _image_precision(detection: Detection, target: Target) -> Tensor:
    there, labels = target["boxes"].float(), target["labels"]
    order = detection["scores"].argsort(descending=True, stable=True)
    boxes, kinds = detection["boxes"][order].float(), detection["labels"][order]
    if not len(there) or not len(boxes):
        return torch.tensor(float(len(there) == len(boxes)), dtype=torch.float64)
    overlap = box_iou(boxes, there) * (kinds[:, None] == labels[None])
    thresholds = THRESHOLDS.to(overlap)
    hits = torch.zeros(len(thresholds), len(boxes), dtype=torch.float64)
    for i, threshold in enumerate(thresholds):
        free = torch.ones(len(there), dtype=torch.bool, device=overlap.device)
        for j, row in enumerate(overlap):
            value, at = (row * free).max(0)
            if value >= threshold:
                free[at] = False
                hits[i, j] = 1
    found = hits.cumsum(1)
    precision = found / torch.arange(1, len(boxes) + 1)
    best = precision.flip(1).cummax(1).values.flip(1)  # at this recall or a higher one
    return (best * hits).sum(1).mean() / len(there)
