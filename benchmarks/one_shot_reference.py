"""Plain versions of published methods, written from their papers, for causal language models of the Llama family.

Every method goes block by block, as its authors' code does: the inputs of a block are those that the blocks before it
give after they were pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sparsity:
    """How much of a weight goes: a share of each row or matrix, or N of every M.

    Attributes:
        share: Of zeros.
        m: Length of a run, of which ``share`` goes; 0 for no runs.
    """

    share: float
    m: int = 0


Prune = Callable[[Tensor, Tensor, Sparsity], Tensor]
"""``(weight (out, in), gram (in, in), sparsity)`` gives the pruned weight. The gram matrix is of the layer's inputs."""


class _Stop(Exception):
    """Ends a forward pass at the first block."""


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks."""
    found = model.get_submodule("model.layers")
    assert isinstance(found, nn.ModuleList)
    return found


@dataclass
class Stream:
    """Hidden states of the calibration tokens between two blocks, and the other arguments of a block."""

    hidden: list[Tensor]
    options: list[dict[str, Any]]

    @classmethod
    @torch.no_grad()
    def enter(cls, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Stream:
        """Before the first block."""
        stream = cls([], [])

        def keep(block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            stream.hidden.append(args[0])
            stream.options.append(kwargs)
            raise _Stop

        handle = blocks_of(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for batch in batches:
                try:
                    model(input_ids=batch["input_ids"], use_cache=False)
                except _Stop:
                    continue
        finally:
            handle.remove()
        return stream

    @torch.no_grad()
    def through(self, block: nn.Module) -> Stream:
        """After a block."""
        return Stream([block(h, **o) for h, o in zip(self.hidden, self.options, strict=True)], self.options)


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a block that are pruned, by name."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


@contextmanager
def observed(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While it lasts, layers hand their inputs ``(tokens, in)`` to a function."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, args: see(name, args[0].flatten(0, -2))

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def prune_linears(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], prune: Prune, sparsity: Sparsity) -> None:
    """Prune all linear layers of all blocks, in place."""
    stream = Stream.enter(model, batches)
    for block in blocks_of(model):
        layers = linears_of(block)
        grams: dict[str, Tensor] = {}

        def add(name: str, inputs: Tensor, grams: dict[str, Tensor] = grams) -> None:
            gram = inputs.T @ inputs
            grams[name] = grams[name] + gram if name in grams else gram

        with observed(layers, add):
            stream.through(block)
        for name, layer in layers.items():
            layer.weight.copy_(prune(layer.weight.detach(), grams[name], sparsity))
        stream = stream.through(block)


def smallest(score: Tensor, sparsity: Sparsity) -> Tensor:
    """What goes, by score: of each row its share, or of each run."""
    if sparsity.m:
        runs = score.unflatten(1, (-1, sparsity.m))
        lowest = runs.argsort(dim=2, stable=True)[..., : round(sparsity.share * sparsity.m)]
        return torch.zeros_like(runs, dtype=torch.bool).scatter_(2, lowest, True).flatten(1)
    lowest = score.argsort(dim=1, stable=True)[:, : int(score.shape[1] * sparsity.share)]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)


def wanda(weight: Tensor, gram: Tensor, sparsity: Sparsity) -> Tensor:
    """Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023: |weight| x input norm."""
    return weight.masked_fill(smallest(weight.abs() * gram.diagonal().sqrt(), sparsity), 0)


BLOCK = 128
"""Columns of a SparseGPT step, as in the authors' code."""

DAMPING = 0.01
"""Of the mean of the gram matrix's diagonal, as in the authors' code."""


def sparsegpt(weight: Tensor, gram: Tensor, sparsity: Sparsity) -> Tensor:
    """Frantar and Alistarh, SparseGPT, 2023, Algorithm 1: what a weight did is done by those to the right of it."""
    weight, gram = weight.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    weight[:, dead] = 0
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    scale = inverse.diagonal()
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        part, errors = weight[:, start:stop].clone(), torch.zeros(len(weight), stop - start)
        own = inverse[start:stop, start:stop]
        gone = torch.zeros_like(part, dtype=torch.bool)
        if not sparsity.m:  # all rows of the matrix are compared
            saliency = (part / scale[start:stop]).square()
            gone = saliency <= saliency.flatten().sort()[0][int(saliency.numel() * sparsity.share)]
        for i in range(stop - start):
            if sparsity.m and i % sparsity.m == 0:
                run = slice(i, i + sparsity.m)
                saliency = (part[:, run] / scale[start:stop][run]).square()
                gone[:, run] = smallest(saliency, sparsity)
            column = part[:, i].masked_fill(gone[:, i], 0)
            errors[:, i] = (part[:, i] - column) / own[i, i]
            part[:, i:] -= errors[:, i : i + 1] * own[i, i:]
            part[:, i] = column
        weight[:, start:stop] = part
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return weight


@torch.no_grad()
def narrow_mlps(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], share: float) -> None:
    """Zero the inputs of each down projection of least score: the input's norm times the column's (Minitron, 2024)."""
    stream = Stream.enter(model, batches)
    for block in blocks_of(model):
        down = linears_of(block)["mlp.down_proj"]
        squares = torch.zeros(down.in_features)

        def add(name: str, inputs: Tensor, squares: Tensor = squares) -> None:
            squares.add_(inputs.square().sum(0))

        with observed({"down": down}, add):
            stream.through(block)
        score = squares.sqrt() * down.weight.norm(dim=0)
        down.weight[:, score.argsort(dim=0, stable=True)[: round(share * len(score))]] = 0
        stream = stream.through(block)


@torch.no_grad()
def drop_blocks_by_cosine(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], count: int) -> list[int]:
    """Drop the blocks whose outputs are most like their inputs (ShortGPT, Men et al., 2024); their numbers."""
    stream, likeness = Stream.enter(model, batches), []
    for block in blocks_of(model):
        after = stream.through(block)
        pairs = zip(stream.hidden, after.hidden, strict=True)
        likeness.append(torch.cat([F.cosine_similarity(a, b, dim=-1).flatten() for a, b in pairs]).mean())
        stream = after
    return drop_blocks(model, torch.stack(likeness).argsort(descending=True)[:count].tolist())


@torch.no_grad()
def drop_blocks_by_loss(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], count: int) -> list[int]:
    """Drop one block after the other, always the one without which the calibration loss is least; their numbers."""
    blocks = blocks_of(model)
    gone: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(blocks)) if i not in gone]
        stream, losses = Stream.enter(model, batches), {}
        for i in left:
            after = stream
            for j in (j for j in left if j > i):
                after = after.through(blocks[j])
            losses[i] = _loss(model, after, batches)
            stream = stream.through(blocks[i])
        gone.append(min(losses, key=lambda i: losses[i]))
    return drop_blocks(model, gone)


def _loss(model: nn.Module, stream: Stream, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Of the next token, from the hidden states after the last block."""
    norm: Callable[[Tensor], Tensor] = model.get_submodule("model.norm")
    head: Callable[[Tensor], Tensor] = model.get_submodule("lm_head")
    total = 0.0
    for hidden, batch in zip(stream.hidden, batches, strict=True):
        logits = head(norm(hidden[:, :-1]))
        total += float(F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()))
    return total / len(batches)


def drop_blocks(model: nn.Module, numbers: list[int]) -> list[int]:
    """Remove blocks; their numbers, ascending."""
    blocks = blocks_of(model)
    model.get_submodule("model").layers = nn.ModuleList(b for i, b in enumerate(blocks) if i not in numbers)
    return sorted(numbers)
