"""From a configuration to networks, a trainer, and measurements of all networks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.utils.data import Subset

import cocktailsdk as cocktail
from cocktailsdk.io.atomic import write_atomic
from cocktailsdk.training.distributed.ranks import SINGLE, Ranks
from cocktailsdk.training.events import Callback
from cocktailsdk.training.recipes import recipe_named
from cocktailsdk.training.schedules import cosine
from cocktailsdk.utils.devices import available_device

from .catalog import CATALOG, DatasetError, RegisteredDataset
from .config import Config, ConfigError
from .data import DetectionDataset, example_images, test_loader, train_loaders
from .distillation import DenseTeacher
from .draw import chosen_networks, drawn, write_comparison
from .evaluation import coco_metrics, image_precisions, predictions
from .models import Architecture, architecture_of, build_model
from .tables import jsonable

log = logging.getLogger(__name__)

Using = Callable[[str], AbstractContextManager[Any]]
Metrics = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Setup:
    """What a configuration stands for.

    Attributes:
        cfg: The configuration.
        architecture: The kind of detector.
        train: What it learns from.
        test: What it is measured on.
        classes: How many classes the model has, where no data are there to tell.
    """

    cfg: Config
    architecture: Architecture
    train: RegisteredDataset
    test: RegisteredDataset
    classes: int = 0

    @classmethod
    def of(cls, cfg: Config, classes: int = 0) -> Setup:
        """Check a configuration as far as that is possible without reading data.

        Raises:
            CocktailError: Its device is not here.
        """
        available_device(cfg.MODEL.DEVICE or "cpu", of="MODEL.DEVICE=")
        sets = CATALOG.get(cfg.DATASETS.TRAIN), CATALOG.get(cfg.DATASETS.TEST)
        return cls(cfg, architecture_of(cfg), *sets, classes)

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return Path(self.cfg.OUTPUT_DIR).expanduser()

    @property
    def device(self) -> torch.device:
        """Where networks run, in a program of one process."""
        return torch.device(self.cfg.MODEL.DEVICE or "cpu")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is measured: boxes, and masks where there are."""
        return ("bbox", "segm") if self.architecture.masks and self.test.has_masks else ("bbox",)

    def model(self) -> torch.nn.Module:
        """A freshly built model."""
        return build_model(self.cfg, self.classes or len(self.train.classes))

    def net(self) -> cocktail.CocktailNet:
        """The model and its sparse networks."""
        args, kwargs = self.architecture.example(example_images(self.cfg))
        chosen = self.cfg.COCKTAIL
        return cocktail.sparsify(self.model(), chosen.PATTERNS, args, kwargs, exclude_modules=chosen.EXCLUDE or None)

    def saved_net(self) -> cocktail.CocktailNet:
        """The networks that a run has saved."""
        return cocktail.from_pretrained(self.out / "bundle", self.model())


