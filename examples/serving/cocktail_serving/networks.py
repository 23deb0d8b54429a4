"""The networks of a bundle that are worth serving, ready to run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

import cocktailsdk as cocktail

__all__ = ["Network", "ladder", "networks_of"]

GAIN = 0.1
"""A narrower network is worth having if it takes at least this share less time than the one before."""


@dataclass(frozen=True)
class Network:
    """A network that runs at its true cost.

    Attributes:
        name: Its name in the bundle.
        model: What runs.
        seconds: That it takes for one example, in batches of the usual size, when nothing else goes on.
        accuracy: Its metric in the bundle, if there is one.
    """

    name: str
    model: nn.Module
    seconds: float
    accuracy: float | None

    def __call__(self, examples: Shaped[Tensor, "batch *example"]) -> Float[Tensor, "batch outputs"]:
        """Its outputs."""
        with torch.inference_mode():
            return self.model(examples)


def networks_of(
    net: cocktail.CocktailNet,
    pattern: str = "channel",
    only: Iterable[str] = (),
    *,
    batch: int = 1,
    repeats: int = 15,
) -> list[Network]:
    """Networks of a bundle from the widest to the narrowest, measured here.

    They are views (:meth:`CocktailNet.views`): all share one copy of the weights, each computes only with the channels
    that it keeps, and going from one to another is calling another. Networks whose zeros the processor multiplies all
    the same (unstructured, N:M) would answer no faster, so they are of no use for holding a latency.

    Args:
        net: The net, on the CPU; it must take one tensor and return one of ``(batch, outputs)``.
        pattern: The pattern that is served, with the dense network.
        only: Serve exactly these instead, whether or not they are worth it.
        batch: Examples of the batches that are measured.
        repeats: How often.

    Raises:
        ValueError: The model takes or returns something else, or the net has no such pattern.
        CocktailError: The subnetworks cannot be views of each other.
    """
    example = example_of(net)
    patterns = [p.name for p in net.patterns]
    if not only and pattern not in patterns:
        raise ValueError(
            f"the bundle has no pattern {pattern!r}; it has {', '.join(patterns)}: name one with --pattern"
        )
    names = list(only) or ["dense", *(s.name for p in net.patterns if p.name == pattern for s in p.subnets())]
    net.eval()
    views = net.views(names)
    inputs = example[:1].expand(batch, *example.shape[1:]).contiguous()
    seconds = _measured(views, inputs, repeats)
    networks = [Network(n, model, seconds[n], net.metrics.get(n)) for n, model in views.items()]
    outputs = networks[0](inputs)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != batch:
        raise ValueError("this service is for models that return one tensor (batch, outputs)")
    return networks if only else ladder(networks)


def example_of(net: cocktail.CocktailNet) -> Tensor:
    """The one tensor that the model takes, as in the bundle's example.

    Raises:
        ValueError: It takes something else, or nobody knows.
    """
    args, kwargs = net.example or ((), {})
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].ndim < 2:
        raise ValueError("this service is for models that take one tensor (batch, …), which the bundle's example shows")
    return args[0].detach().cpu()


def ladder(networks: Iterable[Network]) -> list[Network]:
    """Those worth serving: the first, then each that is clearly faster than all before and better than all after."""
    rows = list(networks)
    rungs = rows[:1]
    for i, n in enumerate(rows[1:], 1):
        if n.seconds <= (1 - GAIN) * rungs[-1].seconds and not any(_beats(m, n) for m in rows[i + 1 :]):
            rungs.append(n)
    return rungs


def _beats(narrower: Network, n: Network) -> bool:
    if narrower.accuracy is None or n.accuracy is None:
        return False
    return narrower.accuracy >= n.accuracy and narrower.seconds < n.seconds


def _measured(models: Mapping[str, nn.Module], inputs: Tensor, repeats: int) -> dict[str, float]:
    """The fewest seconds an example, the models run by turns so that what else the machine does hits all alike."""
    seen: dict[str, list[float]] = {n: [] for n in models}
    with torch.inference_mode():
        for turn in range(repeats + 2):
            for name, model in models.items():
                began = time.perf_counter()
                model.eval()(inputs)
                if turn > 1:
                    seen[name].append(time.perf_counter() - began)
    return {n: min(found) / len(inputs) for n, found in seen.items()}
