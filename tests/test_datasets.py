"""Image data sets: what is read, what is refused, and the loader for what fits into memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cocktailsdk import TrainingError
from cocktailsdk.presets.datasets import (
    Images,
    TensorLoader,
    cifar10,
    digits,
    fashion_mnist,
    normalise,
    random_shift,
    standard_augmentation,
)

# ------------------------------------------------------------------- loader


def numbered(n: int) -> Images:
    return Images(torch.arange(n, dtype=torch.uint8)[:, None, None, None], torch.arange(n))


def test_a_loader_gives_every_image_once_with_its_label() -> None:
    loader = TensorLoader(numbered(10), 4, torch.Tensor.float, shuffle=True)
    assert len(loader) == 3
    batches = list(loader)
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(10))
    for x, y in batches:
        assert torch.equal(x.flatten(), y.float())
    dropping = TensorLoader(numbered(10), 4, torch.Tensor.float, drop_last=True)
    assert len(dropping) == len(list(dropping)) == 2


def test_shuffling_draws_from_the_global_generator() -> None:
    loader = TensorLoader(numbered(30), 30, torch.Tensor.float, shuffle=True)
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append(next(iter(loader))[1].tolist())
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TensorLoader(numbered(3), 0, torch.Tensor.float)


# ------------------------------------------------------------- augmentation


def test_shifted_images_are_crops_of_the_padded_ones() -> None:
    images = torch.randint(1, 255, (64, 2, 6, 6), dtype=torch.uint8)
    shifted = random_shift(images, 1)
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    seen = set()
    for i in range(64):
        places = [
            (r, c) for r in range(3) for c in range(3) if torch.equal(padded[i, :, r : r + 6, c : c + 6], shifted[i])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


def test_standard_augmentation_mirrors_about_half() -> None:
    images = torch.zeros(400, 1, 32, 32, dtype=torch.uint8)
    images[:, :, :, 16:] = 1
    mirrored = standard_augmentation(images)[:, 0, 16, 10] == 1
    assert 120 < mirrored.sum() < 280


def test_normalising_is_by_channel() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    out = normalise((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))(images)
    expected = (images / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[
        :, None, None
    ]
    torch.testing.assert_close(out, expected)


# ------------------------------------------------------------------- digits


def test_the_digits_split_is_fixed_stratified_and_whole() -> None:
    train, merge, test = digits()
    assert (len(train), len(merge), len(test)) == (1258, 180, 359)
    assert train.images.shape[1:] == (1, 8, 8)
    assert int(train.images.max()) == 16
    totals = sum(torch.bincount(part.labels, minlength=10) for part in (train, merge, test))
    for part, share in ((train, 0.7), (merge, 0.1), (test, 0.2)):
        counts = torch.bincount(part.labels, minlength=10)
        assert ((counts - share * totals).abs() <= 1).all()
    together = torch.cat([p.images for p in (train, merge, test)]).flatten(1)
    raw = __import__("sklearn.datasets").datasets.load_digits().images.astype(np.uint8)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, raw.reshape(len(raw), -1)))
    torch.manual_seed(5)
    again = digits()
    assert torch.equal(again[2].images, test.images)
    assert torch.equal(again[2].labels, test.labels)


# ----------------------------------------------------------------- CIFAR-10


def write_jpeg_archive(path: Path, n: int, seed: int) -> np.ndarray:
    """``n`` JPEG images as scans behind one shared header, and what they decode to."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    decoded, headers, scans = [], set(), []
    for image in blocks.repeat(8, 1).repeat(8, 2):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        data = file.getvalue()
        decoded.append(np.asarray(Image.open(io.BytesIO(data))))
        marker = data.index(b"\xff\xda")
        start = marker + 2 + struct.unpack(">H", data[marker + 2 : marker + 4])[0]
        headers.add(data[:start])
        assert data.endswith(b"\xff\xd9")
        scans.append(data[start:-2])
    assert len(headers) == 1
    np.savez(
        path,
        header=np.frombuffer(headers.pop(), np.uint8),
        scan=np.frombuffer(b"".join(scans), np.uint8),
        length=np.array([len(s) for s in scans], np.uint16),
        label=np.arange(n, dtype=np.uint8) % 10,
        classes=np.array(["airplane"] * 10),
    )
    return np.stack(decoded)


