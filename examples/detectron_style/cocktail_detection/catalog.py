"""The registry of data sets: a name stands for images and annotations in COCO's format.

register_coco_instances("cells_train", "cells/train.json", "cells/train")
register_pascal_voc("voc_2007_test", "VOC2007", "test")
"""

from __future__ import annotations

import difflib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .voc import VOC_CLASSES, read_voc

Annotations = dict[str, Any]
"""What a COCO annotation file holds: ``images``, ``annotations``, ``categories``."""


class DatasetError(ValueError):
    """A data set that there is not, or whose files are not as they must be."""


@dataclass(frozen=True)
class RegisteredDataset:
    """Images and their annotations.

    Attributes:
        name: In the registry.
        images: A folder, or a zip archive, in which ``file_name`` is found.
        load: Reads the annotations.
    """

    name: str
    images: Path
    load: Callable[[], Annotations]

    @cached_property
    def annotations(self) -> Annotations:
        """The annotations, read once and checked.

        Raises:
            DatasetError: They are not there, or not in COCO's format.
        """
        try:
            found = self.load()
        except OSError as error:
            raise DatasetError(f"data set {self.name!r}: {error.filename} cannot be read: {error.strerror}") from error
        except (ValueError, SyntaxError, zipfile.BadZipFile) as error:  # JSON, XML, archives that are none
            raise DatasetError(f"data set {self.name!r}: its annotations cannot be understood: {error}") from error
        return checked(self.name, found)

    @property
    def classes(self) -> dict[int, str]:
        """Names by category id, in the order of ids."""
        return {c["id"]: c["name"] for c in sorted(self.annotations["categories"], key=lambda c: c["id"])}

    @property
    def has_masks(self) -> bool:
        """Whether there is an annotation with a segmentation, or none at all."""
        found = self.annotations["annotations"]
        return not found or any(a.get("segmentation") for a in found)


def checked(name: str, found: Any) -> Annotations:
    """Annotations, if they are in COCO's format.

    Raises:
        DatasetError: They are not; says what is missing.
    """
    for part, needed in _NEEDED.items():
        rows = found.get(part) if isinstance(found, Mapping) else None
        if not isinstance(rows, list):
            raise DatasetError(
                f"data set {name!r}: its annotations hold no list {part!r}: they must be in COCO's format"
            )
        for i, row in enumerate(rows):
            if missing := [key for key in needed if key not in row]:
                raise DatasetError(f"data set {name!r}: {part}[{i}] has no {missing[0]!r}")
    images, categories = ({row["id"] for row in found[part]} for part in ("images", "categories"))
    if not categories:
        raise DatasetError(f"data set {name!r} has no categories")
    for i, a in enumerate(found["annotations"]):
        if a["image_id"] not in images or a["category_id"] not in categories:
            what = "image" if a["image_id"] not in images else "category"
            raise DatasetError(
                f"data set {name!r}: annotations[{i}] is of {what} {a[f'{what}_id']}, which is not there"
            )
    return found


_NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


class DatasetCatalog:
    """Data sets by name. Nothing is read before it is needed."""

    def __init__(self) -> None:
        self._known: dict[str, RegisteredDataset] = {}

    def register(self, dataset: RegisteredDataset) -> None:
        """Add one, in the place of an earlier one of that name."""
        self._known[dataset.name] = dataset

    def get(self, name: str) -> RegisteredDataset:
        """The data set of a name.

        Raises:
            DatasetError: There is none; says which there are.
        """
        if name not in self._known:
            near = difflib.get_close_matches(name, self._known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self._known)}"
            raise DatasetError(
                f"no data set {name!r}: register it (DATASETS.REGISTER, register_coco_instances); {hint}"
            )
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)


CATALOG = DatasetCatalog()


def register_coco_instances(name: str, json_file: str | Path, images: str | Path) -> None:
    """Register images with annotations in COCO's format.

    Args:
        name: What configurations call it.
        json_file: ``instances_*.json``: boxes; polygons or RLE for masks.
        images: The folder, or a zip archive, in which ``file_name`` is found.
    """
    path = Path(json_file)
    CATALOG.register(RegisteredDataset(name, Path(images), lambda: json.loads(path.read_text(encoding="utf-8"))))


def register_pascal_voc(name: str, folder: str | Path, split: str, classes: tuple[str, ...] = VOC_CLASSES) -> None:
    """Register a data set in Pascal VOC's layout; it is evaluated as COCO is.

    Args:
        name: What configurations call it.
        folder: Holds ``Annotations/``, ``JPEGImages/`` and ``ImageSets/Main/``.
        split: Of ``ImageSets/Main``: ``trainval``, ``test`` …
        classes: In the order of their ids, which begin with 1.
    """
    root = Path(folder)
    CATALOG.register(RegisteredDataset(name, root / "JPEGImages", lambda: read_voc(root, split, classes)))


def register_builtin(root: str | Path = "") -> None:
    """Register COCO and Pascal VOC in their official layouts, and the small sets that COCKTAIL_DATA names.

    Args:
        root: The folder that holds ``coco/`` and ``VOC2007/``; by default what ``COCKTAIL_DATASETS`` names, or
            ``datasets``.
    """
    folder = Path(root or os.environ.get("COCKTAIL_DATASETS", "datasets")).expanduser()
    for split in ("train2017", "val2017"):
        name = f"coco_2017_{split.removesuffix('2017')}"
        register_coco_instances(
            name, folder / "coco" / "annotations" / f"instances_{split}.json", folder / "coco" / split
        )
    for year, splits in {"2007": ("train", "val", "trainval", "test"), "2012": ("train", "val", "trainval")}.items():
        for split in splits:
            register_pascal_voc(f"voc_{year}_{split}", folder / f"VOC{year}", split)
    if small := os.environ.get("COCKTAIL_DATA"):
        from .small import register_small

        register_small(Path(small))


def register_from(settings: Mapping[str, Mapping[str, str]]) -> None:
    """Register the data sets of a configuration's ``DATASETS.REGISTER``.

    Raises:
        DatasetError: One is described in no known way.
    """
    for name, given in settings.items():
        if given.keys() == {"json", "images"}:
            register_coco_instances(name, given["json"], given["images"])
        elif given.keys() == {"voc", "split"}:
            register_pascal_voc(name, given["voc"], given["split"])
        else:
            raise DatasetError(
                f"DATASETS.REGISTER.{name} has the keys {', '.join(given)}; it takes json and images, or voc and split"
            )
