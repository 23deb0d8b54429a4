"""Private tensors: values of a few parameters that a subnetwork owns, used in place of the dense network's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SubnetError
from ..graph import Coupling
from ..masks import Mask
from ..utils.fsdp import is_sharded
from ..utils.layer_names import nearest
from .tensor_table import TensorTable

__all__ = ["check_private", "kept_elements", "private_copies"]


def check_private(name: str, tensors: Mapping[str, Any], table: TensorTable, coupling: Coupling) -> None:
    """Check that a subnetwork can own values of these parameters.

    Args:
        name: The subnetwork.
        tensors: By parameter name.
        table: The model's tensors.
        coupling: Its coupling.

    Raises:
        SubnetError: It cannot; names the parameter.
    """
    for parameter, value in tensors.items():
        what = f"the private tensor of {name!r} for {parameter!r}"
        if parameter not in coupling.shapes or parameter not in table:
            raise SubnetError(f"{what} belongs to no parameter of the model{_hint(parameter, table, coupling)}")
        own = table.registered(parameter)
        if is_sharded(own):
            raise SubnetError(f"{what} cannot be used: the parameter is sharded (FSDP2). Leave the model unsharded")
        if not isinstance(value, Tensor) or is_sharded(value):
            raise SubnetError(f"{what} must be a torch.Tensor, not {type(value).__name__}")
        if value.shape != own.shape or value.dtype != own.dtype:
            raise SubnetError(
                f"{what} must be {own.dtype} of shape {tuple(own.shape)}, as the parameter is, not {value.dtype} of "
                f"{tuple(value.shape)}"
            )
        other = _sharing(parameter, table)
        if other is not None:
            raise SubnetError(
                f"{what} would change {other!r} too, which shares its memory: give private tensors to parameters that "
                "are not tied"
            )


def _hint(name: str, table: TensorTable, coupling: Coupling) -> str:
    """What may have been meant by a name that is no parameter's."""
    if name not in table:
        return nearest(name, list(coupling.shapes))
    tensor = table.registered(name)
    tied = next((n for n in coupling.shapes if n in table and table.registered(n) is tensor), None)
    return ": it is a buffer" if tied is None else f" of its own: it is tied to {tied!r}"


def _sharing(name: str, table: TensorTable) -> str | None:
    """Another tensor of the model that is the same, or lies in the same memory."""
    own = table[name]
    for other in table.slots:
        tensor = table[other]
        if other != name and (tensor is own or _overlap(own, tensor)):
            return other
    return None


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in overlapping parts of one storage."""
    if a.layout != torch.strided or b.layout != torch.strided or not (a.numel() and b.numel()):
        return False
    # The address of the storage's C++ object (`_cdata`): torch has no public way to ask whether two are the same.
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    # Byte ranges: the weights of a recurrent layer lie in one storage, one after another, and do not overlap.
    (first_a, end_a), (first_b, end_b) = _extent(a), _extent(b)
    return first_a < end_b and first_b < end_a


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after its last."""
    last = sum((int(size) - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.element_size(), (first + last + 1) * tensor.element_size()


def private_copies(
    tensors: Mapping[str, Tensor], mask: Mask, table: TensorTable, coupling: Coupling
) -> dict[str, Tensor]:
    """Copies of private tensors, on the parameters' device, zero where the subnetwork's mask is.

    Args:
        tensors: By parameter name, of the parameters' shapes and dtypes.
        mask: The subnetwork's.
        table: The model's tensors.
        coupling: Its coupling.
    """
    kept = mask.of(coupling, tensors)
    # The order of the model, whatever the order given: bundles are then the same bytes.
    names = [n for n in coupling.shapes if n in tensors]
    # Outside of inference mode: inference tensors have no version counter, so writes to them could not be detected.
    with torch.inference_mode(False), torch.no_grad():
        out = {n: tensors[n].detach().to(table[n].device, copy=True) for n in names}
        for n, keep in kept.items():
            out[n].masked_fill_(~keep.to(out[n].device), 0)
    return out


def kept_elements(tensors: Mapping[str, Tensor], mask: Mask, coupling: Coupling) -> dict[str, int]:
    """By parameter name, how many elements of a subnetwork's private tensors its mask keeps."""
    kept = mask.of(coupling, tensors)
    return {n: int(kept[n].expand(t.shape).sum()) if n in kept else t.numel() for n, t in tensors.items()}
