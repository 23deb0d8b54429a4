"""What of a finished run is kept in its report besides the table: its history, and what its masks look like.

Made once, when the run is over, from the net itself; reading it needs neither the model nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..masks import Mask
    from ..net.subnet_model import SubnetModel
    from ..training.trainer import CoTrainer

__all__ = ["mask_record", "recorded"]

OVERLAP_ELEMENTS = 1 << 22
"""Of a larger weight so many elements, of rows evenly spaced, are compared."""
PIECE = 1 << 18  # elements compared at a time; counts of so many are exact in float32
DIGITS = 6


def recorded(net: SubnetModel, trainer: CoTrainer[Any]) -> dict[str, Any]:
    """What a :class:`~cocktailsdk.report.run.RunReport` takes besides its table, as keyword arguments.

    Args:
        net: The networks, trained.
        trainer: What trained them; its run is over.

    Example:
        ```py
        report = RunReport(networks=…, bundle_bytes=…, dense_bytes=…, seconds=…, **recorded(net, trainer))
        report.write(folder)
        ```
    """
    history = trainer.history.to_dict()
    for key in ("weights", "seconds"):  # names of files, and what the report has already
        del history[key]
    training = trainer.configuration["training"]
    return {
        "metric_mode": training["metric_mode"],
        "configuration": {k: v for k, v in trainer.configuration.items() if k not in ("tensors", "eligible")},
        "history": _rounded(history),
        "masks": mask_record(net),
        "kept": unpruned_record(net),
        "score": net.provenance.get("score", {}),
    }


def mask_record(net: SubnetModel) -> dict[str, Any]:
    """What the networks' masks look like, as JSON values.

    Returns:
        ``layers`` (every weight in order of execution: name and shape), ``sparsity`` (by network, for each of them the
        share of zeros, removed channels included), ``bytes`` (by network: its tensors without what is removed or zero,
        and where single weights are masked one bit for each that is there), ``names``, and for each two of these
        networks ``overlap``: of the eligible weights that either keeps, the share that both keep; and ``chance``: the
        same if each had drawn as many in every layer at random.
    """
    import torch

    from ..patterns.base import DENSE

    coupling = net.coupling
    names = [n for n in net.names if n in net.masks]
    sparsity: dict[str, list[float]] = {n: [] for n in names}
    eligible = {w.name for w in net.eligible}
    shared, chance = torch.zeros(2, len(names), len(names), dtype=torch.float64)
    for weight in coupling.weights:
        kept = [_mask_of(net, weight.name, weight.shape, net.masks[n]) for n in names]
        for name, keep in zip(names, kept, strict=True):
            share = 0.0 if keep is None else 1 - int(keep.sum()) / keep.numel()
            sparsity[name].append(round(share, DIGITS))
        if weight.name in eligible and names:
            _compare(kept, weight.shape, shared, chance)
    counts = shared.diagonal().tolist()
    return {
        "layers": [{"name": w.name, "shape": list(w.shape)} for w in coupling.weights],
        "sparsity": sparsity,
        "bytes": {n: _bytes(net, net.masks.get(n)) for n in (DENSE, *names)},
        "names": names,
        "overlap": _jaccard(shared.tolist(), counts),
        "chance": _jaccard(chance.tolist(), counts),
    }


def unpruned_record(net: SubnetModel) -> list[dict[str, str]]:
    """What is kept whole and why: ``what`` (``"weights"`` or ``"channels"``), ``where``, ``reason``."""
    from ..inspection.inspecting import kept_whole

    why = ((w.module or w.name, net.selection.why_not(w)) for w in net.coupling.weights)
    out = [{"what": "weights", "where": where, "reason": reason} for where, reason in why if reason]
    return out + [{"what": "channels", "where": k.where, "reason": k.reason} for k in kept_whole(net.coupling)]


def _mask_of(net: SubnetModel, name: str, shape: Sequence[int], mask: Mask) -> Tensor | None:
    """A weight's mask, expanded to its shape; ``None`` where nothing of it goes."""
    keep = mask.elements.get(name)
    if mask.removed is not None and name in net.coupling.fields:
        alone = replace(net.coupling, fields={name: net.coupling.fields[name]})
        units = alone.left(mask.removed).get(name)
        if units is not None:
            keep = units if keep is None else keep & units.to(keep.device)
    experts = net.coupling.left_by_experts(mask.experts).get(name)
    if experts is not None:
        keep = experts if keep is None else keep & experts.to(keep.device)
    return None if keep is None else keep.cpu().expand(tuple(shape))


def _compare(kept: Sequence[Tensor | None], shape: Sequence[int], shared: Tensor, chance: Tensor) -> None:
    """Add what each two of the networks keep of one weight, and what they would by chance."""
    import torch

    count = math.prod(shape)
    rows = slice(None, None, -(-count // OVERLAP_ELEMENTS)) if shape and count else slice(None)
    everything = torch.ones((), dtype=torch.bool).expand(tuple(shape))
    parts = [(everything if k is None else k)[rows].reshape(-1) for k in kept]
    both = torch.zeros_like(shared)
    for pieces in zip(*(part.split(PIECE) for part in parts), strict=True):
        piece = torch.stack(pieces).float()
        both += (piece @ piece.T).double()
    shared += both
    own = both.diagonal()
    if count:
        chance += (torch.outer(own, own) / len(parts[0])).diagonal_scatter(own)


def _jaccard(shared: Sequence[Sequence[float]], counts: Sequence[float]) -> list[list[float]]:
    def share(i: int, j: int) -> float:
        either = counts[i] + counts[j] - shared[i][j]
        return round(shared[i][j] / either, DIGITS) if either else 1.0

    return [[share(i, j) for j in range(len(counts))] for i in range(len(counts))]


def _bytes(net: SubnetModel, mask: Mask | None) -> int:
    """Bytes of one network alone: the tensors' remaining values, and a bit for each weight that may be masked."""
    remaining = bits = 0
    for name, tensor in (*net.model.named_parameters(), *net.model.named_buffers()):
        size, shape = tensor.element_size(), tuple(tensor.shape)
        keep = None if mask is None else _mask_of(net, name, shape, mask)
        remaining += size * (math.prod(shape) if keep is None else int(keep.sum()))
        if mask is not None and name in mask.elements:
            units = _mask_of(net, name, shape, replace(mask, elements={}))
            bits += math.prod(shape) if units is None else int(units.sum())
    return remaining + -(-bits // 8)


def _rounded(value: Any) -> Any:
    """Floats to as many digits as pictures need; infinite ones and NaN, which JSON lacks, as nothing."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
