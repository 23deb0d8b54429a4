"""Inputs of a network that is exported: their names, which of them carry the batch, and fresh ones of any size."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from ..errors import ExportFailed

__all__ = ["Inputs"]


@dataclass(frozen=True)
class Inputs:
    """One forward pass's arguments, and which of their tensors vary with the batch.

    A tensor carries the batch along its first axis where that is as long as the first tensor's.

    Attributes:
        args: Positional arguments, on the CPU.
        kwargs: Keyword arguments.
        names: Names of all tensors in them, in their order.
        batch: Examples in the batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    batch: int

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """The example inputs of a model, moved to the CPU.

        Raises:
            ExportFailed: There is no tensor with an axis among them.
        """
        # Tensors that require grad cannot be passed to numpy, which every runtime takes.
        args, kwargs = tree_map(lambda v: v.detach().cpu() if isinstance(v, Tensor) else v, (tuple(args), dict(kwargs)))
        sizes = [t.shape[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
        if not sizes:
            raise ExportFailed(
                f"{type(model).__name__} is exported by running it, but its example inputs hold no tensor: set "
                "net.example = (args, kwargs)"
            )
        return cls(tuple(args), dict(kwargs), _names(model, tuple(args), kwargs), sizes[0])

    def carries_batch(self, tensor: Tensor) -> bool:
        """Whether a tensor of these inputs has the batch as its first axis."""
        return tensor.ndim > 0 and tensor.shape[0] == self.batch

    def fresh(self, batch: int, seed: int = 0) -> Inputs:
        """Other inputs of the same kinds, ranges and shapes, of another batch size.

        Numbers of floating point are drawn from those of the example; whole numbers are the example's own in another
        order, since what else they may be is not known.
        """
        generator = torch.Generator().manual_seed(seed)

        def remake(value: Any) -> Any:
            if not isinstance(value, Tensor) or not self.carries_batch(value):
                return value
            # Rows are repeated as often as the batch needs.
            rows = value[torch.arange(batch) % self.batch]
            if value.is_floating_point():
                flat = value.reshape(-1)
                drawn = flat[torch.randint(flat.numel(), (rows.numel(),), generator=generator)].reshape(rows.shape)
                if flat.numel() and bool((flat == flat[0]).all()):  # says nothing of what the model does
                    drawn = drawn + torch.randn(rows.shape, generator=generator).to(drawn)
                return drawn
            # One number for each example (a length, a label) is kept: shuffling along it would only mix examples.
            if rows.ndim < 2:
                return rows
            # A random permutation within each row keeps the values in range (token ids, 0 / 1 masks).
            order = torch.rand(rows.shape, generator=generator).argsort(-1)
            return rows.gather(-1, order)

        args, kwargs = tree_map(remake, (self.args, self.kwargs))
        return Inputs(args, kwargs, self.names, batch)

    def named(self) -> dict[str, Tensor]:
        """The tensors by name."""
        tensors = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        return dict(zip(self.names, tensors, strict=True))

    def filled(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """A batch's tensors by name: those that an exported network takes; whatever else it holds is left out.

        Raises:
            ExportFailed: A tensor that the network takes is missing.
        """
        known = {k: kwargs[k] for k in self.kwargs if k in kwargs}  # in the example's order
        tensors = [t.detach().cpu() for t in tree_leaves((tuple(args), known)) if isinstance(t, Tensor)]
        if len(tensors) != len(self.names):
            raise ExportFailed(
                f"the exported network takes {', '.join(self.names)}; a batch gave {len(tensors)} of these "
                f"{len(self.names)} tensors"
            )
        return dict(zip(self.names, tensors, strict=True))


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    known = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    positional = {i: (known[i] if i < len(known) else f"input_{i}") for i in range(len(args))}
    out: list[str] = []
    for path, leaf in tree_flatten_with_path((args, dict(kwargs)))[0]:
        if not isinstance(leaf, Tensor):
            continue
        # Pytree paths mix MappingKey (.key) and SequenceKey (.idx). The first key says args (0) or kwargs (1).
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        head = positional[int(keys[1])] if keys[0] == "0" else keys[1]
        # An identifier is a valid name in every runtime.
        name = re.sub(r"\W+", "_", "_".join([head, *keys[2:]])).strip("_") or "input"
        while name in out:
            name += "_"
        out.append(name)
    return tuple(out)
