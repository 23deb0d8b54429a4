"""What a preset is: a model, data and settings that train together with one command."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..api import CocktailNet, sparsify
from ..errors import TrainingError
from ..patterns import Pattern
from ..training.keywords import current_keywords
from ..training.settings import OutputSettings
from ..training.trainer import CoTrainer
from .weights import load_weights

__all__ = ["Loaders", "Prepared", "Preset", "start_of"]


class Loaders(NamedTuple):
    """A preset's data.

    Attributes:
        train: Training batches, shuffled and augmented.
        merge: Held-out batches that choose how rounds are merged.
        test: Batches that nothing is chosen by.
    """

    train: Iterable[tuple[Tensor, Tensor]]
    merge: Iterable[tuple[Tensor, Tensor]]
    test: Iterable[tuple[Tensor, Tensor]]


class Prepared(NamedTuple):
    """A preset, ready to train: ``prepared.trainer.fit()``."""

    net: CocktailNet
    trainer: CoTrainer[CocktailNet]
    loaders: Loaders


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, data and settings.

    Attributes:
        name: What it is called.
        model: What its model is called.
        make_model: Builds the model; draws from torch's global generator.
        load: ``load(path) -> Loaders``.
        needs_data: Whether ``path`` must be given.
        input_shape: Of one image.
        patterns: Its patterns.
        training: Keyword arguments of :class:`~cocktailsdk.CoTrainer`.
        seed: The default seed.
        weights: The file of trained weights that the model starts from, if any: ``.safetensors``, or ``.pth`` or
            ``.pt`` with a state dict.
        models: Names of the models that the preset can have; empty if it has one.
        threads: How many threads the command line computes with unless ``OMP_NUM_THREADS`` says otherwise; ``None``
            for PyTorch's own choice. Layers of a tiny network are too short to share, and on a busy machine the
            threads that share them wait for each other.
    """

    name: str
    model: str
    make_model: Callable[[], nn.Module]
    load: Callable[[Path | None], Loaders]
    needs_data: bool
    input_shape: tuple[int, ...]
    patterns: tuple[str | Pattern, ...]
    training: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    weights: Path | None = None
    models: tuple[str, ...] = ()
    threads: int | None = None

    def build_model(self, seed: int | None = None) -> nn.Module:
        """The model, its weights drawn from a seed or read from ``weights``; global generators stay as they were.

        Raises:
            TrainingError: The file cannot be read, or is not of this model.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed if seed is None else seed)
            model = self.make_model()
        if self.weights is not None:
            load_weights(model, self.weights, self.model, [m for m in self.models if m != self.model])
        return model

    def example_input(self) -> Tensor:
        """One input, for tracing the model."""
        return torch.zeros(1, *self.input_shape)

    def loaders(self, data: str | PathLike[str] | None = None) -> Loaders:
        """The data.

        Args:
            data: The folder that holds it; ``None`` where it comes with a package.

        Raises:
            TrainingError: Where it is not there; says what was looked for.
        """
        if data is None and self.needs_data:
            raise TrainingError(f"preset {self.name!r} needs the folder that holds its images (--data PATH)")
        return self.load(None if data is None else Path(data))

    def prepare(
        self, data: str | PathLike[str] | None = None, *, seed: int | None = None, **overrides: Any
    ) -> Prepared:
        """Build the model, load the data, and make the trainer.

        Args:
            data: The folder that holds the data.
            seed: Of the model's weights and of training; by default the preset's.
            **overrides: Arguments of :class:`~cocktailsdk.CoTrainer`: ``out_dir``, ``callbacks``, ``device``, … A group
                of settings replaces the preset's; ``dataclasses.replace(preset.training["rounds"], merge=False)``
                changes one of them.
        """
        seed = self.seed if seed is None else seed
        net = sparsify(self.build_model(seed), self.patterns, example_inputs=(self.example_input(),))
        loaders = self.loaders(data)
        training = current_keywords(self.training, caller="Preset.training: CoTrainer")
        overrides = current_keywords(overrides, training, caller="prepare")
        options: dict[str, Any] = {**training, "seed": seed, **overrides}
        output = options.pop("output", None) or OutputSettings()
        config = {"preset": self.name, "model": self.model, **(output.config or {})}
        if self.weights is not None:
            config["weights"] = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        options["output"] = replace(output, config=config)
        trainer = CoTrainer(net, loaders.train, F.cross_entropy, val_loader=loaders.merge, **options)
        return Prepared(net, trainer, loaders)


def start_of(weights: str | PathLike[str] | None, start: str | None) -> str:
    """``start`` as given; by default ``"pretrained"`` if there are weights.

    Raises:
        TrainingError: ``"pretrained"`` without weights.
    """
    if start == "pretrained" and weights is None:
        raise TrainingError("start='pretrained' needs the trained weights: give weights (--weights FILE)")
    return start or ("scratch" if weights is None else "pretrained")
