"""What the units of a channel group are: attention heads, feed-forward channels, a transformer's residual stream.

All is read off the coupling, which bundles hold, so that a pattern finds the same groups when its bundle is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from jaxtyping import Int64
from torch import Tensor

from ..graph import Branch, Coupling, Group, Weight

__all__ = ["attention_branches", "head_groups", "mlp_groups", "stream_groups"]


def head_groups(coupling: Coupling) -> tuple[Group, ...]:
    """The channel groups whose units are attention heads.

    A head is a unit of several channels along which activations are multiplied with activations one by one: queries
    with keys, and weights with values. Where heads share keys and values, a unit is one such set.
    """
    batched: set[int] = set()
    for c in coupling.contractions:
        for units in c.factors if c.weight is None else ():
            if units.ndim > 2:  # the last two are the matrices' own
                heads = units.flatten(-2)[..., 0]
                batched.update(torch.unique(heads[heads >= 0]).tolist())
    return tuple(g for g in coupling.groups if g.channels > 1 and batched.issuperset(range(g.start, g.stop)))


def stream_groups(coupling: Coupling) -> tuple[Group, ...]:
    """The residual streams of transformers: what an attention adds its result to.

    A group is one if its channels are made by a weight that closes an attention (it reads attended channels, or is in a
    residual branch that holds an attention) and by others, whose results are added. A stream whose channels have batch
    norms is none: there each channel is normalized by statistics of its own. Layer and RMS norms take them over all
    channels, so a removed channel changes what every layer after it reads.
    """
    seen = _Seen(coupling)
    closing = {weight for weight, groups in seen.read.items() if groups & seen.attended}
    closing.update(name for branch in attention_branches(coupling) for name in branch.weights)
    branches = [set(b.weights) for b in coupling.branches]
    out = []
    for g in coupling.groups:
        makers = set(g.producers)
        within = any(makers <= weights for weights in branches)
        batch_norms = any(t.tensor.endswith("running_mean") for t in g.touches)
        if makers & closing and len(makers) > 1 and not within and not batch_norms:
            out.append(g)
    return tuple(out)


def mlp_groups(coupling: Coupling) -> tuple[Group, ...]:
    """The feed-forward channels: those between the first and the last projection of an MLP, of all its experts alike.

    They lie in one residual branch, between projections that see each position by themselves: linear layers, matrices
    of experts and 1x1 convolutions, with depthwise convolutions between linear layers. The rest of the branch may mix
    positions by depthwise convolutions alone. Channels inside of an attention are none, nor are those of a gate that
    scales other channels (squeeze and excitation).
    """
    seen, attentions = _Seen(coupling), [inside for _, inside in _branches_of_attentions(coupling)]
    weights = {w.name: w for w in coupling.weights}
    branches = [(b, set(b.tensors)) for b in coupling.branches if not _mixes(weights, b)]
    out = []
    for at, g in enumerate(coupling.groups):
        touched = {t.tensor for t in g.touches if t.tensor in coupling.shapes}
        branch = next((b for b, tensors in branches if touched <= tensors), None)
        if branch is None or at in seen.attended or not weights.keys() >= set(g.producers):
            continue
        readers = {n for n in branch.weights if at in seen.read.get(n, ())}
        made = {h for n in readers for h in seen.made.get(n, ())}
        scaled = [set(coupling.groups[h].producers) for h in made]
        gates = any(len(makers) > 1 and makers <= set(branch.weights) for makers in scaled)
        ends = {*g.producers, *readers}
        in_attention = made & seen.attended or any(ends <= inside for inside in attentions)
        if readers and _by_position([weights[n] for n in ends]) and not gates and not in_attention:
            out.append(g)
    return tuple(out)


def _mixes(weights: Mapping[str, Weight], branch: Branch) -> bool:
    """Whether a branch has a convolution that mixes positions and channels at once."""
    return any(_spatial(weights[n]) and not _depthwise(weights[n]) for n in branch.weights)


def _by_position(ends: Sequence[Weight]) -> bool:
    """Whether weights see each position by themselves, but for depthwise convolutions between linear layers."""
    spatial = [w for w in ends if _spatial(w)]
    return not spatial or all(w in spatial or w.op in ("linear", "matmul") for w in ends)


def _spatial(weight: Weight) -> bool:
    return weight.op.startswith("conv") and prod(weight.shape[2:]) > 1


def _depthwise(weight: Weight) -> bool:
    return weight.groups == weight.shape[0] > 1


def attention_branches(coupling: Coupling) -> tuple[Branch, ...]:
    """The residual branches that hold an attention: no other branch has weights of its module."""
    found = {b.name: b for b, _ in _branches_of_attentions(coupling)}
    return tuple(b for b in coupling.branches if b.name in found)


def _branches_of_attentions(coupling: Coupling) -> list[tuple[Branch, frozenset[str]]]:
    """Each attention's only branch, with the weights of the attention's module."""
    out = []
    for inside in _attentions(coupling):
        branches = [b for b in coupling.branches if inside.intersection(b.weights)]
        if len(branches) == 1:  # of several, the module is a whole block, whose code attends by itself
            out.append((branches[0], inside))
    return out


def _attentions(coupling: Coupling) -> list[frozenset[str]]:
    """The weights of each module that multiplies activations with activations, or of what is around one without any."""
    owners = {w.name: f"{w.module}." for w in coupling.weights}
    found: dict[str, frozenset[str]] = {}
    for module in dict.fromkeys(c.module for c in coupling.contractions if c.weight is None):
        path, inside = module, frozenset[str]()
        while path and not inside:
            inside = frozenset(name for name, owner in owners.items() if owner.startswith(f"{path}."))
            path = path.rpartition(".")[0]
        if inside:
            found[module] = inside
    return list(dict.fromkeys(found.values()))


class _Seen:
    """By their places, which groups weights make and read, and which attention sees.

    Attributes:
        made: By weight, the groups of its rows.
        read: By weight, the groups of its columns.
        attended: Groups along whose units activations are multiplied with activations: heads, and channels of heads.
    """

    def __init__(self, coupling: Coupling) -> None:
        self._starts = torch.tensor([g.start for g in coupling.groups], dtype=torch.int64)
        self.made: dict[str, set[int]] = {}
        self.read: dict[str, set[int]] = {}
        self.attended: set[int] = set()
        for p in coupling.producers:
            self.made.setdefault(p.weight, set()).update(self._owners(p.units))
        for w in coupling.weights:
            for units in coupling.fields.get(w.name, ()):
                shape = (1,) * (len(w.shape) - units.ndim) + tuple(units.shape)
                if shape[w.in_axis] > 1 and shape[w.out_axis] == 1:
                    self.read.setdefault(w.name, set()).update(self._owners(units))
        for c in coupling.contractions:
            for units in c.factors if c.weight is None else ():
                self.attended |= self._owners(units)

    def _owners(self, units: Int64[Tensor, "..."]) -> set[int]:
        found = units[units >= 0]
        return set(torch.unique(torch.searchsorted(self._starts, found, right=True) - 1).tolist())
