"""The runs of the comparison from trained weights: co-trained, a subnetwork alone, and pruned by another library."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from result_rows import provenance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from trained_tasks import STATISTICS, TASKS, Task, accuracy, fit, recalibrate, sgd

import cocktailsdk as cocktail
from cocktailsdk.io.atomic import write_json
from cocktailsdk.patterns.base import DENSE
from cocktailsdk.training.events import Event, NetworkFinished, Saved, StepDone
from cocktailsdk.training.recipes import Pruning, Recipe, recipe_named
from cocktailsdk.training.schedules import ScheduleFactory, cosine

TEMPERATURE = 8.0
"""Of the distillation that a subnetwork alone may have too."""


@dataclass
class Place:
    """Where a run is made.

    Attributes:
        task: Its task.
        data: The folder that holds ``cifar10`` and ``resnet_cifar10``.
        work: Where run states and adapted weights are cached.
        deadline: On the monotonic clock; a run that is not finished then is saved and stopped.
    """

    task: Task
    data: Path
    work: Path
    deadline: float = float("inf")

    @cached_property
    def loaders(self) -> cocktail.presets.Loaders:
        """The task's data."""
        return self.task.loaders(self.data)

    def net(self, patterns: Sequence[str] = ()) -> cocktail.CocktailNet:
        """The trained model and the masks that our default makes of it; by default of all of the task's patterns."""
        example = torch.zeros(2, *self.task.example)
        net = cocktail.sparsify(self.task.model(self.data, self.work), patterns or self.task.patterns, (example,))
        recipe = recipe_named("pretrained")
        (subnets,) = recipe.plan(net.patterns)
        rule = Pruning(net=net, subnets=subnets, new=frozenset(net.masks), load_dense=lambda: None)
        for name, mask in recipe.mask_rule(rule).items():
            net.set_mask(name, mask)
        return net

    def accuracies(
        self, net: cocktail.CocktailNet, *, recalibrated: bool = True, named: Sequence[str] = ()
    ) -> dict[str, float]:
        """Test accuracy in % of the networks that a net has.

        Args:
            net: The networks.
            named: Which; by default the task's named ones.
            recalibrated: Whether they get their statistics from :data:`STATISTICS` batches first, or keep their own.
        """
        known = {DENSE, *net.masks}
        out = {}
        for name in (n for n in named or self.task.named if n in known):
            if recalibrated:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    net.recalibrate(name, itertools.islice(iter(self.loaders.train), STATISTICS))
            with net.using(name):
                out[name] = accuracy(net.model, self.loaders.test)
        return out


