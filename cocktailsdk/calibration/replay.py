"""A model run block by block, each block on stored outputs of the block before.

Pruning a block changes what later blocks get. To judge these by what they will get, the model would have to be run from
its first layer for every block. Most deep models are a chain: each block of a list takes what the block before it
returned. There it is enough to keep that one tensor for every batch, and to run one block at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..graph import Weight
from ..utils.batchnorm import running_norms
from ..utils.losses import ForwardFn
from ..utils.modes import evaluating
from .data import CalibrationData
from .passes import run_batches

__all__ = ["Replay", "WholeModel", "find_chain"]


@dataclass
class _Call:
    """The arguments of one block in one batch; the first positional one is what the block before returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Replay:
    """The blocks of a model, and what they need to run again.

    Attributes:
        names: The blocks' paths.
        blocks: The blocks.
        calls: For each batch, the arguments of each block besides its input. Blocks mostly share them.
        states: For each batch, the input of the next block.
    """

    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]
    calls: list[list[_Call]]
    states: list[Tensor]

    def again(self) -> Replay:
        """From the same first inputs; they are shared, not copied."""
        return Replay(self.names, self.blocks, self.calls, list(self.states))

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self.states)

    @torch.no_grad()
    def outputs(self, k: int, parameters: Mapping[str, Tensor] | None = None) -> Iterator[Tensor]:
        """Run a block on all stored states, which stay as they are.

        Args:
            k: The block.
            parameters: Values to use in place of the block's own, by their names within the block.
        """
        block = self.blocks[k]
        with evaluating(block):
            for state, calls in zip(self.states, self.calls, strict=True):
                call = calls[k]
                args = (state.clone(), *call.args)  # a block may add to its input in place
                if parameters:
                    yield _stream(functional_call(block, dict(parameters), args, call.kwargs))
                else:
                    yield _stream(block(*args, **call.kwargs))

    def advance(self, k: int, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Replace the stored states by a block's outputs."""
        for i, out in enumerate(self.outputs(k, parameters)):
            self.states[i] = out

    def close(self) -> None:
        """Nothing was changed."""

    @classmethod
    def capture(
        cls, model: nn.Module, data: CalibrationData, forward_fn: ForwardFn | None, names: Sequence[str]
    ) -> Replay:
        """Run a model on all batches, and keep what its first block gets and what the others are called with.

        Args:
            model: The model.
            data: The data.
            forward_fn: As in training.
            names: Of the blocks; see :func:`find_chain`.
        """
        blocks = tuple(model.get_submodule(name) for name in names)
        calls: list[list[_Call]] = []
        states: list[Tensor] = []

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if block is blocks[0]:
                states.append(args[0])
                calls.append([])
            calls[-1].append(_Call(args[1:], kwargs))

        with _hooks(blocks, before), evaluating(model), _no_cache(model), torch.no_grad():
            for _ in run_batches(model, data, forward_fn, "reading the inputs of the first block"):
                pass
        return cls(tuple(names), blocks, calls, states)


@dataclass
class WholeModel:
    """The same for models that are no chain: the whole model is run for every block, with the blocks before changed.

    Changed values are in the model until :meth:`close`. Batch norms normalise by each batch while it is run: their
    statistics are those of the dense network, and would be wrong behind pruned blocks.

    Attributes:
        names: Paths of the modules whose weights are changed together, in order of execution.
        model: The model.
        data: The data.
        forward_fn: As in training.
    """

    names: tuple[str, ...]
    model: nn.Module
    data: CalibrationData
    forward_fn: ForwardFn | None
    _before: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, weights: Iterable[Weight], data: CalibrationData, forward_fn: ForwardFn | None
    ) -> WholeModel:
        """With the weights' blocks: elements of lists of modules, or else modules."""
        return cls(tuple(dict.fromkeys(_block_of(model, w.module) for w in weights)), model, data, forward_fn)

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self.data.batches)

    @torch.no_grad()
    def outputs(self, k: int) -> Iterator[None]:
        """Run the model on all batches."""
        del k
        norms = [(m, m.track_running_stats) for m in running_norms(self.model).values()]
        try:
            with evaluating(self.model), _no_cache(self.model):
                for m, _ in norms:
                    m.training, m.track_running_stats = True, False  # normalises by the batch, and its statistics stay
                for _ in run_batches(self.model, self.data, self.forward_fn, "calibrating"):
                    yield
        finally:
            for m, tracks in norms:
                m.track_running_stats = tracks

    @torch.no_grad()
    def advance(self, k: int, parameters: Mapping[str, Tensor]) -> None:
        """Give a block's parameters other values."""
        for short, value in parameters.items():
            name = f"{self.names[k]}.{short}" if self.names[k] else short
            parameter = self.model.get_parameter(name)
            self._before.setdefault(name, parameter.detach().clone())
            parameter.copy_(value)

    @torch.no_grad()
    def close(self) -> None:
        """Give the parameters back the values that they had."""
        for name, value in self._before.items():
            self.model.get_parameter(name).copy_(value)
        self._before.clear()


