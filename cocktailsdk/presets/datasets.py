"""Image data sets for the presets, and a loader for what fits into memory.

Nothing is downloaded, and no pickle is read by this package itself. Images are kept as bytes and turned into floats
a batch at a time.
"""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from ..errors import TrainingError
from ..utils.optional import require

__all__ = ["Images", "TensorLoader", "cifar10", "digits", "fashion_mnist", "random_shift", "standard_augmentation"]


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        images: Bytes.
        labels: Class numbers.
    """

    images: UInt8[Tensor, "n channels height width"]
    labels: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | Tensor) -> Images:
        return Images(self.images[which], self.labels[which])


@dataclass(eq=False)
class TensorLoader:
    """Mini-batches ``(images, labels)`` of tensors that are in memory.

    Shuffling and augmentation draw from torch's global generator while iterating, as a ``DataLoader`` without
    workers does, at a small part of its cost.

    Args:
        data: What to load.
        batch_size: Images in a batch; the last may be smaller.
        transform: Applied to the bytes of each batch, gives what the model sees.
        shuffle: Whether each pass has an order of its own.
        drop_last: Whether a smaller last batch is left out.
    """

    data: Images
    batch_size: int
    transform: Callable[[Tensor], Tensor]
    _: KW_ONLY
    shuffle: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __len__(self) -> int:
        n = len(self.data)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.data)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        for i in range(len(self)):
            which = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield self.transform(self.data.images[which]), self.data.labels[which]


def normalise(mean: tuple[float, ...], std: tuple[float, ...], scale: float = 255) -> Callable[[Tensor], Tensor]:
    """A transform from bytes to floats: ``(bytes / scale - mean) / std`` by channel."""
    a = torch.tensor([1 / (scale * s) for s in std])[:, None, None]
    b = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])[:, None, None]
    return lambda images: torch.addcmul(b, images.float(), a)


def random_shift(images: UInt8[Tensor, "n c h w"], pixels: int) -> UInt8[Tensor, "n c h w"]:
    """Each image moved by up to so many pixels in both directions, zeros moving in (a crop of the padded image)."""
    n, _, h, w = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, n, 1))
    rows = (down + torch.arange(h))[:, :, None]
    columns = (right + torch.arange(w))[:, None, :]
    return padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows, columns].permute(0, 3, 1, 2)


def standard_augmentation(images: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """What He et al. (2016) do for CIFAR: pad by 4, crop at random, mirror half of the images."""
    images = random_shift(images, 4)
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def digits() -> tuple[Images, Images, Images]:
    """Scikit-learn's 1,797 handwritten digits of 8x8 pixels with values 0 to 16, in a fixed split.

    Returns:
        70 % for training, 10 % for merging and 20 % for testing, of each class. The split depends on no seed.
    """
    raw = require("sklearn.datasets", "preset 'digits'", error=TrainingError).load_digits()
    images = torch.from_numpy(raw.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    generator = np.random.RandomState(0)  # its streams never change between numpy's versions
    for label in range(10):
        members = torch.nonzero(labels == label)[:, 0]
        members = members[torch.from_numpy(generator.permutation(len(members)))]
        ends = round(0.7 * len(members)), round(0.8 * len(members))
        for part, which in zip(parts, torch.tensor_split(members, ends), strict=True):
            part.append(which)
    train, merge, test = (torch.cat(p).sort().values for p in parts)
    data = Images(images, labels)
    return data[train], data[merge], data[test]


def cifar10(root: str | Path) -> tuple[Images, Images]:
    """CIFAR-10: 50,000 and 10,000 images of 3x32x32.

    Args:
        root: A folder with either ``train.npz`` and ``test.npz`` (JPEG scans that share a header: arrays ``header``,
            ``scan``, ``length``, ``label``), or what torchvision stores (``cifar-10-batches-py``).

    Returns:
        Training and test set.

    Raises:
        TrainingError: Where neither is found.
    """
    root = Path(root)
    archives = root / "train.npz", root / "test.npz"
    if all(a.exists() for a in archives):
        train, test = map(_jpeg_archive, archives)
        return train, test
    stored = root / "cifar-10-batches-py"
    if stored.is_dir():
        return _torchvision_cifar10(root)
    raise TrainingError(
        f"no CIFAR-10 in {root}: looked for {archives[0]} and {archives[1]}, and for the folder {stored} as "
        "torchvision.datasets.CIFAR10(root, download=True) leaves it"
    )


def _torchvision_cifar10(root: Path) -> tuple[Images, Images]:
    stored = root / "cifar-10-batches-py"
    datasets = require("torchvision.datasets", f"reading {stored}", error=TrainingError)
    try:
        parts = [datasets.CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise TrainingError(f"torchvision does not accept {stored}: {error}") from error
    train, test = (
        Images(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts
    )
    return train, test


def _jpeg_archive(path: Path) -> Images:
    pillow = require("PIL.Image", f"reading {path}", error=TrainingError)
    try:
        with np.load(path, allow_pickle=False) as archive:
            header, scans = archive["header"].tobytes(), archive["scan"].tobytes()
            ends = np.cumsum(archive["length"].astype(np.int64))
            labels = torch.from_numpy(archive["label"].astype(np.int64))
    except (KeyError, ValueError, OSError) as error:
        raise TrainingError(
            f"{path} is no archive of JPEG scans with the arrays header, scan, length and label: {error}"
        ) from error
    starts = [0, *ends[:-1].tolist()]
    images = np.empty((len(labels), 32, 32, 3), dtype=np.uint8)
    for i, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True)):
        jpeg = header + scans[start:end] + b"\xff\xd9"
        images[i] = np.asarray(pillow.open(io.BytesIO(jpeg)).convert("RGB"))
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)


def fashion_mnist(root: str | Path) -> tuple[Images, Images]:
    """Fashion-MNIST (or MNIST): 60,000 and 10,000 images of 1x28x28.

    Args:
        root: A folder with the four IDX files, plain or with ``.gz``, as Debian's ``dataset-fashion-mnist`` has it;
            or one that torchvision uses as its root (``FashionMNIST/raw``).

    Returns:
        Training and test set.

    Raises:
        TrainingError: Where a file is missing or is no IDX file.
    """
    folders = Path(root), Path(root) / "FashionMNIST" / "raw"
    sets = []
    for part in ("train", "t10k"):
        images = _idx(_find(folders, f"{part}-images-idx3-ubyte"), 3)
        labels = _idx(_find(folders, f"{part}-labels-idx1-ubyte"), 1)
        if len(images) != len(labels):
            raise TrainingError(f"{root}: {len(images)} {part} images but {len(labels)} labels")
        sets.append(Images(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    return sets[0], sets[1]


def _find(folders: tuple[Path, ...], name: str) -> Path:
    tried = [folder / f"{name}{end}" for folder in folders for end in ("", ".gz")]
    for path in tried:
        if path.exists():
            return path
    raise TrainingError(f"no Fashion-MNIST in {folders[0]}: looked for {', '.join(map(str, tried))}")


def _idx(path: Path, axes: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    head = 4 + 4 * axes
    if len(data) < head or data[:4] != bytes((0, 0, 8, axes)):
        raise TrainingError(f"{path} is no IDX file of bytes with {axes} axes: it begins with {data[:4].hex(' ')}")
    shape = struct.unpack(f">{axes}I", data[4:head])
    values = np.frombuffer(data, np.uint8, offset=head)
    if values.size != np.prod(shape):
        raise TrainingError(
            f"{path} holds {values.size} bytes, its header says {shape}: the file is cut off or damaged"
        )
    return values.reshape(shape).copy()
