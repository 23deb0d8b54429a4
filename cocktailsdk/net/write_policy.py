"""What happens to values that somebody wrote into an active subnetwork's tensors, and which those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import SubnetError
from ..masks.device_cache import DeviceMasks, zero_masked
from .dense_backup import DenseBackup
from .switcher import Switcher
from .target_modules import some_of
from .write_watch import same_values

__all__ = ["Changes", "changed_tensors", "check_changes", "is_from_training", "write_error"]

Changes = Literal["refuse", "keep", "discard"]
"""What is done with values that were written into a subnetwork's tensors while it was active."""


def check_changes(changes: Changes) -> Changes:
    """The argument ``changes``, checked.

    Raises:
        SubnetError: It is something else.
    """
    if changes not in get_args(Changes):
        raise SubnetError(f'changes must be "refuse", "keep" or "discard", got {changes!r}')
    return changes


def changed_tensors(
    switcher: Switcher, backup: DenseBackup, masks: DeviceMasks, own: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Names of the tensors that have other values than the active subnetwork gives them.

    Args:
        switcher: With the subnetwork active.
        backup: Its dense weights or statistics.
        masks: The subnetwork's.
        own: The subnetwork's own statistics or private tensors, to which its masks apply in place of the dense ones.
    """
    changed = []
    for name, dense in backup.values.items():
        now = switcher.tensors[name].detach()
        expected = (own or {}).get(name, dense).to(now.device, now.dtype, copy=True)
        if name in masks:
            zero_masked(masks, {name: expected})
        if not same_values(expected, now):
            changed.append(name)
    return changed


def is_from_training(switcher: Switcher, norm: str) -> bool:
    """Whether all writes to a norm's buffers were forward passes in train mode.

    Args:
        switcher: With a subnetwork's statistics active.
        norm: Path of the norm.
    """
    mean, var = (switcher.norms.write_count(f"{norm}.{n}".lstrip(".")) for n in ("running_mean", "running_var"))
    if mean is None or var is None:
        return False
    counter = f"{norm}.num_batches_tracked".lstrip(".")
    if counter not in switcher.norms.values or not isinstance(switcher.tensors.module(norm), _BatchNorm):
        return mean == var  # instance norms do not count their passes
    passes = int(switcher.tensors[counter]) - int(switcher.norms.values[counter])
    # A pass adds one to `num_batches_tracked` in place. What the batch-norm kernel writes to the two statistics does
    # not raise their version counters (torch 2.14, CPU); a kernel that raised them once a pass would be fine, too.
    return passes == switcher.norms.write_count(counter) and {mean, var} <= {0, passes}


def write_error(names: Sequence[str], active: str, wanted: str, *, inside: bool) -> SubnetError:
    """The error for tensors that somebody wrote while a subnetwork was active.

    Args:
        names: Of the tensors.
        active: The subnetwork.
        wanted: The one that was to be active next.
        inside: Whether they were written inside ``using``, which ends.
    """
    what = (
        f"{some_of(names, 3)} changed while {active!r} was active, which masks them or has values of its own for them"
    )
    if inside:
        return SubnetError(
            f"{what}: the changes were dropped when `using({active!r})` ended. Change weights (optimizer.step(), "
            f"load_state_dict) after it, or keep them for the dense network's: `net.using({active!r}, changes='keep')`"
        )
    return SubnetError(
        f"{what}: a switch would lose that. Keep the values as they are now for the dense network's, "
        f"net.switch({wanted!r}, changes='keep'), or drop them, changes='discard'. Another time, switch('dense') first"
    )
