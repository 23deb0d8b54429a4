"""Private tensors: values of a few parameters that a subnetwork owns, used in place of the dense network's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SubnetError
from ..graph import Coupling
from ..masks import Mask
from ..utils.fsdp import is_sharded
from ..utils.layer_names import nearest
from .tensor_table import TensorTable

__all__ = ["check_private", "check_unsharded", "kept_elements", "private_copies"]


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
    in_storage = _by_storage(table) if tensors else {}
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
        alike = in_storage.get(_storage(own), ())
        other = next((n for n in alike if n != parameter and _overlap(own, table[n])), None)
        if other is not None:
            raise SubnetError(
                f"{what} would change {other!r} too, which shares its memory: give private tensors to parameters that "
                "are not tied"
            )


def check_unsharded(name: str, private: Mapping[str, Tensor], table: TensorTable) -> None:
    """Check that the model was not sharded after a subnetwork got its private tensors.

    Raises:
        SubnetError: It was.
    """
    if any(is_sharded(table.registered(n)) for n in private):
        raise SubnetError(
            f"{name!r} has private tensors, which cannot be used in a model that is sharded (FSDP2): remove them, "
            f"net.set_private({name!r}, {{}})"
        )


def _hint(name: str, table: TensorTable, coupling: Coupling) -> str:
    """What may have been meant by a name that is no parameter's."""
    if name not in table:
        return nearest(name, list(coupling.shapes))
    tensor = table.registered(name)
    tied = next((n for n in coupling.shapes if n in table and table.registered(n) is tensor), None)
    return ": it is a buffer" if tied is None else f" of its own: it is tied to {tied!r}"


def _by_storage(table: TensorTable) -> dict[int, list[str]]:
    """Names of the model's tensors by the storage that they lie in."""
    out: dict[int, list[str]] = {}
    for name in table.slots:
        out.setdefault(_storage(table[name]), []).append(name)
    return out


def _storage(tensor: Tensor) -> int:
    """A number for the storage of a tensor; for the tensor itself where it has none (subclasses, sparse layouts)."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    # The address of the storage's C++ object (`_cdata`): torch has no public way to ask whether two are the same.
    return tensor.untyped_storage()._cdata if plain else id(tensor)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage lie in overlapping parts of it."""
    if a is b or a.layout != torch.strided:
        return True
    if not (a.numel() and b.numel()):
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