def trainer_of(setup: Setup, net: cocktail.CocktailNet, callbacks: Sequence[Callback] = ()) -> cocktail.CoTrainer:
    """The trainer that a configuration describes; with what is saved in the run's folder it goes on.

    Raises:
        ConfigError: A setting makes no sense.
    """
    cfg, architecture = setup.cfg, setup.architecture
    loaders = train_loaders(setup.train, cfg, architecture.masks)
    chosen, solver = cfg.COCKTAIL, cfg.SOLVER
    weight = float(chosen.DISTILL_WEIGHT) if chosen.DISTILL else 0.0
    recipe = recipe_named(chosen.RECIPE)
    if recipe.distill is not False:  # a share of the labels' loss stays: features alone do not teach boxes
        recipe = replace(recipe, distill=weight or False)
    if recipe.merges and loaders.held_out is None:
        raise ConfigError(
            f"COCKTAIL.RECIPE {chosen.RECIPE} merges networks by how well they do on images kept from training; "
            "set COCKTAIL.HELD_OUT to how many"
        )
    optimizers = {
        "SGD": lambda p: torch.optim.SGD(p, solver.BASE_LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY),
        "AdamW": lambda p: torch.optim.AdamW(p, solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY),
    }
    if solver.OPTIMIZER not in optimizers:
        raise ConfigError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it is one of {', '.join(optimizers)}")
    steps = solver.STEPS_PER_EPOCH or min(len(loaders.train), max(1, solver.MAX_ITER // 100))
    return cocktail.CoTrainer(
        net,
        loaders.train,
        lambda output, targets: output.losses,  # a mapping of scalars, which are added
        recipe=recipe,
        val_loader=loaders.held_out,
        metric=image_precisions,
        distillation=cocktail.DistillationSettings(
            loss_fn=DenseTeacher(chosen.DISTILL_FEATURES, chosen.DISTILL_LOGITS, architecture.softmax), weight=weight
        ),
        optimizer=optimizers[solver.OPTIMIZER],
        schedule=cosine(warmup=solver.WARMUP, minimum=0.01),
        total_steps=solver.MAX_ITER,
        batches=cocktail.BatchSettings(forward_fn=architecture.forward, steps_per_epoch=steps),
        start=chosen.START,
        evaluation=cocktail.EvaluationSettings(recalibration_batches=chosen.RECALIBRATION_BATCHES),
        execution=cocktail.ExecutionSettings(
            mixed_precision=solver.PRECISION or None, max_grad_norm=solver.CLIP_NORM or None
        ),
        seed=cfg.SEED,
        out_dir=setup.out,
        device=cfg.MODEL.DEVICE or None,
        callbacks=callbacks,
        output=cocktail.OutputSettings(config={k: v for k, v in cfg.items() if k not in ("OUTPUT_DIR", "TEST", "VIS")}),
    )


def measured(
    setup: Setup,
    net: cocktail.CocktailNet,
    using: Using | None = None,
    ranks: Ranks = SINGLE,
    note: Callable[[str], None] = log.info,
) -> Metrics:
    """COCO's figures of every network on the test set, by network, kind and name.

    Args:
        setup: The configuration.
        net: The networks.
        using: Makes one active; by default ``net.using``.
        ranks: The processes, each of which looks at a part of the images.
        note: Told which network is being measured.

    Raises:
        DatasetError: The test set has other classes than the training set.
    """
    cfg = setup.cfg
    learned, there = (list(s.classes.values()) for s in (setup.train, setup.test))
    if learned != there:
        raise DatasetError(
            f"{setup.train.name!r} has the classes {', '.join(learned)}, {setup.test.name!r} has {', '.join(there)}: "
            "a detector finds those that it has learned"
        )
    dataset = DetectionDataset(setup.test, cfg, train=False, masks=False)
    mine = Subset(dataset, list(ranks.rows(len(dataset))))
    ids = [image["id"] for image in dataset.images]
    out: Metrics = {}
    for name in cfg.TEST.NETWORKS or [n for n in net.names if n == "dense" or n in net.masks]:
        note(f"measuring {name}")
        with (using or net.using)(name):
            device = next(net.model.parameters()).device
            found = predictions(net.model, setup.architecture, test_loader(mine, cfg), dataset.categories, device)
        parts = [found]
        if ranks.world > 1:
            parts = [[] for _ in range(ranks.world)]
            dist.all_gather_object(parts, found)
        out[net.subnet(name).name] = coco_metrics(setup.test, ids, [r for part in parts for r in part], setup.kinds)
    return out


def write_metrics(setup: Setup, metrics: Metrics) -> Path:
    """Write figures into the run's folder."""
    path = setup.out / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(jsonable(metrics), indent=1).encode())
    return path


@torch.no_grad()
def draw_networks(setup: Setup, net: cocktail.CocktailNet, using: Using | None = None) -> Path | None:
    """Draw what the dense network and three others find in the first test images, side by side."""
    cfg = setup.cfg
    if not cfg.VIS.IMAGES:
        return None
    dataset = DetectionDataset(setup.test, cfg, train=False, masks=False)
    images = [dataset[i][0] for i in range(min(cfg.VIS.IMAGES, len(dataset)))]
    names = chosen_networks([n for n in net.names if n == "dense" or n in net.masks], cfg.VIS.NETWORKS)
    classes, columns = list(setup.train.classes.values()), []
    device = next(net.model.parameters()).device
    net.model.eval()
    for name in names:
        with (using or net.using)(name):
            found = [setup.architecture.detect(net.model, [image.to(device)])[0] for image in images]
        columns.append([drawn(i, d, classes, cfg.VIS.SCORE_THRESH) for i, d in zip(images, found, strict=True)])
    path = setup.out / "detections.png"
    write_comparison(path, list(zip(*columns, strict=True)), names)
    return path


def has_state(out: Path) -> bool:
    """Whether a folder holds a run."""
    return any(_files(out / "state")) or (out / "bundle").exists()


def _files(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())
