"""Co-training in loops of people's own: which network a step trains, switched in place, and what it learns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import CocktailError, SubnetError, TrainingError
from ..net.subnet_model import SubnetModel
from ..patterns.base import DENSE
from ..utils.blame import MISFITS, blamed
from ..utils.devices import device_of
from ..utils.fsdp import reshard_after_forward
from ..utils.modes import TrainingModes, evaluating, modes_restored
from ..utils.nested import default_forward, form_of, tensors_in, to_device
from ..utils.norms import running_norms
from ..utils.settings import forked
from ..utils.weight_caches import forget_derived
from .arguments import check_numbers
from .budget import round_steps
from .data.batches import HeldBatches
from .data.loader_state import refuse_spent
from .left_out import weight_sums
from .loop_step import LoopStep, beyond, needs_trainer
from .metrics import MetricFn, accuracy_of, mean_score
from .recipes import Recipe, Step, recipe_named
from .rescue import rescued_bundle
from .round_plan import names_until, networks_of, round_masks, step_of
from .state.compatibility import Foreign, check_classes, check_masks
from .state.configuration import differences
from .state.encoding import pack_masks, unpack_masks
from .state.provenance import note_training
from .step.distill import Classes, Distillation, DistillFn, find_classes
from .step.execution import Execution
from .step.forward import ForwardFn, detached
from .step.nan_guard import not_finite
from .step.precision import without_autocast

__all__ = ["CoLoop"]

LOOKS = 8
"""In so many steps class logits are looked for; all labels of the first ones may be ignored."""


class CoLoop:
    """The step schedule without the trainer: drops into a plain loop, Accelerate, Lightning or a transformers Trainer.

    It says which network each step trains, makes every round's masks (paper, section 3.2) from the weights that the one
    before ended with, switches the model in place, teaches sparse networks by the dense one, and masks their gradients.
    The model, the optimizer, the data and all else stay yours. With the same batches, and an optimizer begun anew with
    every round, weights are those of :class:`~cocktailsdk.CoTrainer`, bit for bit.

    Args:
        net: From :func:`~cocktailsdk.sparsify`; train ``net.model``, wrapped as you like. Its masks are made anew. A
            model that is to be sharded (``fully_shard``) must be so already.
        steps: Optimizer steps in all. Finishing gets the recipe's share of them, rounds the rest in equal parts.
        recipe: A name or a :class:`~cocktailsdk.training.recipes.Recipe`; one that goes on from round to round and
            trains one network a step, as the default does.
        rounds: Rounds after the dense one. Default: the largest number of levels of a pattern.
        start: ``"pretrained"`` skips the dense round.
        forward_fn: ``forward_fn(model, batch) -> (output, target)``, for the teacher's passes; found by itself for
            tensors, ``(inputs, target)`` and mappings.
        distill_fn: ``distill_fn(student_output, teacher_output) -> scalar``; by default soft cross-entropy of class
            logits.
        distill_weight: Share of it in the loss of sparse steps, where the recipe names none; 0 for none.
        seed: Of what the recipe's schedule draws. Global generators are not seeded.

    Attributes:
        total: Steps in all.
        done: Steps done.
        current: The step that is open; ``None`` between steps.

    Raises:
        TrainingError: For arguments that make no sense, and recipes that need the trainer; says why.

    Example:
        ```python
        loop = cocktail.CoLoop(net, steps=10_000)
        for x, y in loop.batches(loader):
            with loop.step((x, y)) as step:
                output = net.model(x)
                optimizer.zero_grad()
                step.loss(F.cross_entropy(output, y), output, y).backward()
            optimizer.step()
        loop.finish(loader, val_loader)
        ```
    """

    def __init__(
        self,
        net: SubnetModel,
        steps: int,
        *,
        recipe: str | Recipe = "cocktail",
        rounds: int | None = None,
        start: Literal["scratch", "pretrained"] = "scratch",
        forward_fn: ForwardFn | None = None,
        distill_fn: DistillFn | None = None,
        distill_weight: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not isinstance(net, SubnetModel):
            raise TrainingError(f"net must be what cocktailsdk.sparsify() returned, got {type(net).__name__}")
        check_numbers(steps=steps, rounds=rounds, distill_weight=distill_weight, seed=seed)
        recipe = recipe if isinstance(recipe, Recipe) else recipe_named(recipe)
        if why := needs_trainer(recipe):
            raise TrainingError(f"recipe {recipe.name!r} {why}: CoTrainer does that, CoLoop does not")
        if start not in ("scratch", "pretrained"):
            raise TrainingError(f'start must be "scratch" or "pretrained", got {start!r}')
        if not 0 <= distill_weight <= 1:
            raise TrainingError(f"distill_weight must lie in 0 … 1, got {distill_weight!r}")
        self._net, self._recipe, self._seed = net, recipe, seed
        self._modes, self._norms = TrainingModes(net.model), list(running_norms(net.model).values())
        self._plan = recipe.plan(net.patterns, rounds)
        self._first = 0 if start == "scratch" and recipe.rounds == "levels" else 1
        self._lengths = round_steps(steps, len(self._plan) + 1 - self._first, recipe.finishing)
        share = recipe.distill
        weight = distill_weight if share is True or not distill_weight else float(share)
        self._weight, self._distill_fn = weight, distill_fn
        self._classes: Classes | None = None
        self._looks = 0
        self._before: Tensor | None = None
        self._forward = forward_fn or default_forward
        self._execution = Execution(net.model, self._forward)
        if self._execution.sharded:
            reshard_after_forward(net.model)  # masks act on the shards
        self._stack = ExitStack()
        self._accumulated = False
        self._led: tuple[Any, Any, list[int]] | None = None
        self._entered = 0
        self._configuration = {
            "recipe": recipe.describe(),
            "steps": steps,
            "rounds": len(self._plan),
            "start": start,
            "distill_weight": distill_weight,
            "seed": seed,
            "subnets": net.names,
        }
        self.total, self.done = steps, 0
        self.current: LoopStep | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.total

    @property
    def network(self) -> str:
        """Name of the network that the open step trains, or else the next one."""
        return self.current.network if self.current is not None else self._next()[1].turns[0].network

    @property
    def repeats(self) -> bool:
        """Whether the next step is best given the very tensors of the last one, whose dense output it learns from.

        On any other batch the dense network runs once more, without gradients.
        """
        return self._led is not None and not self.finished and self._next()[1].follows

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches for all steps that are left: the loader's, again and again, each once more where it is wanted.

        Args:
            loader: Can be gone through again and again.

        Raises:
            TrainingError: A whole pass over the loader took no step.
        """
        while not self.finished:
            before = self.done
            for batch in loader:
                for _ in itertools.count():
                    at = self.done
                    yield batch
                    if self.done == at or not self.repeats:
                        break
                if self.finished:
                    return
            if self.done == before and not self._accumulated:
                raise TrainingError(
                    "a pass over the loader took no step: it gave no batches, is an iterator that is spent, or "
                    "`with loop.step(batch):` was left out"
                )

    @contextmanager
    def step(self, batch: Any = None, *, last: bool = True) -> Iterator[LoopStep]:
        """Train one network inside: its forward and its backward pass. Step the optimizer after it.

        On leaving, gradients of masked weights are zero and the dense weights are back. After an error inside, the
        step counts as not done.

        Args:
            batch: What ``forward_fn`` takes, for the dense network's pass where this step needs one.
            last: Whether the optimizer steps next; false for all but the last of accumulated batches.

        Raises:
            TrainingError: All steps are done, one is open already, or what it needs was left out.
        """
        step = self.begin(batch, last=last)
        try:
            yield step
        except BaseException:
            self._close()
            raise
        self.end()

    def begin(self, batch: Any = None, *, last: bool = True) -> LoopStep:
        """Open a :meth:`step` where a ``with`` does not fit; :meth:`end` closes it, after ``backward()``."""
        net = self._net
        net._same_model()
        if self.current is not None:
            raise TrainingError("a step is open already: call end(), or leave its `with`, before the next one")
        if net.active != DENSE:
            raise TrainingError(f"{net.active!r} is active: switch('dense') before a step")
        round_, step, number = self._next()
        if len(step.turns) > 1 or step.turns[0].resolution != 1:
            raise beyond(self._recipe, "trains several networks, or at several resolutions, in one step")
        if step.prune or step.keep is not None or step.forget or step.regrow or step.correct:
            raise beyond(self._recipe, "changes masks, gradients or the optimizer inside rounds")
        if self._before is None and not self.done:
            self._before = weight_sums(net.model)
        self._enter(round_)
        forget_derived()  # the optimizer has stepped, inside the caller's autocast perhaps
        if self._modes.frozen or not all(norm.training for norm in self._norms):
            self._modes.observe()
        opened = LoopStep(self._loss, step, round_, number == 0 and not self._accumulated, round_ > len(self._plan))
        if opened.network != DENSE and self._weight:
            opened.teacher = self._teacher(step, batch)
        self._stack = ExitStack()
        if opened.network != DENSE:
            self._stack.enter_context(net.using(opened.network, statistics=False))
        if opened.network == DENSE and self._recipe.same_batch:
            self._led = None
        self._batch, self._last, self.current = batch, last, opened
        return opened

    def end(self) -> None:
        """Close a step: mask the gradients, restore the dense weights."""
        step = self.current
        if step is None:
            raise TrainingError("no step is open: call begin(batch) before the forward pass")
        try:
            if step.network != DENSE:
                self._mask(step)
        finally:
            self._close()
        if self._recipe.same_batch and step.said is not None and self._last and not self._accumulated:
            self._led = (self._batch, step.said, _versions(self._batch))
        self._accumulated = not self._last
        self.done += self._last

    def finish(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        *,
        metric: MetricFn | None = None,
        recalibration_batches: int = 8,
    ) -> SubnetModel:
        """Give every network batch-norm statistics of its own, and a metric where there is held-out data.

        Args:
            train_loader: Batches from which statistics are computed.
            val_loader: Held-out batches.
            metric: ``metric(output, target) -> scores``, one for each example. Default: accuracy.
            recalibration_batches: How many training batches.

        Returns:
            The net, to be saved by ``save_pretrained``.

        Raises:
            TrainingError: Some networks have no masks yet, no weight changed in all steps, no metric can be found, or
                a loader, the model or the metric raised. The net then keeps its weights, masks, statistics and metrics,
                and weights and masks are saved to a temporary folder, which the error names.
        """
        net = self._net
        if self.current is not None or self._round()[0] < len(self._plan):
            raise TrainingError(f"finish() comes after the last round; {self.done} of {self.total} steps are done")
        self._check_trained()
        refuse_spent(val_loader, "val_loader")
        device = device_of(net.model)
        statistics, metrics = dict(net.statistics), dict(net.metrics)
        try:
            with without_autocast(device), forked(), modes_restored(net.model):
                self._modes.apply()
                batches = HeldBatches(train_loader, (self._seed, "recalibration"), device, recalibration_batches)
                held = None if val_loader is None else HeldBatches(val_loader, (self._seed, "held out"), device)
                if held is not None and metric is None:
                    metric = self._accuracy(held)
                net.statistics.clear()
                net.metrics.clear()
                for i, name in enumerate([DENSE, *names_until(net, self._plan, len(self._plan))]):
                    net.recalibrate(name, batches, lambda model, batch: self._forward(model, batch)[0])
                    if held is not None and metric is not None:
                        with net.using(name):
                            score = mean_score(net.model, held, self._forward, metric, check=not i)
                        net.metrics[name] = score.number
            note_training(net, self._configuration, train_loader)
        except Exception as error:
            net.statistics.clear()
            net.statistics.update(statistics)
            net.metrics.clear()
            net.metrics.update(metrics)
            what = error if isinstance(error, CocktailError) else f"{type(error).__name__}: {error}"
            saved = rescued_bundle(net, "call finish() again, or ")
            where = saved or "The trained weights and masks are in the net: call finish() again"
            raise TrainingError(f"finish() failed ({' '.join(str(what).split())}). {where}") from error
        return net

    def _check_trained(self) -> None:
        """See that the optimizer steps did something, and nothing that makes weights worthless."""
        if self._before is not None and torch.equal(self._before, weight_sums(self._net.model)):
            raise TrainingError(
                f"no weight changed in {self.done} steps, so nothing was trained: was every optimizer step left out "
                "(a GradScaler, a loss that is not finite), or is the optimizer not over net.parameters()?"
            )
        if wrong := not_finite(self._net.model):
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise TrainingError(
                f"{', '.join(wrong[:3])}{more} became infinite or no number in training: lower the learning rate, or "
                "look for values in the data that are not finite"
            )

    def _accuracy(self, held: HeldBatches) -> MetricFn:
        """Accuracy, where outputs are class logits along axis 1, as the steps or a held-out batch show."""
        model = self._net.model
        if self._classes is None:
            with evaluating(model), torch.no_grad():
                for batch in itertools.islice(held, 1):
                    self._classes = find_classes(*self._forward(model, batch), None)
        if self._classes is None or self._classes.axis != 1:
            raise TrainingError(
                "finish() measures classifications by itself, and nothing else: give metric, or no val_loader"
            )
        return accuracy_of(self._classes)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, and its masks: tensors and plain values. Save the model and the optimizer beside.

        Raises:
            TrainingError: A step is open, or batches are being accumulated.
        """
        if self.current is not None or self._accumulated:
            raise TrainingError("state_dict() is for between steps: call it after the optimizer's")
        names = names_until(self._net, self._plan, self._entered)
        return {
            "format": 1,
            "configuration": self._configuration,
            "done": self.done,
            "entered": self._entered,
            "classes": None if self._classes is None else asdict(self._classes),
            "masks": pack_masks({name: self._net.masks[name] for name in names}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where another loop stood, with its masks. What a same-batch step would have reused is computed anew.

        Raises:
            TrainingError: The state is of another loop; says what differs.
        """
        if not isinstance(state, Mapping) or state.get("format") != 1:
            said = state.get("format") if isinstance(state, Mapping) else type(state).__name__
            raise TrainingError(f"this is no state of a CoLoop that this release reads: format {said!r}")
        try:
            self._check(state)
        except Foreign as error:
            raise TrainingError(f"this is no state of a CoLoop: {error}") from error
        if lines := differences(state["configuration"], self._configuration):
            raise TrainingError(f"the state is of another loop ({'; '.join(lines)}): build the loop as it was")
        for name, mask in unpack_masks(state["masks"], self._net).items():
            self._net.set_mask(name, mask)
        self._classes = None if state["classes"] is None else Classes(**state["classes"])
        self.done, self._entered, self._led = state["done"], state["entered"], None

    def _check(self, state: Mapping[str, Any]) -> None:
        kinds = {"configuration": Mapping, "masks": Mapping, "done": int, "entered": int}
        if wrong := [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]:
            raise Foreign(f"its {wrong[0]!r} is {type(state.get(wrong[0])).__name__}")
        if not all(isinstance(t, Tensor) for t in state["masks"].values()) or not 0 <= state["done"] <= self.total:
            raise Foreign(f"{state['done']} of {self.total} steps are done")
        check_masks({name: tuple(t.shape) for name, t in state["masks"].items()}, self._net)
        check_classes(state.get("classes"))

    def _round(self) -> tuple[int, int]:
        """The round of the next step, and how many of its steps are done; after the last step, of that one."""
        number = min(self.done, self.total - 1)
        for k, length in enumerate(self._lengths, self._first):
            if number < length:
                return k, number
            number -= length
        raise AssertionError("lengths add up to the total")

    def _next(self) -> tuple[int, Step, int]:
        if self.finished:
            raise TrainingError(f"all {self.total} steps are done: finish(), or build the loop with more steps")
        k, number = self._round()
        networks = networks_of(self._net, self._plan, k)
        length = self._lengths[k - self._first]
        return k, step_of(self._recipe, networks, k, number, length, self._seed, len(self._plan)), number

    def _enter(self, round_: int) -> None:
        """Make the masks of a round, its first step being about to begin."""
        if not self._entered < round_ <= len(self._plan):
            return
        net = self._net
        before = names_until(net, self._plan, round_ - 1)
        masks = round_masks(self._recipe, net, self._plan[round_ - 1], before, round_, _no_dense_round)
        for name, mask in masks.items():
            net.set_mask(name, mask)
        self._entered, self._led = round_, None

    def _teacher(self, step: Step, batch: Any) -> Any:
        if step.follows and self._led is not None:
            led, said, versions = self._led
            # a loader may write the next batch into the same memory
            if _same(batch, led) and _versions(batch) == versions:
                return said
        if batch is None:
            raise TrainingError(
                "sparse steps learn from the dense network's output for the same batch: give it, `loop.step(batch)`; "
                "distill_weight=0 trains without"
            )
        said = blamed(
            "the model",
            lambda: f"on the batch that step() was given, which is {form_of(batch)}",
            "if the model takes such batches otherwise, give CoLoop a forward_fn(model, batch) -> (output, target)",
            MISFITS if self._forward is default_forward else (),
        )
        with torch.no_grad(), said:
            return self._execution.teacher(to_device(batch, device_of(self._net.model)))

    def _loss(self, step: LoopStep, loss: Tensor, output: Any, target: Any) -> Tensor:
        if self._classes is None and self._looks < LOOKS:
            self._looks += 1
            self._classes = find_classes(output, target, loss)
        if step.network == DENSE:
            if step.leads and self._recipe.same_batch and self._weight:
                step.said = detached(output)
            return loss
        if target is None and self._distill_fn is None and self._weight:
            raise TrainingError(
                "step.loss(loss, output, target) needs the target for soft cross-entropy; or give the loop a "
                "distill_fn(student_output, teacher_output)"
            )
        return Distillation(self._weight, self._distill_fn, self._classes)(loss, output, step.teacher, target)

    def _mask(self, step: LoopStep) -> None:
        if self._weight and not step.asked:
            raise TrainingError(
                f"the step of {step.network!r} did not call step.loss(loss, output, target), which adds what the dense "
                "network teaches; distill_weight=0 trains without"
            )
        if not self._last:
            return
        gradients = {n: p.grad for n, p in self._net.model.named_parameters() if p.grad is not None}
        if not gradients:
            raise TrainingError("the step ended without gradients: call backward() inside it, before the optimizer's")
        self._net.zero_masked(step.network, gradients)

    def _close(self) -> None:
        self.current = None
        try:
            self._stack.close()
        except SubnetError as error:
            raise TrainingError(
                f"step the optimizer after `with loop.step(batch):` (after end()), not inside: {error}"
            ) from error


def _same(batch: Any, other: Any) -> bool:
    """Whether two batches hold the very same objects."""
    mine, theirs = tree_leaves(batch), tree_leaves(other)
    return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))


def _versions(batch: Any) -> list[int]:
    """How often each tensor of a batch was written to."""
    try:
        return [tensor._version for tensor in tensors_in(batch)]
    except RuntimeError:  # inference tensors are not counted, and cannot be written to outside of inference mode
        return []


def _no_dense_round() -> None:
    raise TrainingError("the mask rule wants the weights that the dense round ended with, which CoLoop does not keep")
