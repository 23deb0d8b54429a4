"""Images and targets as batches: read, resized, flipped.

A batch knows how it is moved to a device and how it is scaled (for recipes that draw resolutions); that is all that the
trainer wants of one.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .catalog import DatasetError, RegisteredDataset
from .config import Config

Target = dict[str, Any]
"""``boxes`` (n, 4) as x0, y0, x1, y1 in pixels of the image as it is given; ``labels`` (n,) from 1; ``masks``
(n, height, width) of 0 and 1, where there are; ``image_id``, and ``size``: the height and width that its file has."""


@dataclass(frozen=True)
class DetectionBatch:
    """Images of any sizes, each ``(3, height, width)`` in 0 … 1, and their targets."""

    images: list[Tensor]
    targets: list[Target]

    def to(self, device: torch.device) -> DetectionBatch:
        """The same on a device."""
        targets = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in t.items()} for t in self.targets]
        return DetectionBatch([image.to(device, non_blocking=True) for image in self.images], targets)

    def resized(self, share: float) -> DetectionBatch:
        """The same with sides scaled: images, boxes and masks."""
        images, targets = [], []
        for image, target in zip(self.images, self.targets, strict=True):
            height, width = (max(1, round(side * share)) for side in image.shape[-2:])
            images.append(F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0])
            scale = [width / image.shape[-1], height / image.shape[-2]] * 2
            new = {**target, "boxes": target["boxes"] * target["boxes"].new_tensor(scale)}
            if "masks" in target:
                new["masks"] = F.interpolate(target["masks"][None], (height, width), mode="nearest")[0]
            targets.append(new)
        return DetectionBatch(images, targets)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [*self.images, *(v for t in self.targets for v in t.values() if isinstance(v, Tensor))]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __len__(self) -> int:
        return len(self.images)


def collate(examples: Sequence[tuple[Tensor, Target]]) -> DetectionBatch:
    """A batch of examples."""
    return DetectionBatch([image for image, _ in examples], [target for _, target in examples])


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """A registered data set's examples.

    Args:
        registered: The data set.
        cfg: The configuration.
        train: Whether images are augmented, and those without annotations and all crowds left out.
        masks: Whether targets have masks.

    Raises:
        DatasetError: Nothing is left, or masks are wanted and there are none.
    """

    def __init__(self, registered: RegisteredDataset, cfg: Config, *, train: bool, masks: bool) -> None:
        found = registered.annotations
        self.registered, self.masks, self.train = registered, masks, train
        self.categories = list(registered.classes)
        self._transform = transform_of(cfg, train)
        if masks and not registered.has_masks:
            raise DatasetError(
                f"data set {registered.name!r} has boxes only, and {cfg.MODEL.META_ARCHITECTURE} learns masks: take "
                "annotations with a segmentation, or an architecture without masks (FasterRCNN)"
            )
        self._of: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in found["images"]}
        for annotation in found["annotations"]:
            self._of[annotation["image_id"]].append(annotation)
        self.images = list(found["images"])
        if train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            self.images = [i for i in self.images if any(not a.get("iscrowd") for a in self._of[i["id"]])]
        if not train and cfg.TEST.MAX_IMAGES:
            self.images = self.images[: cfg.TEST.MAX_IMAGES]
        if not self.images:
            raise DatasetError(f"data set {registered.name!r} has no images" + (" with annotations" if train else ""))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        described = self.images[i]
        picture = read_image(self.registered.images, described["file_name"])
        height, width = picture.shape[:2]
        found = [a for a in self._of[described["id"]] if not a.get("iscrowd")] if self.train else []
        target: Target = {"image_id": described["id"], "size": (described["height"], described["width"])}
        if (height, width) != target["size"]:
            raise DatasetError(
                f"data set {self.registered.name!r}: {described['file_name']} is {width} x {height}, its annotations "
                f"are for {described['width']} x {described['height']}"
            )
        corners = torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        target["boxes"] = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        target["labels"] = torch.tensor([self.categories.index(a["category_id"]) + 1 for a in found], dtype=torch.int64)
        if self.masks:
            masks = np.stack([decode(a, height, width) for a in found]) if found else np.zeros((0, height, width))
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks.astype(np.uint8)))
        image, target = self._transform(tv_tensors.Image(torch.from_numpy(picture).permute(2, 0, 1)), target)
        plain = {k: v.as_subclass(Tensor) if isinstance(v, Tensor) else v for k, v in target.items()}
        return image.as_subclass(Tensor), plain


def transform_of(cfg: Config, train: bool) -> v2.Compose:
    """Sizes and flips, then numbers in 0 … 1; boxes of less than a pixel go."""
    sizes = cfg.INPUT.MIN_SIZE_TRAIN if train else [cfg.INPUT.MIN_SIZE_TEST]
    longest = cfg.INPUT.MAX_SIZE_TRAIN if train else cfg.INPUT.MAX_SIZE_TEST
    steps: list[Any] = [v2.RandomShortestSize(list(sizes), max_size=longest, antialias=True)] if all(sizes) else []
    if train and cfg.INPUT.FLIP in ("horizontal", "both"):
        steps.append(v2.RandomHorizontalFlip())
    if train and cfg.INPUT.FLIP == "both":
        steps.append(v2.RandomVerticalFlip())
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(min_size=1), v2.ToDtype(torch.float32, scale=True)])


def read_image(folder: Path, name: str) -> np.ndarray:
    """An image as ``(height, width, 3)`` of 0 … 255, from a folder or a zip archive.

    Raises:
        DatasetError: It is not there.
    """
    try:
        source: Any = io.BytesIO(_archive(folder, os.getpid()).read(name)) if folder.suffix == ".zip" else folder / name
        with Image.open(source) as image:
            return np.array(image.convert("RGB"))
    except (OSError, KeyError) as error:
        raise DatasetError(f"the image {name} of {folder} cannot be read: {error}") from error


@lru_cache(maxsize=4)
def _archive(path: Path, process: int) -> zipfile.ZipFile:
    """An open archive, of each process its own: a file's position is shared with forks."""
    del process
    return zipfile.ZipFile(path)