class Clock:
    """CPU seconds of a run over all calls, kept beside its state; stops the run when time is up."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self._file, self._deadline = folder / "cpu.json", deadline
        self._before = json.loads(self._file.read_text())["seconds"] if self._file.is_file() else 0.0
        self._began = time.process_time()

    def __call__(self, event: Event) -> None:
        """As a callback of a trainer."""
        if isinstance(event, Saved):  # what was done since the state was saved is done again after a crash
            write_json(self._file, {"seconds": self.seconds})
        if isinstance(event, StepDone | NetworkFinished) and time.monotonic() > self._deadline:
            raise KeyboardInterrupt

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.process_time() - self._began


@dataclass(frozen=True)
class Measured:
    """What a run found.

    Attributes:
        accuracies: By network, in %.
        passes: Forward and backward passes of the student.
        teacher_passes: Forward passes of a teacher that were no student's.
        cpu_seconds: Of training, measuring on the test set aside.
        details: What else a row has.
    """

    accuracies: Mapping[str, float]
    passes: int
    teacher_passes: int
    cpu_seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run(ABC):
    """A run of the comparison. Subclasses make it.

    Attributes:
        name: In tables.
        budget: Student passes that it may have.
        seed: Of the order of batches, and of all else that is random.
        rate: Learning rate; ``None`` for the SDK's default.
    """

    name: str
    budget: int
    seed: int = 0
    rate: float | None = None

    @property
    def key(self) -> str:
        """Identifies the run within its task, also as a folder."""
        rate = "" if self.rate is None else f"--rate-{self.rate:g}"
        return f"{self.name}--{self.budget}{rate}--{self.seed}".translate(str.maketrans(" :", "_-", "/',"))

    @abstractmethod
    def measure(self, place: Place, folder: Path) -> Measured:
        """Make the run, or what is left of it.

        Args:
            place: Task and data.
            folder: Where the run keeps its state.
        """

    def settings(self) -> dict[str, Any]:
        """What identifies the run, as JSON values."""
        plain = () if getattr(self, "slim", False) else ("slim",)  # rows of before have no such field
        return {k: v for k, v in asdict(self).items() if k not in ("name", "budget", "seed", *plain)}

    def row(self, place: Place) -> dict[str, Any]:
        """Make the run: its row for the results."""
        measured = self.measure(place, place.work / place.task.name / self.key)
        return {
            "task": place.task.name,
            "run": self.name,
            "key": self.key,
            "seed": self.seed,
            "budget": self.budget,
            "rate": self.rate,
            "passes": measured.passes,
            "teacher_passes": measured.teacher_passes,
            "cpu_seconds": round(measured.cpu_seconds, 1),
            "accuracies": dict(measured.accuracies),
            "settings": {**self.settings(), **measured.details},
            **provenance(),
        }


@dataclass(frozen=True, kw_only=True)
class Untrained(Run):
    """The start: each subnetwork with its own statistics, and no training."""

    def measure(self, place: Place, folder: Path) -> Measured:
        """Accuracies of the start."""
        del folder
        net = place.net()
        return Measured(place.accuracies(net), 0, 0, 0.0, {"masks": mask_digests(net, place.task.alone)})


@dataclass(frozen=True, kw_only=True)
class CoTrained(Run):
    """A run of :class:`~cocktailsdk.CoTrainer` from the trained weights.

    Attributes:
        recipe: ``None`` for the trainer's own choice.
        patterns: That the net has; none for the task's.
        passes_per_step: Student passes of a step, which divides the budget.
        schedule: ``None`` for the trainer's own.
        options: Further keywords of the trainer.
        held_out: Whether the trainer gets the held-out images.
        own_statistics: Whether networks are measured with the statistics that the run gave them. Rivals get theirs from
            more batches than their default, which does them no harm.
    """

    recipe: str | Recipe | None = None
    patterns: tuple[str, ...] = ()
    passes_per_step: int = 1
    schedule: ScheduleFactory | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    held_out: bool = False
    own_statistics: bool = False

    def trainer(self, place: Place, folder: Path, clock: Clock) -> cocktail.CoTrainer[cocktail.CocktailNet]:
        """Ready to train."""
        given: dict[str, Any] = {"recipe": self.recipe, "schedule": self.schedule}
        given |= {"optimizer": None if self.rate is None else sgd(self.rate)}
        return cocktail.CoTrainer(
            place.net(self.patterns),
            place.loaders.train,
            F.cross_entropy,
            val_loader=place.loaders.merge if self.held_out else None,
            start="pretrained",
            total_steps=self.budget // self.passes_per_step,
            seed=self.seed,
            out_dir=folder,
            callbacks=[clock],
            **{name: value for name, value in given.items() if value is not None},
            **{**place.task.execution, **self.options},
        )

    def measure(self, place: Place, folder: Path) -> Measured:
        """Train and measure."""
        clock = Clock(folder, place.deadline)
        trainer = self.trainer(place, folder, clock)
        net = trainer.fit()
        seconds, history = clock.seconds, trainer.history
        given: dict[str, int] = {}
        for made in (r.made or {} for r in history.rounds):
            given = {name: given.get(name, 0) + made.get(name, 0) for name in (*given, *made)}
        details = {"given": given, "fingerprint": trainer.fingerprint, "wall_seconds": round(history.seconds, 1)}
        details |= {"masks": mask_digests(net, place.task.alone)}
        found = place.accuracies(net, recalibrated=not self.own_statistics)
        return Measured(found, history.passes, self._teacher_passes(history.passes, given), seconds, details)

    def _teacher_passes(self, passes: int, given: Mapping[str, int]) -> int:
        recipe = self.recipe if isinstance(self.recipe, Recipe) else recipe_named(self.recipe or "pretrained")
        if recipe.teacher == "frozen":
            return passes
        if not recipe.distill or self.passes_per_step > 1:
            return 0  # in a sandwich, the dense network's own pass teaches
        return passes - given.get(DENSE, 0)

    def settings(self) -> dict[str, Any]:
        """With functions and recipes by their names."""
        recipe = self.recipe.describe() if isinstance(self.recipe, Recipe) else self.recipe
        options = {k: v if isinstance(v, str | int | float) else repr(v) for k, v in self.options.items()}
        return {"recipe": recipe, "patterns": list(self.patterns), "rate": self.rate, "options": options}


@dataclass(frozen=True, kw_only=True)
class Alone(Run):
    """One subnetwork trained by itself, under the mask that it has in our run.

    Attributes:
        subnet: Which.
        distilled: Whether the trained model teaches it as in our default, besides the labels.
        slim: Whether the slim model is trained, which computes the same as the masked one in less time.
    """

    subnet: str
    distilled: bool = False
    slim: bool = False

    def measure(self, place: Place, folder: Path) -> Measured:
        """Train and measure."""
        net, clock = place.net(), Clock(folder, place.deadline)
        masks = mask_digests(net, [self.subnet])
        whole = "unstructured@0"  # of a slim model, nothing else is masked
        if self.slim:
            slim = net.slim(self.subnet).to(memory_format=torch.channels_last)
            net = cocktail.sparsify(slim, [whole], torch.zeros(2, *place.task.example))
        taught: dict[str, Any] = taught_by(place.task.model(place.data, place.work)) if self.distilled else {}
        tuned = cocktail.finetune(
            net,
            whole if self.slim else self.subnet,
            place.loaders.train,
            taught.pop("loss_fn", F.cross_entropy),
            total_steps=self.budget,
            optimizer=sgd(self.rate or 0.01),
            schedule=cosine(),
            seed=self.seed,
            out_dir=folder,
            callbacks=[clock],
            **taught,
            **place.task.execution,
        )
        seconds = clock.seconds
        found = place.accuracies(tuned, named=[whole] if self.slim else [self.subnet])
        if self.slim:
            found = {self.subnet: found[whole]}
        details = {"masks": masks}
        return Measured(found, self.budget, self.budget if self.distilled else 0, seconds, details)


def taught_by(teacher: nn.Module) -> dict[str, Any]:
    """Keywords that have a frozen model teach a trainer's only network: half labels, half soft labels."""
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        images, labels = batch
        if not torch.is_grad_enabled():
            return model(images), labels
        with torch.no_grad():
            soft = teacher(images)
        return model(images), (labels, soft)

    def loss(output: Tensor, target: Any) -> Tensor:
        if isinstance(target, Tensor):
            return F.cross_entropy(output, target)
        labels, soft = target
        logs = (F.log_softmax(z / TEMPERATURE, 1) for z in (output, soft))
        divergence = F.kl_div(*logs, reduction="batchmean", log_target=True)
        return 0.5 * F.cross_entropy(output, labels) + 0.5 * TEMPERATURE**2 * divergence

    return {"loss_fn": loss, "batches": cocktail.BatchSettings(forward_fn=forward)}


