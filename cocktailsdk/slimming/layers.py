"""Models without the layers that are dropped: elements are taken out of their ``ModuleList`` or ``Sequential``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..graph.copies import duplicate
from ..graph.output_tensors import tensors_of
from ..models import without_elements
from ..utils.modes import evaluating
from ..utils.undo import unchanged
from .depth import close

__all__ = ["without_layers"]

log = logging.getLogger(__name__)


def without_layers(
    model: nn.Module, paths: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> nn.Module | None:
    """The model without elements of its lists, if that computes the same.

    Args:
        model: The elements' branches are masked. It is not altered.
        paths: Paths of the elements.
        args: Example positional inputs, for the check.
        kwargs: Example keyword inputs.

    Returns:
        A copy that shares the model's parameters; ``None`` where its code wants the elements.
    """
    # Shared, so that a large model does not have to fit twice.
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    made = duplicate(model, memo=dict(shared))
    try:
        _take_out(made, paths)
        with evaluating(model), evaluating(made), torch.no_grad():
            with unchanged(model):
                want = tensors_of(model(*args, **kwargs))
            with unchanged(made):
                got = tensors_of(made(*args, **kwargs))
        same = len(got) == len(want) and all(close(g, w) for g, w in zip(got, want, strict=True))
    except Exception as error:  # code that wants something else of a list raises anything
        log.info("layers cannot be taken out of their list: %s", error)
        same = False
    if not same:
        log.warning("layers stay in the slim model's lists, as blocks that add nothing: %s", ", ".join(paths))
    return made if same else None


def _take_out(model: nn.Module, paths: Sequence[str]) -> None:
    by_list: dict[str, list[int]] = {}
    for path in paths:
        container, _, place = path.rpartition(".")
        by_list.setdefault(container, []).append(int(place))
    for container, gone in by_list.items():
        elements = model.get_submodule(container)
        if not isinstance(elements, nn.ModuleList | nn.Sequential):
            raise TypeError(f"{container!r} is a {type(elements).__name__}, not a ModuleList or Sequential")
        kept = [i for i in range(len(elements)) if i not in gone]
        for i in sorted(gone, reverse=True):
            del elements[i]
        without_elements(model, container, kept, len(kept) + len(gone))
