"""A recipe: what a run trains when, with which masks, and what becomes of the rounds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from numbers import Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ...errors import TrainingError
from ...patterns import Pattern, Subnet, rounds_of
from ...patterns.registry import registered
from ..step.clipping import AutoClip
from ..step.hooks import StepHook, StepHooks
from .allocation import PassAllocation
from .masks import MASK_RULES, MaskRule
from .steps import SCHEDULES, StepSchedule

__all__ = ["Recipe", "check_start"]

Plan = tuple[dict[str, tuple[Subnet, ...]], ...]
NEW = frozenset({"hooks", "teacher", "temperature", "decay", "allocation", "refit_head", "optimizer_defaults", "clip"})
"""Fields that recipes of release 0.1 did not have."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What :class:`~cocktailsdk.CoTrainer` does. ``dataclasses.replace(recipe, ...)`` makes variants.

    Attributes:
        name: What it is called in reports.
        schedule: Which networks each mini-batch trains: a name (``"pivot"``, ``"rotation"``, ``"sandwich"``,
            ``"single"``, ``"need"``) or a function from a :class:`~.steps.ScheduleContext` to a :class:`~.steps.Step`.
        masks: How a round's masks are made: ``"umg"`` (paper, section 3.2), ``"own"`` (each pattern for itself),
            ``"tickets"`` (likewise; what does not nest is cut from the dense round's weights), ``"levels"`` (all levels
            at once, as the rounds would make them one after the other), ``"refilling"``, or a function from a
            :class:`~.masks.Pruning` to masks by subnet name.
        rounds: ``"levels"``: a dense round, then one for every level (paper, section 3); ``"one"``: all networks
            together in a single round, their masks made from the weights that it begins with.
        rewind: Whether rounds begin from the rewind point (paper, section 3.1) or from where the one before ended.
        distill: Weight of the distillation loss on sparse passes, in [0, 1]; ``True`` for that of the trainer
            (``DistillationSettings.weight``) or of ``CoLoop`` (``distill_weight``), ``False`` for none.
        teacher: Whose outputs the distillation loss compares with: ``"dense"``, the dense network as it stands (paper,
            section 3.2), or ``"frozen"``, a copy of the weights and statistics that the run starts from, in evaluation
            mode. A frozen teacher teaches the dense network too, and needs ``start="pretrained"``.
        temperature: Temperature T of the distillation loss; ``DistillationSettings.temperature`` replaces it. ``None``
            chooses by the task: 8 for logits of shape ``(batch, classes)``, otherwise 1.
        decay: Default learning-rate schedule of a round: ``"restarts"`` (paper, section 4.1) or ``"cosine"``, which
            reaches 0 with the last step.
        allocation: How passes are divided among the networks, for ``schedule="need"``.
        refit_head: What becomes of a linear classifier head after training. ``"shared"``: one head is fitted to the
            features of all networks. ``"own"``: each subnet gets a head of its own. ``"auto"``: ``"own"`` if all heads
            together take at most a tenth of the model's bytes, otherwise ``"shared"``; and none where the loss is not a
            mean cross-entropy or there are fewer than 64 labels to fit it to. ``"none"``: it stays.
        update: On sparse steps momentum and weight decay go on moving masked weights (``"all"``, as the paper's code
            does) or leave them (``"active"``).
        statistics: Running batch-norm statistics while training are those of all networks (``"shared"``) or each
            network's own (``"separate"``), with which it then ends, unless rounds are merged after it. No
            gradient depends on them.
        same_batch: Whether a sparse step trains on the batch of the dense step before it, whose outputs are then the
            teacher's: distillation costs no forward pass.
        merging: How rounds become one: ``"global"``, one share a round (paper, section 3.3); ``"layerwise"``, then each
            layer takes the next larger or smaller share where that is better; ``"gradient"``, then the layers' shares
            descend the held-out loss, and are taken where the metric is better; ``"none"``, the last round is the
            result.
        weights: ``"shared"``, one set for all networks; ``"own"``: every network keeps the weights of the round that
            trained it last, so several sets are stored (rivals that train a network at a time).
        finishing: Share of the run's steps spent after merging, co-training all networks of all rounds with
            ``finishing_schedule``, in [0, 1); 0 for none.
        finishing_schedule: As ``schedule``.
        finishing_rate: Learning rates of finishing, as a share of the optimizer's.
        takes: What nets it is for: ``"any"``, those of one ``"pattern"``, or of one ``"subnet"``.
        needs: Patterns that the net must have, by name.
        only: The only patterns that it may have; empty for any.
        hooks: What happens between steps besides training: see :mod:`~cocktailsdk.training.step.hooks`. A schedule
            that is a hook itself is not named again. Every run works on copies.
        clip: Quantile of the gradient norms of the last steps to which gradients are clipped, between 0 and 1: see
            :class:`~cocktailsdk.training.step.clipping.AutoClip`. ``None`` for no such limit. A ``CoLoop`` leaves
            clipping to the user's loop.
        optimizer_defaults: Which optimizer trains pretrained weights if none is given: the ``"paper"``'s SGD, or one
            that is chosen ``"by model"``: see :mod:`~cocktailsdk.training.optimizers`. From scratch it is the paper's.

    Raises:
        TrainingError: A field makes no sense; it is named.
    """

    name: str
    schedule: str | StepSchedule = "pivot"
    masks: str | MaskRule = "umg"
    rounds: Literal["levels", "one"] = "levels"
    rewind: bool = True
    distill: bool | float = True
    teacher: Literal["dense", "frozen"] = "dense"
    temperature: float | None = 1.0
    decay: Literal["restarts", "cosine"] = "restarts"
    allocation: PassAllocation | None = None
    refit_head: Literal["none", "shared", "own", "auto"] = "none"
    update: Literal["all", "active"] = "all"
    statistics: Literal["shared", "separate"] = "shared"
    same_batch: bool = False
    merging: Literal["global", "layerwise", "gradient", "none"] = "global"
    weights: Literal["shared", "own"] = "shared"
    finishing: float = 0.0
    finishing_schedule: str | StepSchedule = "pivot"
    finishing_rate: float = 1.0
    takes: Literal["any", "pattern", "subnet"] = "any"
    needs: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    hooks: tuple[StepHook, ...] = ()
    clip: float | None = None
    optimizer_defaults: Literal["paper", "by model"] = "paper"

    def __post_init__(self) -> None:
        hints = get_type_hints(Recipe)
        choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
        known = {"schedule": SCHEDULES, "finishing_schedule": SCHEDULES, "masks": MASK_RULES}
        for name, allowed in {**choices, **known}.items():
            value = getattr(self, name)
            if name in known and callable(value):
                continue
            if not isinstance(value, str) or value not in allowed:
                function = ", or a function" if name in known else ""
                raise self._error(name, f"must be one of {', '.join(map(repr, allowed))}{function}")
        if not isinstance(self.hooks, tuple) or not all(isinstance(hook, StepHook) for hook in self.hooks):
            raise self._error("hooks", "must be a tuple of StepHook instances")
        if self.clip is not None and not (_is_number(self.clip) and 0 < self.clip < 1):
            raise self._error("clip", "must be a quantile between 0 and 1, or None")
        if not 0 <= self.distill <= 1:
            raise self._error("distill", "must be True, False or a share in 0 … 1")
        if self.temperature is not None and not (_is_number(self.temperature) and 0 < self.temperature < float("inf")):
            raise self._error("temperature", "must be a number above 0, or None")
        if self.allocation is not None and not isinstance(self.allocation, PassAllocation):
            raise self._error("allocation", "must be a PassAllocation")
        if self.allocation is not None and self.rounds != "one":
            raise self._error("allocation", 'is for rounds="one"')
        if self.schedule == "need" and self.allocation is None:
            raise self._error("schedule", "goes with an allocation=PassAllocation(...)")
        if self.refit_head != "none" and (self.weights == "own" or self.rounds != "one"):
            raise self._error("refit_head", 'is for rounds="one" and weights="shared"')
        if not 0 <= self.finishing < 1:
            raise self._error("finishing", "must be a share of the steps, in 0 … 1, below 1")
        if not self.finishing_rate > 0:
            raise self._error("finishing_rate", "must be above 0")
        if self.weights == "own" or self.rounds == "one":
            without = 'with rounds="one" or weights="own"'
            if self.finishing:
                raise self._error("finishing", f"comes after the rounds' shared weights are merged: 0 {without}")
            if self.merges:
                raise self._error("merging", f'needs rounds that share their weights: "none" {without}')

    def _error(self, name: str, rule: str) -> TrainingError:
        return TrainingError(f"recipe {self.name!r}: {name} {rule}, got {getattr(self, name)!r}")

    @property
    def step_schedule(self) -> StepSchedule:
        """The schedule's function."""
        return SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule

    @property
    def finishing_step_schedule(self) -> StepSchedule:
        """The same of finishing."""
        return SCHEDULES[s] if isinstance(s := self.finishing_schedule, str) else s

    def distillation(self, weight: float) -> float:
        """Weight of the distillation loss on sparse passes.

        Args:
            weight: The weight that the trainer or ``CoLoop`` was given; at 0 no recipe distils.
        """
        return weight if weight == 0 or self.distill is True else float(self.distill)

    def step_hooks(self) -> StepHooks:
        """Copies of the hooks for one run; empty for most recipes."""
        clipping = () if self.clip is None else (AutoClip(self.clip),)
        return StepHooks(self.schedule, self.finishing_schedule, (*self.hooks, *clipping))

    @property
    def mask_rule(self) -> MaskRule:
        """The mask rule's function."""
        return MASK_RULES[self.masks] if isinstance(self.masks, str) else self.masks

    @property
    def merges(self) -> bool:
        """Whether rounds are merged."""
        return self.merging != "none"

    def plan(self, patterns: Sequence[Pattern], rounds: int | None = None) -> Plan:
        """The subnets of every round after round 0, by pattern in the order in which masks are made.

        Args:
            patterns: The net's.
            rounds: How many; by default as many as the pattern with most levels has.

        Raises:
            TrainingError: The recipe is not for such nets, or has one round and several are asked for.
        """
        self._check(patterns)
        if self.rounds == "levels":
            return rounds_of(patterns, rounds)
        if rounds is not None and rounds != 1:
            raise TrainingError(f"recipe {self.name!r} trains all networks in one round, got rounds={rounds}")
        levels = {p.name: p.subnets() for p in patterns}
        return ({name: levels[name] for name in rounds_of(patterns)[0]},)

    def _check(self, patterns: Sequence[Pattern]) -> None:
        present = [p.name for p in patterns]
        names = [s.name for p in patterns for s in p.subnets()]
        if self.takes == "pattern" and len(patterns) > 1:
            raise TrainingError(
                f"recipe {self.name!r} trains one pattern a run, and this net has "
                f"{', '.join(present)}: sparsify() the model with one of them, and train each in a "
                "run of its own"
            )
        if self.takes == "subnet" and len(names) > 1:
            raise TrainingError(
                f"recipe {self.name!r} trains one sparse network a run, and this net has {len(names)} "
                f"({', '.join(names[:3])}, …): sparsify() the model with a single level, as in "
                "Unstructured(sparsities=[0.9]), and train each in a run of its own"
            )
        if missing := [name for name in self.needs if name not in present]:
            raise TrainingError(
                f"recipe {self.name!r} needs the pattern {missing[0]!r}, and this net has {', '.join(present)}: give "
                "it to sparsify() too"
            )
        if self.allocation is not None:
            known = {*present, *registered()}
            if unknown := [name for name in self.allocation.patterns if name not in known]:
                near = difflib.get_close_matches(str(unknown[0]), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f": there are {', '.join(map(repr, sorted(known)))}"
                raise TrainingError(
                    f"recipe {self.name!r}: PassAllocation.patterns has a weight for {unknown[0]!r}, and there is no "
                    f"such pattern{hint}"
                )
        if self.only and (other := [name for name in present if name not in self.only]):
            raise TrainingError(
                f"recipe {self.name!r} is for {' and '.join(self.only)}, and this net has {other[0]}: sparsify() the "
                "model without, or choose another recipe"
            )

    def describe(self) -> dict[str, Any]:
        """All fields as JSON values; of functions the name, of dataclass instances also their fields.

        Fields that a release had not yet are described where they are not at their defaults: its runs can then be
        resumed.
        """
        plain = {
            field.name for field in fields(self) if field.name in NEW and getattr(self, field.name) == field.default
        }
        return {f.name: _described(getattr(self, f.name)) for f in fields(self) if f.name not in plain}


def check_start(recipe: Recipe, start: str) -> None:
    """See that a recipe goes with where a run's weights come from.

    Raises:
        TrainingError: The untrained weights of a run from scratch would be its teacher.
    """
    if recipe.teacher == "frozen" and start == "scratch":
        raise TrainingError(
            f"recipe {recipe.name!r} has the weights that the run starts from as its teacher, and start={start!r} says "
            'that they are untrained: give start="pretrained", or another recipe, such as recipe="cocktail"'
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _described(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__qualname__, **{k: _described(v) for k, v in asdict(value).items()}}
    if isinstance(value, Mapping):
        return {str(k): _described(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_described(v) for v in value]
    if isinstance(value, StepHook):
        return type(value).__qualname__
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return value
