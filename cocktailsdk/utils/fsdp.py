"""Weights that FSDP2 shards: every process has some rows of each, along the first axis.

Masks act on these rows where they are. Full tensors are gathered one at a time, by all processes together, and only
where something asks for them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from ..errors import CocktailError


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one of which each process has a part."""
    module = sys.modules.get("torch.distributed.tensor")  # while nobody has loaded it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded."""
    return any(is_sharded(p) for p in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """The local shard, in its own memory; a tensor that is not sharded is its own local shard."""
    if not is_sharded(tensor):
        return tensor
    detached: Any = tensor.detach()
    part: Tensor = detached.to_local()
    return part


def rows_of(tensor: Any) -> slice:
    """The rows of a sharded tensor in the local shard.

    Raises:
        CocktailError: It is sharded otherwise than by rows over all processes.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    if mesh.ndim != 1 or placements != (Shard(0),) or mesh.size() != torch.distributed.get_world_size():
        raise CocktailError(
            "weights must be sharded by rows over all processes, as fully_shard(model) does on a mesh of one "
            f"dimension; found {placements} on a mesh of shape {tuple(mesh.shape)}"
        )
    n, ranks, rank = tensor.shape[0], mesh.size(), mesh.get_local_rank()
    step = -(-n // ranks)
    return slice(min(rank * step, n), min((rank + 1) * step, n))


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A full tensor sharded as a parameter is; a tensor that needs no sharding as it is."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    return _with_shard(parameter, value[rows_of(parameter)].to(local(parameter).device, copy=True))


def _with_shard(tensor: Any, part: Tensor) -> Any:
    """A tensor that is sharded as another, with a local shard of its own."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@torch.no_grad()
def full_tensor(tensor: Tensor, part: Tensor | None = None) -> Shaped[Tensor, "..."]:
    """A sharded tensor, gathered from all processes; all of them must call this.

    Args:
        tensor: A tensor; one that is not sharded is returned as it is.
        part: Replaces the local shard.
    """
    if not is_sharded(tensor):
        return tensor.detach() if part is None else part
    typed: Any = tensor if part is None else _with_shard(tensor, part)
    full: Tensor = typed.detach().full_tensor()
    return full


def total(counts: Tensor, device: torch.device) -> Tensor:
    """The elementwise sum over all processes of a tensor on the CPU.

    Args:
        counts: Of any dtype that can be added up.
        device: Where processes exchange tensors, that of the weights.
    """
    on_device = counts.to(device, copy=True)
    torch.distributed.all_reduce(on_device)
    return on_device.cpu()


def shards(model: nn.Module) -> list[Any]:
    """The modules on which ``fully_shard`` was called."""
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard_after_forward(model: nn.Module) -> None:
    """Let FSDP modules drop gathered weights after every forward pass, so that masks act on what is used next."""
    for module in shards(model):
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def is_main(model: nn.Module) -> bool:
    """Whether this process writes for all that share a sharded model; a model that is not sharded is its own."""
    return not sharded(model) or torch.distributed.get_rank() == 0


def plain_class(model: nn.Module) -> type:
    """The model's class; of one that FSDP2 shards, the class that it had before."""
    kind = type(model)
    return kind.__bases__[1] if kind.__name__.startswith("FSDP") and len(kind.__bases__) == 2 else kind
