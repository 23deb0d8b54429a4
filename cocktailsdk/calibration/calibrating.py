"""From data to the scores of a net's patterns."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import PatternError
from ..graph import Coupling, Weight
from ..patterns.base import Pattern
from ..patterns.experts import removable_experts
from ..patterns.scores import Layers, Observed, Score
from ..patterns.scoring import PatternScores, ScoreFunction, ScoreLike, resolve_scores
from ..utils.losses import ForwardFn, LossFn
from .data import CalibrationData
from .experts import observe_experts
from .layers import layer_cosines, loss_without
from .passes import observe_gradients, observe_inputs
from .replay import Replay, find_chain
from .sequential import SequentialScores, check_sequential

__all__ = ["calibrate"]

log = logging.getLogger(__name__)

INPUTS, GRADIENTS = frozenset({"squares", "gram"}), frozenset({"gradients"})


def calibrate(
    model: nn.Module,
    coupling: Coupling,
    eligible: Sequence[Weight],
    patterns: Sequence[Pattern],
    score: ScoreLike | Mapping[str, ScoreLike],
    data: CalibrationData | None,
    loss_fn: LossFn | None = None,
    forward_fn: ForwardFn | None = None,
    *,
    sequential: bool = False,
) -> PatternScores:
    """Pass data through a model, as often as the scores of its patterns need it.

    Args:
        model: With its dense weights; it is left as it was.
        coupling: The model's coupling.
        eligible: The weights that patterns of elements may touch.
        patterns: The patterns.
        score: See :func:`~cocktailsdk.patterns.scoring.resolve_scores`.
        data: The data; ``None`` where no score needs any.
        loss_fn: As in training.
        forward_fn: As in training.
        sequential: Whether elements are judged block by block in each subnetwork, on the outputs of its pruned blocks.

    Raises:
        PatternError: A score is not known, or not defined for its pattern; it needs data or a loss and there is none;
            a weight that is to be ranked is not used on the data, or activations are not finite.
    """
    chosen = resolve_scores(score, patterns)
    scores = _by_name(chosen.values())
    for s in scores.values():
        if s.needs and data is None:
            raise PatternError(f"score {s.name!r} is judged from data: give calibration=loader")
    names = _blocks(model, patterns, chosen, data, forward_fn) if sequential else ()
    if data is None:
        return PatternScores(chosen)
    # whole experts are judged by what they return, not by what an observer of weights sees
    of_experts = [p for p in patterns if _judges_experts(p, chosen[p.name])]
    others = _by_name(chosen[p.name] for p in patterns if p not in of_experts)
    summaries = _summaries(model, coupling, eligible, others, data, loss_fn, forward_fn)
    layers: dict[str, Mapping[str, float]] = {}
    for p in patterns:
        own = chosen[p.name]
        if isinstance(own, Score) and p.ranks == "layers" and own.scores_layers():
            parts = p.droppable(coupling, eligible)
            layers[p.name] = _layer_scores(model, p, own, parts, data, loss_fn, forward_fn)
    experts: dict[str, Mapping[str, Tensor]] = {}
    if of_experts:
        routed = observe_experts(model, removable_experts(coupling, eligible), data, forward_fn)
        for p in of_experts:
            own = chosen[p.name]
            assert isinstance(own, Score)
            experts[p.name] = {name: own.experts(of) for name, of in routed.items()}
    if not sequential:
        return PatternScores(chosen, summaries, layers, experts)
    replay = Replay.capture(model, data, forward_fn, names)
    return SequentialScores(
        by_pattern=chosen, summaries=summaries, layers=layers, experts=experts, model=model, replay=replay
    )


def _judges_experts(pattern: Pattern, score: object) -> bool:
    return pattern.ranks == "experts" and isinstance(score, Score) and score.scores_experts()


def _by_name(chosen: Iterable[Score | ScoreFunction]) -> dict[str, Score]:
    out: dict[str, Score] = {}
    for score in chosen:
        if isinstance(score, Score) and vars(out.setdefault(score.name, score)) != vars(score):
            raise PatternError(
                f"score {score.name!r} is given with other settings for another pattern, and a net has each score "
                "once; register a subclass under a name of its own"
            )
    return out


def _blocks(
    model: nn.Module,
    patterns: Sequence[Pattern],
    chosen: Mapping[str, Score | ScoreFunction],
    data: CalibrationData | None,
    forward_fn: ForwardFn | None,
) -> tuple[str, ...]:
    """The blocks that are judged one after another.

    Raises:
        PatternError: There are none, or nothing is judged by them.
    """
    checked = [check_sequential(p, chosen[p.name]) for p in patterns]  # each may refuse
    if data is None or not any(checked):
        raise PatternError(
            "sequential=True judges single weights by their inputs, block by block, and no pattern here is ranked so; "
            "leave it out, or choose score='wanda' or 'sparsegpt'"
        )
    names = find_chain(model, data, forward_fn)
    if not names:
        raise PatternError(
            f"sequential=True runs {type(model).__name__} block by block, and it has no list of modules of which each "
            "takes what the one before returned; leave it out"
        )
    return names


def _summaries(
    model: nn.Module,
    coupling: Coupling,
    eligible: Sequence[Weight],
    scores: Mapping[str, Score],
    data: CalibrationData,
    loss_fn: LossFn | None,
    forward_fn: ForwardFn | None,
) -> dict[str, dict[str, Mapping[str, Tensor]]]:
    """By score and weight, what scores keep of what is observed."""
    out: dict[str, dict[str, Mapping[str, Tensor]]] = {name: {} for name in scores}
    needed = frozenset[str]().union(*(s.needs for s in scores.values()))
    weights, ranked = _ranked(coupling, eligible), {w.name for w in eligible}
    if needed & INPUTS:
        for weight, observed in observe_inputs(model, weights, data, forward_fn, gram="gram" in needed):
            if observed is not None:
                _report(weight, observed)
                _summarise([s for s in scores.values() if s.needs & INPUTS], weight, observed, out)
            elif weight.name in ranked:
                raise PatternError(_unused(weight))
    if needed & GRADIENTS:
        for weight, gradients in observe_gradients(model, weights, data, loss_fn, forward_fn):
            _summarise([s for s in scores.values() if s.needs & GRADIENTS], weight, gradients, out)
    return out


def _layer_scores(
    model: nn.Module,
    pattern: Pattern,
    score: Score,
    parts: Mapping[str, tuple[str, ...]],
    data: CalibrationData,
    loss_fn: LossFn | None,
    forward_fn: ForwardFn | None,
) -> Mapping[str, float]:
    """A score of each of a pattern's layers or branches."""
    cosines: Mapping[str, float] = {}
    if "changes" in score.needs:
        modules = {path for path, _ in model.named_modules()}
        other = next((name for name in parts if name not in modules), None)
        if other is not None or pattern.name == "depth":
            raise PatternError(
                f"score {score.name!r} compares what goes into a layer with what comes out, and the pattern "
                f"{pattern.name!r} drops branches of layers; choose the pattern 'layers', or the score 'greedy'"
            )
        cosines = layer_cosines(model, tuple(parts), data, forward_fn)
    trial = loss_without(model, parts, data, loss_fn, forward_fn) if "trials" in score.needs else None
    most = max(round(s.sparsity * len(parts)) for s in pattern.subnets())
    return score.layers(Layers(tuple(parts), cosines, trial, max(0, min(most, len(parts) - 1))))


