"""Pascal VOC's annotations, as COCO's."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def read_voc(root: Path, split: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """Annotations of a split in COCO's format.

    Boxes are made 0-based; objects marked as difficult become crowds, which count neither for nor against a detector.

    Args:
        root: Holds ``Annotations/`` and ``ImageSets/Main/``.
        split: A list of names in ``ImageSets/Main``.
        classes: In the order of their ids.

    Raises:
        OSError: A file is not there.
        ValueError: An object is of another class.
    """
    ids = {name: i for i, name in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    lines = (root / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8").split("\n")
    names = [line.split()[0] for line in lines if line.strip()]
    for image_id, name in enumerate(names, 1):
        path = root / "Annotations" / f"{name}.xml"
        with path.open("rb") as file:
            tree = ElementTree.parse(file).getroot()
        width, height = (int(_text(tree, f"size/{side}", path)) for side in ("width", "height"))
        file_name = tree.findtext("filename") or f"{name}.jpg"
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for found in tree.iter("object"):
            kind = _text(found, "name", path)
            if kind not in ids:
                raise ValueError(f"{path}: an object is a {kind!r}; the classes are {', '.join(classes)}")
            left, top, right, bottom = (
                float(_text(found, f"bndbox/{side}", path)) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[kind],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(found.findtext("difficult") or 0),
                }
            )
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _text(element: ElementTree.Element, path: str, file: Path) -> str:
    found = element.findtext(path)
    if found is None:
        raise ValueError(f"{file}: <{element.tag}> has no <{path}>")
    return found
