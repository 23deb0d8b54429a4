"""How training passes run here: alone, or together with other processes (DDP); in full precision or mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import TrainingError
from ...net.switcher import forget_derived
from ...utils.fsdp import sharded, shards
from ...utils.losses import ForwardFn, LossFn, loss_of
from ...utils.modes import modes_restored, train_as_handed
from ...utils.nested import default_forward, split
from ...utils.optional import require
from ..distributed.ranks import SINGLE, Ranks
from ..distributed.sharing import examples, inputs_of
from .distill import Classes, untouched_buffers
from .forward import mapped
from .teacher import FrozenTeacher

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Execution", "MixedPrecision", "Precision", "without_autocast"]


MixedPrecision = Literal["bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """In what training passes compute.

    Attributes:
        name: ``"bf16"``, ``"fp16"``, or ``None`` for the weights' own.
    """

    name: MixedPrecision | None = None

    def __post_init__(self) -> None:
        if self.name not in (None, *_DTYPES):
            raise TrainingError(f'mixed_precision must be None, "bf16" or "fp16", got {self.name!r}')

    def passes(self, run: Callable[[], tuple[Any, Any]], device: torch.device) -> tuple[Any, Any]:
        """A forward pass under autocast, its output in single precision, so that losses are."""
        if self.name is None:
            return run()
        forget_derived()  # inside an autocast of the caller's, leaving this one would not drop casts of older weights
        with torch.autocast(device.type, _DTYPES[self.name]):
            output, target = run()
        return mapped(output, _single), target

    def scaler(self, device: torch.device) -> torch.amp.GradScaler | None:
        """What scales losses such that small gradients do not vanish in 16 bits; only fp16 needs it."""
        return torch.amp.GradScaler(device.type) if self.name == "fp16" else None


FULL = Precision()


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _Pass(nn.Module):
    """A forward pass as a module, so that DDP may wrap it and ``forward_fn`` still sees the user's own model."""

    def __init__(self, model: nn.Module, forward: ForwardFn) -> None:
        super().__init__()
        self.model = model
        self._forward_fn = forward

    def forward(self, batch: Any) -> tuple[Any, Any]:
        """The output and the target."""
        return self._forward_fn(self.model, batch)


