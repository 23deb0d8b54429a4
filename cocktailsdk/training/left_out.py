"""Steps that were left out: a round, or a subnetwork, of which none was made is not trained, and must not seem so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..utils.fsdp import local
from .state.history import RoundHistory

__all__ = ["check_trained", "first_few", "note_step", "weight_sums"]


def note_step(record: RoundHistory, names: Iterable[str], *, made: bool) -> None:
    """Count a step for the networks that it trained, or would have."""
    if record.made is None:  # the round began in a release that did not count
        return
    counts = record.made if made else record.left_out
    for name in names:
        counts[name] = counts.get(name, 0) + 1


def check_trained(records: Sequence[RoundHistory], *, scaled: bool, standing: str) -> None:
    """See that each round trained something, and each network was trained in some round.

    Args:
        records: Of the rounds, their steps counted.
        scaled: Whether a gradient scaler leaves steps out.
        standing: What is said of the last state.

    Raises:
        TrainingError: All steps of a round, or of some networks, were left out.
    """
    if any(record.made is None for record in records):
        return
    for record in records:
        if record.left_out and not record.made:
            raise TrainingError(
                f"nothing was trained in round {record.round}: all steps were left out ({_counts(record.left_out)}), "
                f"since {_reason(scaled)}. {standing}"
            )
    made = Counter[str]()
    left_out = Counter[str]()
    for record in records:
        made.update(record.made or {})
        left_out.update(record.left_out)
    if never := {name: count for name, count in left_out.items() if not made[name]}:
        names, one = first_few([repr(name) for name in never]), len(never) == 1
        raise TrainingError(
            f"{names} {'was' if one else 'were'} never trained: all {max(never.values())} of "
            f"{'its' if one else 'their'} steps were left out, since {_reason(scaled)}. {standing}"
        )


def first_few(names: Collection[str]) -> str:
    """The first three of some names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join([*names][:3]) + more


def _counts(left_out: Mapping[str, int]) -> str:
    more = ", …" if len(left_out) > 3 else ""
    return ", ".join(f"{count} of {name!r}" for name, count in list(left_out.items())[:3]) + more


def _reason(scaled: bool) -> str:
    if scaled:
        return (
            "gradients overflowed in half precision or losses were not finite: give "
            'execution=ExecutionSettings(mixed_precision="bf16"), or more steps, in which the scale is found'
        )
    return (
        "their losses or gradients were not finite: lower the learning rate (optimizer=lambda parameters: "
        "torch.optim.SGD(parameters, lr=…)), or look for values in the data that are not finite"
    )


@torch.no_grad()
def weight_sums(model: nn.Module) -> Tensor:
    """Two sums of each trained parameter, on the CPU: equal only if no weight changed."""
    sums = [torch.zeros(0, dtype=torch.float64)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = local(parameter.detach())
            real = torch.view_as_real(values) if values.is_complex() else values
            both = [real.sum(dtype=torch.float64), values.abs().sum(dtype=torch.float64)]
            sums.append(torch.stack(both).cpu())
    return torch.cat(sums)
