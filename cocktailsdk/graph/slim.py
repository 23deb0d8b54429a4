"""Slimming: a copy of a model without its removed channels, proven to compute what the masked model does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import SlimError
from ..utils.undo import unchanged
from .couple import Pass
from .coupling import STAYS, Coupling, Trace
from .cut import Cutter
from .verify_slim import verify_slim

__all__ = ["slim_module"]

log = logging.getLogger(__name__)


def slim_module(
    model: nn.Module,
    coupling: Coupling,
    removed: Bool[Tensor, " units"],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
) -> nn.Module:
    """Removes channel units from a copy of a model.

    Args:
        model: The model as it stands, masked or not; it is not altered.
        coupling: Its coupling.
        removed: For each unit whether it goes.
        args: Example positional inputs, for the check (and to find the graph again for a coupling read from a file).
        kwargs: Example keyword inputs.
        verify: Compare with the masked model in float64 on randomised weights.

    Returns:
        A model of the same class with smaller parameters, ready to train, save and export.

    Raises:
        SlimError: If a unit mask does not fit, a group would lose everything, or the slim model computes something
            else than the masked one.
    """
    if tuple(removed.shape) != (coupling.n_units,) or removed.dtype != torch.bool:
        raise SlimError(
            f"a mask of {tuple(removed.shape)} {removed.dtype} was given, but the model has {coupling.n_units} channel "
            "units (torch.bool)."
        )
    removed = removed.cpu()
    for g in coupling.groups:
        if bool(removed[g.start : g.stop].all()):
            raise SlimError(f"all {g.size} units of group {g.name!r} would go; at least one of each group must stay.")
    with unchanged(model):
        trace = coupling.trace or _found_again(model, coupling, args, kwargs)
        fixes = verify_slim(model, Cutter(coupling, trace, removed), args, kwargs).fixes if verify else None
        return Cutter(coupling, trace, removed).cut(model, fixes)[0]


def _found_again(model: nn.Module, coupling: Coupling, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Trace:
    """The trace of a model whose coupling came from a file, which must be the same."""
    fresh = Pass(model, args, kwargs).coupling()
    same = set(fresh.fields) >= set(coupling.fields) and fresh.trace is not None
    if same and fresh.n_units != coupling.n_units:
        # Units that the user excluded are absent from the file's coupling: map the fresh units onto the stored ones.
        log.debug("the stored coupling has %d units, the model %d", coupling.n_units, fresh.n_units)
    mapping = _correspondence(fresh, coupling) if same else None
    if mapping is None or fresh.trace is None:
        raise SlimError(
            "the model's channels are coupled otherwise than when the bundle was made; use the same versions of the "
            "model's library and of PyTorch."
        )
    nodes = tuple(replace(n, units=tuple(mapping[u] for u in n.units)) for n in fresh.trace.nodes)
    return replace(fresh.trace, nodes=nodes)


def _correspondence(fresh: Coupling, stored: Coupling) -> Tensor | None:
    """For each fresh unit (and ``STAYS``, last) the stored one, or ``None`` if they contradict."""
    mapping = torch.full((fresh.n_units + 1,), STAYS)
    seen = torch.zeros(fresh.n_units + 1, dtype=torch.bool)
    # STAYS is -1, which indexes the extra last entry.
    seen[STAYS] = True
    for name, fields in stored.fields.items():
        ours = {tuple(u.shape): u for u in fresh.fields[name]}
        for theirs in fields:
            mine = ours.get(tuple(theirs.shape))
            if mine is None:
                return None
            known = seen[mine]
            if bool((mapping[mine][known] != theirs[known]).any()):
                return None
            mapping[mine] = theirs
            seen[mine] = True
            mapping[STAYS] = STAYS
    return mapping