def decode(annotation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """An annotation's mask, ``(height, width)`` of 0 and 1, from polygons or RLE."""
    found = annotation.get("segmentation")
    if not found:
        return np.zeros((height, width), np.uint8)
    if isinstance(found, list):
        rle = mask_utils.merge(mask_utils.frPyObjects(found, height, width))
    elif isinstance(found["counts"], list):
        rle = mask_utils.frPyObjects(found, height, width)
    else:
        rle = found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pycocotools' own code, from numpy
        return np.asarray(mask_utils.decode(rle))


@dataclass(frozen=True)
class Loaders:
    """What a run goes through.

    Attributes:
        train: Batches to train on, shuffled.
        held_out: Batches for merging, where images are kept for it.
    """

    train: DataLoader[Any]
    held_out: DataLoader[Any] | None


def train_loaders(registered: RegisteredDataset, cfg: Config, masks: bool) -> Loaders:
    """Loaders of a training set.

    Raises:
        DatasetError: There are fewer images than are to be held out, and a batch.
    """
    whole = DetectionDataset(registered, cfg, train=True, masks=masks)
    held, size = cfg.COCKTAIL.HELD_OUT, cfg.SOLVER.IMS_PER_BATCH
    if len(whole) < held + size:
        raise DatasetError(
            f"data set {registered.name!r} has {len(whole)} images to train on: too few for "
            f"COCKTAIL.HELD_OUT={held} and SOLVER.IMS_PER_BATCH={size}"
        )
    training: Dataset[Any] = whole
    kept = None
    if held:
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(cfg.SEED)).tolist()
        plain = replace_transform(whole, transform_of(cfg, train=False))
        kept = loader(Subset(plain, order[:held]), cfg, cfg.TEST.IMS_PER_BATCH)
        training = Subset(whole, order[held:])
    generator = torch.Generator().manual_seed(cfg.SEED)
    return Loaders(loader(training, cfg, size, shuffle=True, drop_last=True, generator=generator), kept)


def replace_transform(dataset: DetectionDataset, transform: v2.Compose) -> DetectionDataset:
    """The same examples, transformed otherwise."""
    new = object.__new__(DetectionDataset)
    new.__dict__.update(dataset.__dict__, _transform=transform)
    return new


def test_loader(dataset: Dataset[Any], cfg: Config) -> DataLoader[Any]:
    """Batches of a test set, in its order."""
    return loader(dataset, cfg, cfg.TEST.IMS_PER_BATCH)


def loader(dataset: Dataset[Any], cfg: Config, size: int, **options: Any) -> DataLoader[Any]:
    """A data loader with the configuration's workers."""
    return DataLoader(dataset, size, collate_fn=collate, num_workers=cfg.DATALOADER.NUM_WORKERS, **options)


def example_images(cfg: Config, count: int = 1) -> list[Tensor]:
    """Noise in the size of test images, for tracing, counting and timing."""
    side = cfg.INPUT.MIN_SIZE_TEST or min(cfg.INPUT.MIN_SIZE_TRAIN) or 224
    size = (3, side, min(round(side * 4 / 3), cfg.INPUT.MAX_SIZE_TEST))
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, generator=generator) for _ in range(count)]


__all__ = [
    "DetectionBatch",
    "DetectionDataset",
    "Loaders",
    "Target",
    "collate",
    "example_images",
    "read_image",
    "test_loader",
    "train_loaders",
]
