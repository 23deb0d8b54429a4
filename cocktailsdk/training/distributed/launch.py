"""How a run was launched: alone, or as one of several processes by ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn

from ...errors import TrainingError
from ...utils.devices import available_device
from ...utils.fsdp import reshard_after_forward, sharded
from ...utils.optional import require
from ..step.execution import MixedPrecision, Precision
from .ranks import SINGLE, ProcessRanks, Ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Launch", "accumulated", "connected", "launched", "precision_of", "several_processes", "shard"]

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """Where a run computes, and with whom.

    Attributes:
        ranks: The processes.
        accelerator: Accelerate's, where there is one.
        device: This process's device; ``None`` where it is the model's.
    """

    ranks: Ranks = SINGLE
    accelerator: Accelerator | None = None
    device: torch.device | None = None


def several_processes() -> bool:
    """Whether this process is one of several: a process group is set up, or a launcher's variables say how to."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return all(name in os.environ for name in _RENDEZVOUS) and int(os.environ["WORLD_SIZE"]) > 1


def launched(accelerator: Any = None, device: str | torch.device | None = None) -> Launch:
    """Find out, and set up the process group where a launcher wants one.

    Args:
        accelerator: The user's, or ``None`` to make one where there are several processes.
        device: The user's choice. Of several processes each has its own device of that kind.

    Raises:
        TrainingError: There is no such device, or ``accelerator`` is none, or of a kind that cannot train here.
    """
    wanted = None if device is None else available_device(device, error=TrainingError)
    if accelerator is None:
        if not several_processes():
            return Launch(device=wanted)
        accelerate = require("accelerate", "training on several processes", error=TrainingError)
        gpu = torch.accelerator.is_available() if wanted is None else wanted.type != "cpu"
        accelerator = accelerate.Accelerator(cpu=not gpu)
    else:
        accelerate = require("accelerate", "CoTrainer(accelerator=…)", error=TrainingError)
        if not isinstance(accelerator, accelerate.Accelerator):
            raise TrainingError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
    _check(accelerator, wanted)
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    if alone and several_processes():
        raise TrainingError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but the Accelerator has set up none of them to work "
            "together: on CPUs it must be made with Accelerator(cpu=True)"
        )
    ranks = SINGLE if alone else ProcessRanks(accelerator.device)
    return Launch(ranks, accelerator, accelerator.device if wanted is None or not alone else wanted)


def _check(accelerator: Accelerator, wanted: torch.device | None) -> None:
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise TrainingError(
            f"an Accelerator for {kind} cannot train here: masks act on the weights themselves, which DDP and FSDP2 "
            "leave in the model"
        )
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise TrainingError(
            "FSDP1 flattens weights, so that masks cannot act on them: give "
            "Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))"
        )
    if wanted is not None and wanted.type != accelerator.device.type and kind != "NO":
        raise TrainingError(f"device={str(wanted)!r}, but the Accelerator has set up {accelerator.device}")


def shard(model: nn.Module, launch: Launch) -> None:
    """Shard a model as an Accelerator for FSDP2 says, in place, unless it is sharded already."""
    accelerator: Any = launch.accelerator
    if accelerator is not None and accelerator.is_fsdp2 and not sharded(model):
        require("accelerate.utils.fsdp_utils", "FSDP2").fsdp2_prepare_model(accelerator, model)
    if sharded(model):
        reshard_after_forward(model)  # before the first pass: masks act on what is used next


def accumulated(launch: Launch, given: int | None) -> int:
    """Batches that a step takes: as given, or as the Accelerator has it, or one."""
    if given is not None:
        return given
    return 1 if launch.accelerator is None else int(launch.accelerator.gradient_accumulation_steps)


def precision_of(launch: Launch, given: MixedPrecision | None) -> Precision:
    """What training passes compute in: as given, or as the Accelerator has it.

    Raises:
        TrainingError: It is neither ``"bf16"`` nor ``"fp16"``, or the two differ.
    """
    own: Any = None if launch.accelerator is None else str(launch.accelerator.mixed_precision)
    own = None if own == "no" else own
    if given is not None and own is not None and given != own:
        raise TrainingError(f"mixed_precision={given!r}, but the Accelerator was made with {own!r}: give one of them")
    return Precision(given or own)


@contextmanager
def connected(ranks: Ranks) -> Iterator[None]:
    """Say in words that the connection to another process broke.

    Raises:
        TrainingError: Inside, a collective operation failed.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not (isinstance(error, _DIST_ERRORS) or _BROKEN.search(str(error))):
            raise
        raise TrainingError(
            f"process {ranks.rank} of {ranks.world} lost another one, which ended or did not answer in time, so that "
            "this one ends too; with out_dir the same call goes on from the last state that was saved, on as many "
            f"processes as there are ({str(error).splitlines()[0][:200]})"
        ) from error


_BROKEN = re.compile(
    r"gloo|nccl|[Cc]onnection (closed|reset|refused)|ProcessGroup|process group|TCPStore", re.IGNORECASE
)
_DIST_ERRORS: tuple[type[Exception], ...] = (dist.DistError,) if dist.is_available() else ()