class Execution:
    """Runs passes of a model, and brings losses and gradients of all processes together.

    With one process, one batch a step and full precision it adds nothing to them.

    Attributes:
        ranks: The processes.
        precision: Of training passes.
        device: Of the model.
        sharded: Whether each process has a part of the weights (FSDP2).
        frozen: Teaches in place of the dense network as it stands, and the dense network too.

    Args:
        model: The user's own.
        forward: How a batch is used.
        ranks: The processes.
        precision: Of training passes.
        device: Of the model.
        accelerator: Wraps the model where there are several processes.
        clip_norm: Largest norm that the gradients of a step may have all together.
        sync_batch_norm: Whether batch norms use statistics of all processes' examples.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: ForwardFn,
        *,
        ranks: Ranks = SINGLE,
        precision: Precision = FULL,
        device: torch.device | None = None,
        accelerator: Accelerator | None = None,
        clip_norm: float | None = None,
        sync_batch_norm: bool = False,
    ) -> None:
        self.ranks, self.precision = ranks, precision
        self.device = torch.device("cpu") if device is None else device
        self._model, self._forward = model, forward
        self._accelerator = accelerator
        self._clip_norm = clip_norm
        self._norms = synchronised_norms(model, self.device) if sync_batch_norm and ranks.world > 1 else []
        self._parameters = list(model.parameters())
        self._wrapped: nn.Module | None = None
        self.frozen: FrozenTeacher | None = None
        self.sharded = sharded(model)
        self._shards = shards(model) if self.sharded else []
        if self.sharded and precision.name == "fp16":
            raise TrainingError('mixed_precision="fp16" cannot train sharded weights (FSDP2): take "bf16"')

    def wrap(self, batch: Any, loss_fn: LossFn | None) -> None:
        """Wrap the model for several processes; nothing else happens to it.

        Args:
            batch: On the device. A backward pass over it shows whether all parameters get gradients, which DDP wants
                to know.
            loss_fn: The user's loss, or ``None`` for the model's own.
        """
        if self.ranks.world == 1 or self.sharded or self._wrapped is not None:
            return
        assert self._accelerator is not None
        passing = _Pass(self._model, self._forward)
        if self._accelerator.ddp_handler is None and self.ranks.any(self._unused(batch, loss_fn)):
            accelerate = require("accelerate", "training on several processes", error=TrainingError)
            # DDP otherwise waits for ever for gradients of parameters that a pass does not use
            self._accelerator.ddp_handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
        self._wrapped = self._accelerator.prepare_model(passing)
        # Accelerate (1.10 to 1.15) keeps every prepared model in ``_models`` for as long as the program runs. Ours is
        # to be freed with the run, and ``free_memory()`` would drop the user's models too.
        models = self._accelerator._models
        models[:] = [model for model in models if model not in (passing, self._wrapped)]

    def _unused(self, batch: Any, loss_fn: LossFn | None) -> bool:
        model = self._model
        with modes_restored(model), untouched_buffers(model):
            train_as_handed(model)
            output, target = self._forward(model, inputs_of(batch))
            loss_of(output, target, loss_fn).backward()
        unused = any(p.grad is None for p in self._parameters if p.requires_grad)
        model.zero_grad(set_to_none=True)
        return unused

    def student(self, batch: Any) -> tuple[Any, Any]:
        """A pass whose gradients will be wanted: output and target."""
        wrapped = self._wrapped
        if wrapped is None:
            return self.precision.passes(lambda: self._forward(self._model, batch), self.device)
        with self._synchronised():
            return self.precision.passes(lambda: wrapped(batch), self.device)

    @torch.no_grad()
    def teacher(self, batch: Any) -> Any:
        """The teacher's output; neither gradients nor statistics change. The dense weights must be in place.

        A frozen teacher evaluates. The dense network as it stands is in train mode, as the student is.
        """
        if self.frozen is not None:
            with self.frozen.active():
                return self.precision.passes(lambda: self._forward(self._model, batch), self.device)[0]
        with untouched_buffers(self._model), self._synchronised():
            output, _ = self.precision.passes(lambda: self._forward(self._model, batch), self.device)
        return output

    @torch.no_grad()
    def measured(self, batch: Any) -> tuple[Any, Any]:
        """Output and target of a pass that no gradients are wanted of, in the modes that the model is in."""
        with self._synchronised():
            return self.precision.passes(lambda: self._forward(self._model, inputs_of(batch)), self.device)

    @contextmanager
    def _synchronised(self) -> Iterator[None]:
        """Batch norms as synchronised ones, while it is open.

        By class, since ``nn.SyncBatchNorm.convert_sync_batchnorm`` (torch 2.11 to 2.14) makes new modules: names, hooks
        and the masks' parameters would be of modules that are not in the model any more. Both classes have the same
        attributes, but for ``process_group``.
        """
        before = [(norm, norm.__class__) for norm in self._norms]
        for norm, _ in before:
            norm.__class__ = nn.SyncBatchNorm
            norm.process_group = None
        try:
            yield
        finally:
            for norm, kind in before:
                norm.__class__ = kind

    def collecting(self, last: bool) -> AbstractContextManager[Any]:
        """While it is open, gradients are only added up in this process, unless this is the last batch of a pass.

        DDP averages whatever is in ``grad`` in the first backward pass outside of ``no_sync()``, so that all batches
        cost one reduction. Its forward pass must run inside, too: there DDP decides (torch 2.11 to 2.14). FSDP2 has a
        flag in each module instead.
        """
        for module in self._shards:
            module.set_requires_gradient_sync(last, recurse=False)
        wrapped: Any = self._wrapped
        return nullcontext() if last or wrapped is None else wrapped.no_sync()

    def shares(self, batches: Sequence[Any], classes: Classes | None) -> list[Float[Tensor, ""] | None]:
        """What each batch's mean weighs in that over all batches of all processes.

        A mean is over examples; or over labels that are not ignored, where the output holds class logits and the
        batch is used in one of the usual ways.

        Returns:
            ``None`` where there is one process with one batch, which weighs all.
        """
        if self.ranks.world == 1 and len(batches) == 1:
            return [None]
        counts = torch.stack([self._count(batch, classes) for batch in batches])
        # a mean of means weighs examples of small batches too much: each weighs as many labels as it has
        return list(counts / self.ranks.sum(counts.sum()))

    def _count(self, batch: Any, classes: Classes | None) -> Tensor:
        count = examples(batch)
        if count and classes is not None and self._forward is default_forward:
            labels = split(self._model, inputs_of(batch))[2]
            if isinstance(labels, Tensor) and not labels.is_floating_point():
                labels = labels[..., 1:] if classes.shift else labels
                return classes.counted(labels).sum().to(self.device, torch.float32)
        return torch.tensor(float(count), device=self.device)

    def backward(
        self, loss: Float[Tensor, ""], share: Float[Tensor, ""] | None, scaler: torch.amp.GradScaler | None
    ) -> Float[Tensor, ""]:
        """Add a loss's gradients, as much as it weighs.

        Returns:
            The loss, detached, times what it weighs.
        """
        mine = loss
        if share is not None:
            # a batch without labels has a mean that is no number, and 0 times that is no number either
            mine = torch.where(share > 0, loss * share, torch.zeros_like(loss))
        # DDP and FSDP2 average gradients over processes, and the shares already add up to 1 over all of them
        through = mine * self.ranks.world if self.ranks.world > 1 else mine
        if scaler is not None:
            through = scaler.scale(through)
        through.backward()
        return mine.detach()

    def combined(self, losses: Mapping[str, Float[Tensor, ""]]) -> dict[str, Float[Tensor, ""]]:
        """Losses added up over processes."""
        if self.ranks.world == 1:
            return dict(losses)
        return dict(zip(losses, self.ranks.sum(torch.stack([loss.float() for loss in losses.values()])), strict=True))

    def clip(self) -> None:
        """Shorten the gradients where together they are longer than is allowed."""
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)


def synchronised_norms(model: nn.Module, device: torch.device) -> list[Any]:
    """The batch norms that can be synchronised.

    Raises:
        TrainingError: The device cannot; says which can.
    """
    if device.type not in ("cuda", "xpu"):
        raise TrainingError(
            f"sync_batch_norm=True needs devices on which torch.nn.SyncBatchNorm runs (cuda, xpu), not {device.type}: "
            "leave it out, and every process uses its own examples' statistics while it trains"
        )
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and type(m) is not nn.SyncBatchNorm]


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Leave the caller's autocast, under which masks, statistics and merging would be computed in 16 bits."""
    inside = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if inside else nullcontext():
        try:
            yield
        finally:
            forget_derived()  # the caller's context may have kept casts of weights that have changed
