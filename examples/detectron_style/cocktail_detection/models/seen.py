"""What modules return while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def outputs_of(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Inside, what modules return is noted by their paths."""
    seen: dict[str, Any] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _m, _args, out, path=path: seen.update({path: out}))
        for path in paths
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output."""
    found = list(output.values()) if isinstance(output, Mapping) else tree_leaves(output)
    return [t for t in found if isinstance(t, Tensor)]
