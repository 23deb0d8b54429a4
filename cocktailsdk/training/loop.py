"""CoLoop: co-training in a loop of your own. It says which network a step trains, and masks the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any, Literal

from torch import Tensor

from ..errors import SubnetError, TrainingError
from ..net.subnet_model import SubnetModel
from ..net.switcher import forget_derived
from ..patterns.base import DENSE
from ..utils.batchnorm import running_norms
from ..utils.devices import device_of
from ..utils.fsdp import reshard_after_forward
from ..utils.losses import ForwardFn
from ..utils.modes import TrainingModes, modes_restored
from ..utils.nested import default_forward
from ..utils.undo import forked
from .data.batches import CachedBatches
from .data.loader_state import refuse_spent
from .left_out import weight_sums
from .loop_finish import accuracy_metric, check_trained, restored_on_failure
from .loop_plan import LoopPlan, check_loop_state
from .loop_step import LoopStep, beyond, dense_output_of, recipe_for_loops
from .metrics import MetricFn, mean_score
from .recipes import Recipe, default_recipe
from .session import model_tensors
from .settings import check_numbers
from .state.encoding import encode_masks
from .state.provenance import note_training
from .step.distill import Classes, Distillation, DistillFn, check_teacher, find_classes
from .step.engine import StepEngine
from .step.execution import Execution, without_autocast
from .step.forward import detached
from .step.same_batch import SameBatch
from .step.teacher import FrozenTeacher

__all__ = ["CoLoop"]

LOOKS = 8
"""In so many steps class logits are looked for; all labels of the first ones may be ignored."""


class CoLoop:
    """The step schedule without the trainer: drops into a plain loop, Accelerate, Lightning or a transformers Trainer.

    It says which network each step trains, makes every round's masks (paper, section 3.2), switches the model in place,
    distils from the dense network, and masks gradients. It shares the step engine with
    :class:`~cocktailsdk.CoTrainer`. The model, the optimizer, the data, forward and backward stay yours. With the same
    batches, and a new optimizer for every round, the weights are the trainer's, bit for bit.

    Args:
        net: From :func:`~cocktailsdk.sparsify`; train ``net.model``, wrapped as you like. Its masks are made anew. A
            model that is to be sharded (``fully_shard``) must be so already.
        steps: Optimizer steps in all. Finishing gets the recipe's share of them, rounds the rest in equal parts.
        recipe: A name or a :class:`~cocktailsdk.training.recipes.Recipe`; one that goes on from round to round and
            trains one network a step. Default: ``"cocktail"``, or ``"pretrained"`` with ``start="pretrained"``. A loop
            has no held-out data while it trains, so the need of a subnet is not measured but its place in its pattern,
            and the classifier head stays as it was trained.
        rounds: Rounds after the dense one. Default: the largest number of levels of a pattern.
        start: ``"pretrained"`` skips the dense round.
        forward_fn: ``forward_fn(model, batch) -> (output, target)``, for the teacher's passes; found by itself for
            tensors, ``(inputs, target)`` and mappings.
        distill_fn: ``distill_fn(student_output, teacher_output) -> scalar``; by default soft cross-entropy of class
            logits.
        distill_weight: Weight of the distillation loss on sparse steps, in [0, 1]. A recipe may set its own weight
            instead, but 0 turns distillation off in every recipe.
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
        recipe: str | Recipe | None = None,
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
        recipe = recipe_for_loops(default_recipe(start) if recipe is None else recipe, start)
        if not 0 <= distill_weight <= 1:
            raise TrainingError(f"distill_weight must lie in 0 … 1, got {distill_weight!r}")
        self._net, self._recipe, self._seed = net, recipe, seed
        self._modes, self._norms = TrainingModes(net.model), list(running_norms(net.model).values())
        self._plan = LoopPlan(net, recipe, steps, rounds, start, seed)
        self._distillation = Distillation(
            recipe.distillation(distill_weight), distill_fn, temperature=recipe.temperature
        )
        self._forward = forward_fn or default_forward
        self._execution = Execution(net.model, self._forward)
        if self._execution.sharded:
            reshard_after_forward(net.model)  # masks act on the shards, not on gathered weights that are kept
        self._first_sums: Tensor | None = None
        self._classes_looks, self._accumulated, self._stack = 0, False, ExitStack()
        self._teacher_checked = False
        self._shared = SameBatch(recipe.same_batch)
        self._configuration = {
            "recipe": recipe.describe(),
            "steps": steps,
            "rounds": self._plan.rounds,
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
        return self.current.network if self.current is not None else self._plan.step(self.done).passes[0].subnet

    @property
    def repeats(self) -> bool:
        """Whether the next step is best given the very tensors of the last one, whose dense output it learns from.

        On any other batch the dense network runs once more, without gradients.
        """
        return self._shared.open and not self.finished and self._shared.follows(self._plan.step(self.done))

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
                while True:
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
        net._check_structure()
        if self.current is not None:
            raise TrainingError("a step is open already: call end(), or leave its `with`, before the next one")
        if net.active != DENSE:
            raise TrainingError(f"{net.active!r} is active: switch('dense') before a step")
        if self._recipe.teacher == "frozen" and self._distillation.weight and self._execution.frozen is None:
            self._execution.frozen = FrozenTeacher(net.model, model_tensors(net.model))
        step, (round_, number) = self._plan.step(self.done), self._plan.place(self.done)
        if len(step.passes) > 1 or step.passes[0].resolution != 1:
            raise beyond(self._recipe, "trains several networks, or at several resolutions, in one step")
        if not self.done and not self._accumulated:
            net._drop_private()
        if self._first_sums is None and not self.done:
            self._first_sums = weight_sums(net.model)
        if self._plan.enter(round_):
            self._shared.clear()
        forget_derived()  # the optimizer has stepped, inside the caller's autocast perhaps
        if self._modes.frozen or not all(norm.training for norm in self._norms):
            self._modes.observe()
        # anew for every step: the caller may have wrapped the model, which may replace its parameters
        self._engine = StepEngine(net, self._execution, self._distillation)
        subnet = step.passes[0].subnet
        teacher = self._shared.teacher_of(step, batch)
        if self._engine.needs_teacher(subnet) and teacher is None:
            teacher = dense_output_of(net, self._execution, batch, self._forward is default_forward)
        self._stack = ExitStack()
        active = self._stack.enter_context(self._engine.active(subnet, teacher=teacher))
        first, finishing = number == 0 and not self._accumulated, round_ > self._plan.rounds
        self.current = LoopStep(self._loss, step, active, round_, first, finishing)
        self._batch, self._last = batch, last
        return self.current

    def end(self) -> None:
        """Close a step: restore the dense weights, mask the gradients."""
        step = self.current
        if step is None:
            raise TrainingError("no step is open: call begin(batch) before the forward pass")
        sparse = step.network != DENSE
        try:
            if self._engine.needs_teacher(step.network) and not step.loss_called:
                raise TrainingError(
                    f"the step of {step.network!r} did not call step.loss(loss, output, target), which adds the "
                    "distillation loss; distill_weight=0 trains without"
                )
        finally:
            self._close()
        # only with the last of accumulated batches: DDP averages the gradients of all in its backward pass
        if sparse and self._last and not self._engine.mask_gradients(step.network):
            raise TrainingError("the step ended without gradients: call backward() inside it, before the optimizer's")
        if self._last and not self._accumulated and step.dense_output is not None:
            self._shared.done(step.plan, step.dense_output, batch=self._batch)
        else:  # the dense output is of one batch, and an accumulated step has several
            self._shared.clear()
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
        if self.current is not None or self._plan.place(self.done)[0] < self._plan.rounds:
            raise TrainingError(f"finish() comes after the last round; {self.done} of {self.total} steps are done")
        net = self._net
        check_trained(net, self.done, self._first_sums)
        refuse_spent(val_loader, "val_loader")
        device, forward = device_of(net.model), self._forward
        with restored_on_failure(net), without_autocast(device), forked(), modes_restored(net.model):
            self._modes.apply()
            batches = CachedBatches(train_loader, (self._seed, "recalibration"), device, recalibration_batches)
            held_out = None if val_loader is None else CachedBatches(val_loader, (self._seed, "held out"), device)
            if held_out is not None and metric is None:
                metric = accuracy_metric(net, held_out, forward, self._distillation.classes)
            net.statistics.clear()
            net.metrics.clear()
            for name in (DENSE, *self._plan.names(self._plan.rounds)):
                net.recalibrate(name, batches, lambda model, batch: forward(model, batch)[0])
                if held_out is not None and metric is not None:
                    with net.using(name):
                        score = mean_score(net.model, held_out, forward, metric, check=name == DENSE)
                    net.metrics[name] = score.number
            note_training(net, self._configuration, train_loader)
        return net

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, and its masks: tensors and plain values. Save the model and the optimizer beside.

        Raises:
            TrainingError: A step is open, or batches are being accumulated.
        """
        if self.current is not None or self._accumulated:
            raise TrainingError("state_dict() is for between steps: call it after the optimizer's")
        entered = self._plan.entered
        masks = {name: self._net.masks[name] for name in self._plan.names(entered)}
        classes = self._distillation.classes
        return {
            "format": 1,
            "configuration": self._configuration,
            "done": self.done,
            "entered": entered,
            "classes": None if classes is None else asdict(classes),
            "masks": encode_masks(self._net, masks),
            **({} if self._execution.frozen is None else {"teacher": dict(self._execution.frozen.tensors)}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where another loop stood, with its masks. What a same-batch step would have reused is computed anew.

        Raises:
            TrainingError: The state is of another loop; says what differs.
        """
        masks = check_loop_state(state, self._net, self._configuration, self.total)
        self._net._drop_private()
        for name, mask in masks.items():
            self._net.set_mask(name, mask)
        classes = None if state["classes"] is None else Classes(**state["classes"])
        self._distillation = replace(self._distillation, classes=classes)
        if "teacher" in state:
            self._execution.frozen = FrozenTeacher(self._net.model, state["teacher"])
        self.done, self._plan.entered = state["done"], state["entered"]
        self._shared.clear()

    def _loss(self, step: LoopStep, loss: Tensor, output: Any, target: Any) -> Tensor:
        distillation = self._distillation
        if distillation.classes is None and self._classes_looks < LOOKS:
            self._classes_looks += 1
            distillation = replace(distillation, classes=find_classes(output, target, loss))
            self._distillation = self._engine.distillation = distillation
        if not self._engine.needs_teacher(step.network):
            if self._shared.leads(step.plan) and distillation.weight:
                step.dense_output = detached(output)
        elif target is None and distillation.fn is None and distillation.weight:
            raise TrainingError(
                "step.loss(loss, output, target) needs the target for soft cross-entropy; or give the loop a "
                "distill_fn(student_output, teacher_output)"
            )
        elif self._execution.frozen is not None and not self._teacher_checked:
            check_teacher(output, step.active.teacher, distillation.fn)
            self._teacher_checked = True
        return step.active.loss(loss, output, target)

    def _close(self) -> None:
        self.current = None
        try:
            self._stack.close()
        except SubnetError as error:
            raise TrainingError(
                f"step the optimizer after `with loop.step(batch):` (after end()), not inside: {error}"
            ) from error
