"""Three small sets of real images, in the folder that COCKTAIL_DATA names: blood cells, nuclei, a little of COCO."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from .catalog import CATALOG, RegisteredDataset, register_coco_instances


def register_small(folder: Path) -> None:
    """Register ``bccd_{train,val,test}``, ``nuclei_{train,test}`` and ``coco_mini_{train,val}``."""
    for split in ("train", "val", "test"):
        register_coco_instances(f"bccd_{split}", folder / "bccd" / f"{split}.json", folder / "bccd" / "images.zip")
    nuclei = folder / "nuclei_dsb2018" / "nuclei.zip"
    for split in ("train", "test"):
        CATALOG.register(
            RegisteredDataset(f"nuclei_{split}", nuclei, lambda split=split: nuclei_annotations(nuclei, split))
        )
    mini = folder / "coco_panoptic_mini"
    archive = mini / "coco_panoptic_mini.zip"
    for split in ("train", "val"):
        described = mini / f"panoptic_{split}.json"
        CATALOG.register(
            RegisteredDataset(
                f"coco_mini_{split}", archive, lambda described=described: things_of_panoptic(described, archive)
            )
        )


def nuclei_annotations(archive: Path, split: str) -> dict[str, Any]:
    """Nuclei of the Data Science Bowl 2018: one class, a label map for each image."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with zipfile.ZipFile(archive) as files:
        rows = [row for row in json.loads(files.read("index.json")) if row["split"] == split]
        for row in rows:
            image_id = int(row["id"]) + 1
            size = {"width": row["width"], "height": row["height"]}
            images.append({"id": image_id, "file_name": f"images/{row['id']}.webp", **size})
            labels = np.asarray(Image.open(io.BytesIO(files.read(f"labels/{row['id']}.png"))))
            for label in range(1, row["instances"] + 1):
                found = instance(labels == label)
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, **found})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}


def things_of_panoptic(described: Path, archive: Path) -> dict[str, Any]:
    """The countable things of panoptic annotations."""
    data = json.loads(described.read_text(encoding="utf-8"))
    things = [{"id": c["id"], "name": c["name"]} for c in data["categories"] if c["isthing"]]
    known = {c["id"] for c in things}
    annotations: list[dict[str, Any]] = []
    with zipfile.ZipFile(archive) as files:
        for image in data["annotations"]:
            labels = np.asarray(Image.open(io.BytesIO(files.read(image["file_name"]))))
            for segment in image["segments_info"]:
                if segment["category_id"] in known:
                    found = {**instance(labels == segment["id"]), "iscrowd": segment["iscrowd"]}
                    described_by = {"image_id": image["image_id"], "category_id": segment["category_id"]}
                    annotations.append({"id": len(annotations) + 1, **described_by, **found})
    return {"images": data["images"], "annotations": annotations, "categories": things}


def instance(mask: np.ndarray) -> dict[str, Any]:
    """Box, area and RLE of a mask."""
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        "bbox": mask_utils.toBbox(rle).tolist(),
        "area": float(mask_utils.area(rle)),
        "iscrowd": 0,
    }
