"""Torch-Pruning in place of the coupling found here, under the same check: slim equals masked."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ExportFailed, PatternError, SlimError, described
from ..graph.compare import doubled, leaves_of
from ..graph.copies import duplicate_in_double
from ..net.target_modules import Selection, some_of
from ..net.tracing import Example, couple_model
from ..patterns.scores import Magnitude
from ..patterns.scoring import ScoreLike
from ..utils.devices import device_of
from ..utils.nested import to_device
from .positions import Inputs, Where, check_equal, filled, named_tensors
from .ratios import REST, Ratios

__all__ = ["chosen_importance", "prune"]

log = logging.getLogger(__name__)

History = list[tuple[str, bool, list[int]]]
"""What Torch-Pruning removed, as it records it: a root's path, whether its outputs went, and which."""


def prune(
    model: nn.Module,
    example: Example,
    ratio: float | Mapping[str, float],
    round_to: int,
    scope: str,
    selection: Selection,
    importance: Callable[..., Tensor] | None = None,
) -> nn.Module:
    """Lets Torch-Pruning choose and remove channels of a copy, and checks that the result equals the masked model.

    What it removed of each parameter is read off a copy whose every element is its own position; the masked model is
    the original in which exactly these elements are zero. Both are compared in float64 on randomised weights of unit
    scale, as every slim model is (:mod:`cocktailsdk.graph.verify_slim`). The second proof, labels run through the slim
    model's graph, needs a coupling that Torch-Pruning does not have.

    Args:
        model: Never altered.
        example: Arguments of one forward pass.
        ratio: Its ``pruning_ratio``, or ratios by module, as for the other backend but without groups' names: its
            ``pruning_ratio_dict``. Of each group it removes at least this share (it rounds up).
        round_to: Its ``round_to``: channels kept are rounded down to a multiple.
        scope: ``"global"``: its ``global_pruning``.
        selection: What keeps its output channels becomes its ``ignored_layers``, as do classifiers.
        importance: One of its importances; by default its ``MagnitudeImportance``. Gradients that the model holds are
            there for it to use.

    Returns:
        A copy of the model without what Torch-Pruning removed; the values left are the model's own.

    Raises:
        PatternError: A ratio's key names no module.
        SlimError: Torch-Pruning fails or removes nothing; or the slim model does not run, returns another shape or
            computes something else than the masked one.
    """
    inputs = to_device(example, device_of(model))
    ratios = _by_path(model, ratio, scope)
    ignored = _ignored(model, example, selection)
    try:
        with _contained():
            working = doubled(inputs, torch.Generator().manual_seed(0))
            history = _chosen(model, working, ratios, round_to, scope, ignored, importance)
            slim, where = _replayed(model, working, history)
    except Exception as error:  # it may raise anything
        raise SlimError(f"{_peer()} cannot prune {type(model).__name__} ({described(error)}); {_ADVICE}") from error
    if not history and (ratios.rest or any(share for _, share in ratios.layers)):
        raise SlimError(f"{_peer()} found nothing to remove from {type(model).__name__}; {_ADVICE}")
    check_equal(model, slim, where, inputs, f"what {_peer()} leaves of {type(model).__name__}", _ADVICE)
    return filled(slim, model, where)


def chosen_importance(score: ScoreLike, options: Sequence[Any]) -> Callable[..., Tensor] | None:
    """What of ``slim``'s score Torch-Pruning takes: one of its importances; ``None`` for magnitude, its default.

    Args:
        score: As ``slim`` got it.
        options: Calibration data and what is done with it; all ``None`` where the user gave none.

    Raises:
        PatternError: It is another score, or there is calibration data.
    """
    magnitude = score == Magnitude.name or isinstance(score, Magnitude)
    if any(option is not None for option in options) or not (magnitude or callable(score)):
        raise PatternError(
            f"backend='torch-pruning' ranks channels by score='magnitude' or by one of Torch-Pruning's importances, "
            f"without calibration data, loss_fn and forward_fn; got score={score!r}: use backend='cocktail'"
        )
    return None if magnitude else cast(Callable[..., Tensor], score)


_ADVICE = "backend='cocktail' follows more models, and keeps whole what it cannot follow"


def _peer() -> str:
    return f"Torch-Pruning {version('torch-pruning')}"


@contextmanager
def _contained() -> Iterator[None]:
    """It prints, warns, needs gradients, and leaves random numbers drawn."""
    output = io.StringIO()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices=devices),
        torch.enable_grad(),
        warnings.catch_warnings(record=True) as warned,
        redirect_stdout(output),
    ):
        warnings.simplefilter("always")
        yield
    for line in [*output.getvalue().splitlines(), *(str(w.message) for w in warned)]:
        log.debug("%s: %s", _peer(), line)


