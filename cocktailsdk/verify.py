"""Does a model hold the sparsity it is said to hold?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .errors import PatternError
from .graph import Kept, Weight
from .graph.hook_weights import hook_weights
from .graph.weight_graph import run_weight_graph
from .masks.remaining import Remaining
from .masks.tiles import runs, tiles
from .net.subnet_model import SubnetModel
from .net.target_modules import Modules, Selection
from .patterns import NM
from .utils.modes import evaluating
from .utils.undo import unchanged


@dataclass(frozen=True)
class Failure:
    """A weight that does not hold N of M.

    Attributes:
        module: Path of its module.
        weight: The parameter's name.
        worst: Non-zeros in its fullest run of M.
        runs: How many of its runs hold more than N.
        total: How many runs it has.
    """

    module: str
    weight: str
    worst: int
    runs: int
    total: int


@dataclass(frozen=True)
class NMCheck:
    """What :func:`verify_nm` found; true where all is well.

    Attributes:
        n: Weights allowed in a run.
        m: Length of a run.
        failures: Weights that hold more somewhere.
        checked: Names of the weights that were looked at.
        skipped: Weights that were not, with the reason.
    """

    n: int
    m: int
    failures: tuple[Failure, ...]
    checked: tuple[str, ...]
    skipped: tuple[Kept, ...]

    @property
    def ok(self) -> bool:
        """Whether every run of every weight checked holds at most N non-zeros."""
        return not self.failures

    def __bool__(self) -> bool:
        return self.ok


def verify_nm(
    model: nn.Module,
    n: int,
    m: int,
    *,
    transposable: bool = False,
    target_modules: Modules = None,
    exclude_modules: Modules = None,
) -> NMCheck:
    """Does every eligible weight hold at most N non-zeros in every M consecutive input channels?

    Of a :class:`CocktailNet` the active subnetwork is checked, with the net's own eligible weights, and where channels
    are removed, what its slim model holds of them. Of any other module all convolution and linear weights are, but the
    first convolution and, where it is the last weight, the classifier, in the order in which the modules were
    registered (if those are all there is, they are checked). Remainders shorter than M are not covered by the pattern
    and not checked. Of weights that are computed (weight norm, ``torch.nn.utils.prune``, parametrizations), what the
    model multiplies with is checked, not the parameter.

    Args:
        model: Holds plain tensors with zeros in them.
        n: Weights allowed in a run.
        m: Length of a run.
        transposable: Check both ways: rows and columns of every tile of M outputs by M inputs are the runs.
        target_modules: Check only these (see :func:`sparsify`); not for a net, which knows its own.
        exclude_modules: Do not check these.

    Raises:
        PatternError: Not 0 < n < m, a selection names nothing, or there is no weight to check.
    """
    NM(n, m)  # checks the numbers
    if isinstance(model, SubnetModel):
        if target_modules is not None or exclude_modules is not None:
            raise PatternError("a net knows its eligible weights; leave target_modules and exclude_modules out")
        model._check_structure()
        weights, tensors = _remaining(model)
        selection = model.selection
    else:
        named_weights = _weights(model)
        found = _marked([w for w, _ in named_weights])
        tensors = {w.name: t for w, t in named_weights}
        weights, selection = tuple(found), Selection.of(model, target_modules, exclude_modules)
    failures, checked, skipped = [], [], []
    for w in weights:
        reason = selection.why_not(w)
        parts = None if reason else _runs(w, tensors[w.name].detach(), m, transposable)
        if parts is not None and parts.numel() == 0:
            which = "input or output" if transposable else "input"
            reason = f"has fewer than {m} {which} channels{' in a group' if w.groups > 1 else ''}"
        if parts is None or reason:
            skipped.append(Kept(w.name, reason or ""))
            continue
        checked.append(w.name)
        counts = (parts != 0).sum(-1)
        bad = int((counts > n).sum())
        if bad:
            failures.append(Failure(w.module, w.name, int(counts.max()), bad, counts.numel()))
    if not checked:
        why = "; ".join(f"{k.where}: {k.reason}" for k in skipped[:5]) or "it has no convolution and no linear layer"
        raise PatternError(f"{type(model).__name__} has no weight that {n}:{m} could be checked on ({why})")
    return NMCheck(n, m, tuple(failures), tuple(checked), tuple(skipped))


def _runs(weight: Weight, tensor: Tensor, m: int, transposable: bool) -> Tensor:
    if not transposable:
        return runs(weight, tensor, m)
    squares = tiles(weight, tensor, m, m)
    return torch.cat([squares, squares.mT])


def _remaining(net: SubnetModel) -> tuple[tuple[Weight, ...], dict[str, Tensor]]:
    """What the active subnetwork multiplies with, without the channels that it removes."""
    tensors: dict[str, Tensor] = dict(net.model.named_parameters())
    every = {**tensors, **dict(net.model.named_buffers())}
    trace = net.coupling.trace
    if trace is not None:
        tensors |= {n: run_weight_graph(graph, every.__getitem__) for n, graph in trace.computed.items()}
    else:
        tensors |= _alike(net, tensors)
    mask = net.masks.get(net.active)
    if mask is None or mask.removed is None:
        return net.coupling.weights, tensors
    remaining_units = Remaining(net.coupling, mask.removed)
    sliced = {w.name: remaining_units.slice(w, tensors[w.name].detach()) for w in net.coupling.weights}
    return tuple(remaining_units.weight(w) for w in net.coupling.weights), sliced


def _alike(net: SubnetModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that modules compute of a parameter, where the graph is not known: those of the parameter's shape."""
    out = {}
    made = {w.module: t.detach() for w, t in _weights(net.model)}
    for w in net.coupling.weights:
        path = (
            w.name.partition(".parametrizations.")[0] if ".parametrizations." in w.name else w.name.rpartition(".")[0]
        )
        if w.name not in (f"{path}.weight", "weight") and path in made and made[path].shape == tensors[w.name].shape:
            out[w.name] = made[path]
    return out


