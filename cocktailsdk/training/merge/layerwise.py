"""A coefficient for every layer in place of one a round, found by search or by gradient on the held-out set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...utils.losses import loss_of
from ..session import load_tensors
from ..step.distill import untouched_buffers
from ..user_code import guarded_batches
from .alpha_search import Choice, interpolate, layer_of
from .candidates import Candidates

__all__ = ["by_gradient", "by_layer", "descended", "refine"]

Judged = Callable[[float, int], None]
Shares = dict[str, float]
STEPS = 200  # of descent on the coefficients of a round
RATE = 0.02  # by which a coefficient moves at most in a step


def refine(candidates: Candidates, choice: Choice, judged: Judged) -> tuple[Shares, Choice]:
    """Look for coefficients by layer that are better than one for all layers, if the recipe asks for them.

    They are taken only if their mean held-out metric is higher, by the same exact comparison.

    Args:
        candidates: Of the round.
        choice: The best coefficient for all layers.
        judged: Called after every result.

    Returns:
        A coefficient by layer, empty if one for all is as good; and its scores.
    """
    how = {"layerwise": by_layer, "gradient": by_gradient}.get(candidates.session.options.recipe.merging)
    return ({}, choice) if how is None else how(candidates, choice, judged)


def by_layer(candidates: Candidates, choice: Choice, judged: Judged) -> tuple[Shares, Choice]:
    """Go through the layers once; each takes the next larger or smaller coefficient if that is better."""
    alphas = sorted(set(candidates.session.options.settings.rounds.alphas))
    at = alphas.index(choice.alpha)
    neighbours = alphas[max(at - 1, 0) : at] + alphas[at + 1 : at + 2]
    shares, best = dict.fromkeys(candidates.layers, choice.alpha), choice
    keys = itertools.count(2)  # of candidates; no coefficient is above 1
    for layer in candidates.layers:
        tried = {float(next(keys)): {**shares, layer: share} for share in neighbours}
        key, best = _best(candidates, best, tried, judged)
        shares = tried.get(key, shares)
    return ({} if best is choice else shares), best


def by_gradient(candidates: Candidates, choice: Choice, judged: Judged) -> tuple[Shares, Choice]:
    """Descend the networks' mean held-out loss along the layers' coefficients, from the best one for all layers."""
    shares = descended(candidates, choice.alpha)
    key, best = _best(candidates, choice, {2.0: shares}, judged)
    return ({} if key != 2.0 else shares), best


def _best(candidates: Candidates, best: Choice, tried: Mapping[float, Shares], judged: Judged) -> tuple[float, Choice]:
    """The best of what is best so far and some candidates; of equals the former."""
    now = max(tried) + 0.5
    candidates.session.merging.scores.update({(now, cell): score for cell, score in best.scores.items()})
    candidates.proposed.update(tried)
    found = candidates.choose([now, *tried], judged)
    if found.alpha == now:
        return now, best
    return found.alpha, Choice(best.alpha, found.value, found.scores)


def descended(candidates: Candidates, alpha: float) -> Shares:
    """Coefficients after a few steps of Adam; every step takes one network, and one held-out batch, in turn.

    With weights w = α D + (1 - α) T in a layer, the derivative of the loss by α is the gradient's product with D - T.
    """
    session, names = candidates.session, candidates.names
    assert session.data.held_out is not None
    net, options = session.net, session.options
    merged, other = candidates.merged, candidates.other
    parameters = dict(net.model.named_parameters())
    ways: dict[str, dict[str, Tensor]] = {}
    for name in parameters:
        ways.setdefault(layer_of(name), {})[name] = merged[name] - other[name]
    shares = torch.full((len(ways),), alpha, dtype=torch.float64)
    shares.requires_grad_(True)
    optimizer = torch.optim.Adam([shares], lr=RATE)
    endless = itertools.chain.from_iterable(itertools.repeat(session.data.held_out))
    batches = guarded_batches(session, endless, "val_loader")
    session.seed("shares", len(session.history.alphas))
    session.modes.apply()
    with untouched_buffers(net.model):
        for i, batch in zip(range(STEPS), batches, strict=False):
            name = names[i % len(names)]
            now = dict(zip(ways, shares.tolist(), strict=True))
            load_tensors(net.model, interpolate(merged, other, alpha, now))
            net.model.zero_grad(set_to_none=True)
            with net.using(name, statistics=False):
                output, target = options.forward_fn(net.model, batch)
                loss_of(output, target, options.loss_fn).backward()
            masks = net.mask_tensors(name)
            slopes = [_slope(way, parameters, masks) for way in ways.values()]
            shares.grad = torch.stack(slopes).to(shares.dtype).cpu()
            optimizer.step()
            with torch.no_grad():
                shares.clamp_(0.0, 1.0)
    net.model.zero_grad(set_to_none=True)
    candidates.forget()
    # descended by every process alike, and taken from one
    return session.ranks.from_main(lambda: dict(zip(ways, shares.tolist(), strict=True)))


def _slope(
    way: Mapping[str, Tensor], parameters: Mapping[str, torch.nn.Parameter], masks: Mapping[str, Tensor]
) -> Tensor:
    total = next(iter(way.values())).new_zeros(())
    for name, direction in way.items():
        if (grad := parameters[name].grad) is not None:
            total = total + (grad * direction * masks.get(name, 1.0)).sum()
    return total