def _ignored(model: nn.Module, example: Example, selection: Selection) -> list[str]:
    """Paths of the modules that keep their output channels."""
    paths = set(selection.whole)
    try:
        weights = couple_model(model, example, selection, prove=False).weights
    except ExportFailed as error:
        log.info("the classifier is not known, name it in exclude_modules: %s", error)
        weights = ()
    paths |= {w.module for w in weights if w.role == "classifier" and w.module}
    return sorted(paths)


def _working_copy(model: nn.Module) -> nn.Module:
    """In float64, with gradients: Torch-Pruning follows the model by what autograd records."""
    made = duplicate_in_double(model).eval()
    for p, original in zip(made.parameters(), model.parameters(), strict=True):
        if p.is_floating_point():
            p.requires_grad_(True)
            p.grad = None if original.grad is None else original.grad.detach().to(p)
    return made


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [t for t in leaves_of(model(*inputs[0], **inputs[1])) if t.grad_fn is not None]


def _chosen(
    model: nn.Module,
    inputs: Inputs,
    ratios: _Ratios,
    round_to: int,
    scope: str,
    ignored: list[str],
    importance: Callable[..., Tensor] | None,
) -> History:
    """What Torch-Pruning would remove."""
    import torch_pruning as tp

    pruned = _working_copy(model)
    layers = [tuple(pruned.get_submodule(path) for path in paths) for paths, _ in ratios.layers]
    pruner = tp.pruner.MetaPruner(
        pruned,
        inputs,
        importance=importance or tp.importance.MagnitudeImportance(),
        global_pruning=scope == "global",
        pruning_ratio=ratios.rest,
        pruning_ratio_dict={m: share for m, (_, share) in zip(layers, ratios.layers, strict=True)},
        ignored_layers=[pruned.get_submodule(path) for path in ignored],
        round_to=round_to if round_to > 1 else None,
        forward_fn=_run,
        # Its defaults are dictionaries that all pruners of a process share, and fill.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()
    return [(root, bool(out), list(positions)) for root, out, positions in pruner.pruning_history()]


@dataclass(frozen=True)
class _Ratios:
    """What it calls ``pruning_ratio`` and ``pruning_ratio_dict``.

    Attributes:
        rest: The ratio of all layers that are not named.
        layers: Paths of layers, and their ratio; with a global scope these are ranked together.
    """

    rest: float
    layers: tuple[tuple[tuple[str, ...], float], ...] = ()


def _by_path(model: nn.Module, ratio: float | Mapping[str, float], scope: str) -> _Ratios:
    if not isinstance(ratio, Mapping):
        return _Ratios(ratio)
    ratios = Ratios(model, ratio)
    layers = [
        path
        for path, module in model.named_modules()
        if path and isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() > 1
    ]
    of_key: dict[str, list[str]] = {key: [] for key in ratio}
    for path in layers:
        if (key := ratios.of_weight(f"{path}.weight")) is not None:
            of_key[key].append(path)
    for key in ratio:
        if ratio[key] > 0.0 and key != REST and not any(ratios.covers(key, f"{path}.weight") for path in layers):
            raise PatternError(
                f"ratio: {key!r} names no layer that Torch-Pruning could prune; layers are {some_of(layers)}"
            )
    rest, named = ratio.get(REST, 0.0), {k: paths for k, paths in of_key.items() if k != REST and paths}
    if scope == "global":
        return _Ratios(rest, tuple((tuple(paths), ratio[key]) for key, paths in named.items()))
    return _Ratios(rest, tuple(((path,), ratio[key]) for key, paths in named.items() for path in paths))


def _replayed(model: nn.Module, inputs: Inputs, history: History) -> tuple[nn.Module, Where]:
    """Removes the same from a copy whose every element is its own position."""
    import torch_pruning as tp

    probe = _working_copy(model)
    for p in probe.parameters():
        p.grad = None
    graph = tp.DependencyGraph().build_dependency(probe, inputs, forward_fn=_run)
    before = named_tensors(probe)
    for t in before.values():
        if t.is_floating_point():  # float64 counts exactly to 2^53
            t.data = torch.arange(t.numel(), dtype=t.dtype, device=t.device).view(t.shape)
    shapes = {name: t.shape for name, t in before.items()}
    graph.load_pruning_history([list(step) for step in history])
    after = named_tensors(probe)
    if set(after) != set(shapes):
        raise SlimError(f"{sorted(set(after) ^ set(shapes))[0]!r} was added or removed")
    where = {}
    for name, t in after.items():
        if t.is_floating_point():
            where[name] = t.detach().to(torch.int64)
        elif t.shape == shapes[name]:
            where[name] = torch.arange(t.numel(), device=t.device).view(t.shape)
        else:
            raise SlimError(f"{name!r}, which holds whole numbers, was cut")
    return probe, where