@dataclass(frozen=True, kw_only=True)
class TorchPruned(Run):
    """A model that Torch-Pruning made smaller, trained by the labels.

    The library takes a shortcut that pads with zero channels for one that keeps their order. Where it prunes what
    shortcuts carry, channels are added that do not belong together; training repairs that in part.

    Attributes:
        subnet: Which of our subnetworks it has as many multiply-adds as.
        inside: Whether only channels inside of residual blocks are pruned, where nothing is misaligned.
    """

    subnet: str
    inside: bool = False

    def measure(self, place: Place, folder: Path) -> Measured:
        """Prune, train and measure; too short to keep a state."""
        del folder
        model = place.task.model(place.data, place.work)
        example = torch.zeros(2, *place.task.example)
        wanted = flops_of(place.net().slim(self.subnet), example)
        pruned = self._pruned(wanted, model, example).to(memory_format=torch.channels_last)
        pruned.train()  # Torch-Pruning leaves it in evaluation mode
        began = time.process_time()
        fit(pruned, place.loaders.train, self.budget, self.rate or 0.01, self.seed)
        recalibrate(pruned, place.loaders.train)
        seconds = time.process_time() - began
        found = {self.subnet: accuracy(pruned, place.loaders.test)}
        details = {"flops": flops_of(pruned, example), "flops_of_subnet": wanted}
        return Measured(found, self.budget, 0, seconds, {**details, "flops_of_dense": flops_of(model, example)})

    def _pruned(self, flops: int, model: nn.Module, example: Tensor) -> nn.Module:
        """The model with FLOPs as close as one ratio for all layers comes."""
        import torch_pruning as tp

        def pruned(ratio: float) -> nn.Module:
            slim = copy.deepcopy(model)
            kept = [m for path, m in slim.named_modules() if self._keeps(path, m)]
            importance = tp.importance.GroupMagnitudeImportance(p=2)
            tp.pruner.BasePruner(slim, example, importance, pruning_ratio=ratio, ignored_layers=kept).step()
            return slim

        with torch.random.fork_rng(devices=[]):
            candidates = [pruned(step / 64) for step in range(1, 64)]
        return min(candidates, key=lambda slim: abs(flops_of(slim, example) - flops))

    def _keeps(self, path: str, module: nn.Module) -> bool:
        """Whether a module keeps its output channels."""
        if isinstance(module, nn.Linear):
            return True
        return self.inside and isinstance(module, nn.Conv2d) and not re.fullmatch(r"layer\d\.\d\.conv1", path)


@torch.no_grad()
def flops_of(model: nn.Module, example: Tensor) -> int:
    """FLOPs of a forward pass, twice its multiply-adds."""
    with FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops())


def mask_digests(net: cocktail.CocktailNet, names: Sequence[str]) -> dict[str, str]:
    """What tells whether two nets have the same masks of subnetworks."""

    def digest(name: str) -> str:
        sha = hashlib.sha256()
        for key, mask in sorted(net.mask_tensors(name).items()):
            sha.update(key.encode() + (mask != 0).contiguous().numpy().tobytes())
        return sha.hexdigest()[:12]

    return {name: digest(name) for name in names if name in net.masks}


Runs = Callable[[Sequence[Mapping[str, Any]], Sequence[int]], Iterator[Run]]
"""The runs of a piece, given the rows that are there and the seeds asked for."""

__all__ = ["TASKS", "Alone", "CoTrained", "Measured", "Place", "Run", "Runs", "TorchPruned", "Untrained"]