def _block_of(model: nn.Module, path: str) -> str:
    """The innermost element of a list of modules that a module lies in; itself where it lies in none."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        around = model.get_submodule(".".join(parts[: end - 1])) if end > 1 else model
        if isinstance(around, nn.ModuleList | nn.Sequential) and end < len(parts):
            return ".".join(parts[:end])
    return path


def find_chain(model: nn.Module, data: CalibrationData, forward_fn: ForwardFn | None = None) -> tuple[str, ...]:
    """Paths of the blocks of a model's longest chain, by weights; empty if it has none.

    A chain is a list of modules (``nn.ModuleList``, ``nn.Sequential``) that run once each, in order, each on the tensor
    that the one before it returned. Other arguments may be tensors, numbers, and containers of these; nothing that one
    block could change for the next (a cache of keys and values).

    Args:
        model: The model; its first batch is run.
        data: The data.
        forward_fn: As in training.
    """
    kinds = nn.ModuleList | nn.Sequential
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, kinds) and len(m) > 1]
    lists.sort(key=lambda item: -sum(p.numel() for p in item[1].parameters()))
    first = CalibrationData(data.batches[:1], 1, data.fingerprint)
    for path, modules in lists:
        names = tuple(f"{path}.{i}" if path else str(i) for i in range(len(modules)))
        if _is_chain(model, tuple(modules), first, forward_fn):
            return names
    return ()


def _is_chain(
    model: nn.Module, blocks: tuple[nn.Module, ...], data: CalibrationData, forward_fn: ForwardFn | None
) -> bool:
    order: list[nn.Module] = []
    outputs: list[Tensor | None] = []
    linked: list[bool] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = args[0] if args and isinstance(args[0], Tensor) else None
        follows = own is not None and (not outputs or own is outputs[-1])
        linked.append(follows and all(_stateless(a) for a in (*args[1:], *kwargs.values())))
        order.append(block)

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(_stream(output) if isinstance(output, Tensor | tuple) and len(output) else None)

    handles = [b.register_forward_hook(after) for b in blocks]
    try:
        with _hooks(blocks, before), evaluating(model), _no_cache(model), torch.no_grad():
            for _ in run_batches(model, data, forward_fn, "looking for blocks"):
                pass
    finally:
        for handle in handles:
            handle.remove()
    return tuple(order) == blocks and all(linked)


def _stateless(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_stateless, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _stream(output: Any) -> Tensor:
    """The tensor that the next block gets: the output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def _hooks(blocks: Sequence[nn.Module], before: Any) -> Iterator[None]:
    handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a language model of transformers keeps no keys and values, which each block would add to."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not isinstance(before, bool):
        yield
        return
    try:
        config.use_cache = False
        yield
    finally:
        config.use_cache = before