def _ranked(coupling: Coupling, eligible: Sequence[Weight]) -> list[Weight]:
    """The weights that scores are about: those that patterns touch, and all that consume or make channels."""
    names = {w.name for w in eligible} | coupling.fields.keys()
    return [w for w in coupling.weights if w.name in names]


def _summarise(
    scores: Sequence[Score],
    weight: Weight,
    observed: Observed,
    summaries: Mapping[str, dict[str, Mapping[str, Tensor]]],
) -> None:
    for score in scores:
        summaries[score.name][weight.name] = score.summary(observed)


def _unused(weight: Weight) -> str:
    return (
        f"calibration: the inputs of {weight.name!r} were not seen. Either the data does not reach it, or the model "
        "computes the weight anew in every pass (torch.nn.utils.weight_norm, autocast in forward_fn). Leave it out "
        f"with exclude_modules=[{weight.module!r}], or choose another score"
    )


def _report(weight: Weight, observed: Observed) -> None:
    """Say what the data did not reach."""
    without = [part for part, rows in enumerate(observed.rows) if not rows]
    if without:
        log.warning(
            "no calibration token reached %d of %d parts (experts) of %r: %s; they are ranked by magnitude",
            len(without),
            len(observed.rows),
            weight.name,
            ", ".join(map(str, without[:8])),
        )
    assert observed.squares is not None
    with_rows = observed.squares[torch.tensor(observed.rows) > 0]
    dead = int((with_rows == 0).sum())
    if dead:
        log.warning("%d of %d inputs of %r are zero on all calibration data", dead, with_rows.numel(), weight.name)