def test_cifar10_is_read_from_jpeg_scans(tmp_path: Path) -> None:
    decoded = write_jpeg_archive(tmp_path / "train.npz", 12, 0)
    write_jpeg_archive(tmp_path / "test.npz", 5, 1)
    train, test = cifar10(tmp_path)
    assert train.images.shape == (12, 3, 32, 32)
    assert torch.equal(train.images, torch.from_numpy(decoded).permute(0, 3, 1, 2))
    assert train.labels.tolist() == [i % 10 for i in range(12)]
    assert len(test) == 5


def test_cifar10_is_read_as_torchvision_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    sums = {}

    def write(name: str, content: dict[str, object]) -> None:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data, usedforsecurity=False).hexdigest()

    images = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images[name] = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        write(name, {"data": images[name], "labels": [1, 2, 3, 4]})
    write("batches.meta", {"label_names": list("abcdefghij")})
    # torchvision knows the true files' checksums: of these small ones it is told
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    train, test = cifar10(tmp_path)
    assert len(train) == 20
    assert torch.equal(train.images[:4], torch.from_numpy(images["data_batch_1"]).reshape(4, 3, 32, 32))
    assert test.labels.tolist() == [1, 2, 3, 4]

    (folder / "data_batch_2").write_bytes(b"no")
    with pytest.raises(TrainingError, match="torchvision does not accept"):
        cifar10(tmp_path)


def test_missing_cifar10_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no CIFAR-10 in .*train\.npz and .*test\.npz.*cifar-10-batches-py"):
        cifar10(tmp_path)


def test_another_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=np.zeros(3))
    np.savez(tmp_path / "test.npz", images=np.zeros(3))
    with pytest.raises(TrainingError, match=r"train\.npz is no archive of JPEG scans"):
        cifar10(tmp_path)
    (tmp_path / "train.npz").write_bytes(b"not a zip")
    with pytest.raises(TrainingError, match=r"train\.npz is no archive of JPEG scans"):
        cifar10(tmp_path)


def test_the_real_cifar10(data_folder: Path) -> None:
    train, test = cifar10(data_folder / "cifar10")
    assert train.images.shape == (50000, 3, 32, 32)
    assert test.images.shape == (10000, 3, 32, 32)
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    mean = test.images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.485, 0.456, 0.406]), atol=0.05, rtol=0)


# ------------------------------------------------------------ Fashion-MNIST


def write_idx(folder: Path, compressed: bool, n: int = 6) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "t10k"):
        arrays[f"{part}-images-idx3-ubyte"] = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = generator.integers(0, 10, n, dtype=np.uint8)
    for name, array in arrays.items():
        data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return arrays


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("inside", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_idx_files(tmp_path: Path, compressed: bool, inside: str) -> None:
    arrays = write_idx(tmp_path / inside, compressed)
    train, test = fashion_mnist(tmp_path)
    assert train.images.shape == (6, 1, 28, 28)
    assert np.array_equal(train.images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(test.labels.numpy(), arrays["t10k-labels-idx1-ubyte"])


def test_missing_and_damaged_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no Fashion-MNIST in .*train-images-idx3-ubyte, .*\.gz"):
        fashion_mnist(tmp_path)
    write_idx(tmp_path, compressed=False)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    with pytest.raises(TrainingError, match=r"t10k-labels.* holds 5 bytes, its header says \(6,\)"):
        fashion_mnist(tmp_path)
    labels.write_bytes(b"<html>" + whole)
    with pytest.raises(TrainingError, match=r"t10k-labels.* is no IDX file"):
        fashion_mnist(tmp_path)
    labels.unlink()
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(TrainingError, match=r"t10k-labels.* cannot be read"):
        fashion_mnist(tmp_path)