def _weights(model: nn.Module) -> list[tuple[Weight, Tensor]]:
    """Weights by the class of their module, for want of a graph; each parameter once. Computed ones as they are now."""
    seen: set[int] = set()
    out = []
    with unchanged(model), evaluating(model, clear_caches=True), torch.no_grad():
        for path, module in model.named_modules():
            now = dict(hook_weights(module))
            for name, t, op, out_axis, in_axis in _of(module):
                if id(t) not in seen:
                    seen.add(id(t))
                    groups = int(getattr(module, "groups", 1))
                    full = f"{path}.{name}".lstrip(".")
                    out.append((Weight(full, path, op, tuple(t.shape), out_axis, in_axis, groups, 0), now.get(name, t)))
    return out


def _of(module: nn.Module) -> Iterator[tuple[str, Tensor, str, int, int]]:
    if isinstance(module, _ConvTransposeNd):
        yield "weight", module.weight, "conv_transpose", 1, 0
    elif isinstance(module, _ConvNd):
        yield "weight", module.weight, "conv", 0, 1
    elif isinstance(module, nn.Linear):
        yield "weight", module.weight, "linear", 0, 1
    elif isinstance(module, nn.MultiheadAttention):
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            t = getattr(module, name, None)
            if isinstance(t, Tensor):
                yield name, t, "linear", 0, 1
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' linear layer, transposed
        weight = module.weight
        if isinstance(weight, Tensor):
            yield "weight", weight, "linear", 1, 0


def _marked(weights: list[Weight]) -> list[Weight]:
    first = next((i for i, w in enumerate(weights) if w.op == "conv"), None)
    last = len(weights) - 1 if weights and weights[-1].op == "linear" else None
    if not set(range(len(weights))) - {first, last}:
        return weights
    roles = {first: "first convolution", last: "classifier"}
    return [replace(w, role=roles.get(i, "")) for i, w in enumerate(weights)]
