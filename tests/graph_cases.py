"""Tables of small modules, one for each rule: what goes, what stays and why, and that slim equals masked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cocktailsdk.graph import Coupling, couple, slim_module
from cocktailsdk.graph.cut import duplicate
from cocktailsdk.inspection.measuring import measured_flops

IMAGE, TOKENS = (2, 4, 8, 8), (2, 6, 12)


@dataclass(frozen=True)
class Case:
    """A small module and what must be found in it.

    Attributes:
        make: Builds it.
        shapes: Its inputs' shapes, or a function that makes its inputs.
        groups: Sizes of the groups, no more and no less: rules that keep everything fail, too.
        kept: For each weight that stays, in whole or in part, what its reason must match; the classifier, kept as the
            model's output, need not be named.
        flops: Whether PyTorch's own counter of FLOPs knows every op in it.
        batch: Whether its code takes batches of any size.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[Any, ...] | Callable[[], tuple[Tensor, ...]]
    groups: tuple[int, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    flops: bool = True
    batch: bool = True

    def inputs(self) -> tuple[Tensor, ...]:
        """Random inputs."""
        if callable(self.shapes):
            return self.shapes()
        several = isinstance(self.shapes[0], tuple)
        return tuple(torch.randn(s) for s in (self.shapes if several else (self.shapes,)))


class Table(dict[str, Case]):
    """Cases by name."""

    def __call__(
        self, shapes: Any, groups: Sequence[int], kept: Mapping[str, str] | None = None, **more: bool
    ) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """Registers a class as a case."""

        def register(cls: type[nn.Module]) -> type[nn.Module]:
            assert cls.__name__ not in self
            self[cls.__name__] = Case(cls, shapes, tuple(sorted(groups)), kept or {}, **more)
            return cls

        return register


class Ends(nn.Module):
    """A body between a first layer and a classifier, so that the body's channels are free."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, width, 1), nn.Linear(out or width, 3)

    def body(self, x: Tensor) -> Tensor:
        raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)).mean((2, 3)))


class Tokens(nn.Module):
    """The same for sequences."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, width), nn.Linear(out or width, 3)

    def body(self, x: Tensor) -> Tensor:
        raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)).mean(1))


class Heads(nn.Module):
    """Attention with four heads of four channels; what differs is how they meet."""

    heads, kv_heads, head_dim = 4, 4, 4

    def __init__(self) -> None:
        super().__init__()
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q, self.o = nn.Linear(16, width), nn.Linear(width, 16)
        self.k, self.v = nn.Linear(16, kv_width), nn.Linear(16, kv_width)

    def split(self, t):
        return t.view(*t.shape[:2], -1, self.head_dim).transpose(1, 2)

    def merge(self, t):
        return self.o(t.transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x):
        return self.merge(self.attend(self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))))


class Streamed(Tokens):
    """One attention on a residual stream."""

    inner: type[nn.Module] = Heads

    def __init__(self) -> None:
        super().__init__(16)
        self.attn = self.inner()

    def body(self, x):
        return x + self.attn(x)


def half(n: int) -> int:
    """How many of ``n`` units go."""
    return n // 2


def one(n: int) -> int:
    """A single unit goes."""
    return 1


def all_but_one(n: int) -> int:
    """A single unit stays."""
    return n - 1


def removal(coupling: Coupling, count: Callable[[int], int], seed: int = 0) -> Tensor:
    """Units that go: of every group so many, at random positions."""
    g = torch.Generator().manual_seed(seed)
    removed = torch.zeros(coupling.n_units, dtype=torch.bool)
    for group in coupling.groups:
        removed[group.start + torch.randperm(group.size, generator=g)[: count(group.size)]] = True
    return removed


def wide(model: nn.Module, seed: int = 1) -> nn.Module:
    """A copy in float64 with random weights of the size of one, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    out = duplicate(model).double().eval()
    with torch.no_grad():
        for p in out.parameters():
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5 + (0.5 if p.dim() <= 1 else 0))
        for name, b in out.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=g, dtype=torch.float64))
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=g, dtype=torch.float64) + 0.5)
    return out


def fresh(args: Sequence[Tensor], *, batch: bool, seed: int = 2) -> tuple[Tensor, ...]:
    """Other inputs than those of the example: other values, and one sample more."""
    g = torch.Generator().manual_seed(seed)

    def like(t: Tensor) -> Tensor:
        more = torch.cat([t, t[:1]]) if batch and t.dim() else t
        if not t.is_floating_point():
            return more.flip(-1) if more.dim() else more
        return torch.randn(more.shape, generator=g, dtype=torch.float64)

    return tuple(like(t) for t in args)


def outputs(model: nn.Module, args: Sequence[Tensor]) -> list[Tensor]:
    """All tensors that a model returns."""
    with torch.no_grad():
        return [t for t in tree_leaves(model(*args)) if isinstance(t, Tensor)]


def assert_equal(
    model: nn.Module, coupling: Coupling, removed: Tensor, args: Sequence[Tensor], *, batch: bool = True
) -> nn.Module:
    """Slim equals masked on weights and inputs that the library's own verification has not seen.

    Returns:
        The slim model, in float64.
    """
    dense = wide(model)
    slim = slim_module(dense, coupling, removed, [a.double() if a.is_floating_point() else a for a in args])
    masked = duplicate(dense)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, keep in coupling.masks(removed).items():
            tensors[name].mul_(keep)
    inputs = fresh(args, batch=batch)
    want, got = outputs(masked, inputs), outputs(slim, inputs)
    assert len(want) == len(got) > 0
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9 * max(1.0, float(w.abs().max()) if w.numel() else 1.0))
    assert sum(p.numel() for p in slim.parameters()) == coupling.params(removed)
    return slim


def show(case: Case) -> None:
    """Finds what a case says, and shows that slim equals masked for several removals."""
    torch.manual_seed(0)
    model, args = case.make(), case.inputs()
    coupling = couple(model, args)
    kept = {k.where: k.reason for k in coupling.kept}
    found = tuple(sorted(g.size for g in coupling.groups))
    assert found == case.groups, ([(g.name, g.size) for g in coupling.groups], kept)
    for name, reason in kept.items():
        allowed = case.kept.get(name, "^an output of the model$")
        assert re.search(allowed, reason), f"{name} is kept: {reason}"
    assert not case.kept.keys() - kept.keys(), kept
    for count in (half, one, all_but_one) if coupling.groups else ():
        removed = removal(coupling, count)
        slim = assert_equal(model, coupling, removed, args, batch=case.batch)
        if count is half and case.flops:
            inputs = tuple(a.double() if a.is_floating_point() else a for a in args)
            assert measured_flops(slim, inputs)[""] == coupling.flops(removed)
