"""Which score each pattern ranks by, and what a pattern then sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import PatternError
from ..graph import Weight
from .base import UMG, Pattern, Subnet
from .scores import Magnitude, Score, registered_scores, score_named
from .sharded import ShardedValues

__all__ = [
    "PatternScores",
    "ScoreFunction",
    "ScoreLike",
    "described_scores",
    "needs_data",
    "resolve_scores",
    "sharded_error",
    "unit_tensor",
]

ScoreFunction = Callable[[UMG], Tensor | Mapping[str, Tensor]]
"""A user's own score: scores of units, or of elements by weight name, from what a pattern sees."""

ScoreLike = str | Score | ScoreFunction
"""A registered name, a score with settings of its own, or a function."""

DEFAULT = "*"
"""In a mapping from patterns to scores, the key of all other patterns."""

Summary = Mapping[str, Tensor]


def resolve_scores(
    score: ScoreLike | Mapping[str, ScoreLike], patterns: Sequence[Pattern]
) -> dict[str, Score | ScoreFunction]:
    """The score of each pattern by its name.

    Args:
        score: One for all, or by pattern name, ``"*"`` for all others; patterns that are not named rank by magnitude.
        patterns: The patterns.

    Raises:
        PatternError: A score is not known, or not defined for its pattern; or a pattern is named that there is not.
    """
    if not isinstance(score, Mapping):
        return {p.name: _defined(_resolved(score), p) for p in patterns}
    names = [p.name for p in patterns]
    for key in score:
        if key not in (DEFAULT, *names):
            raise PatternError(f"score names the pattern {key!r}; there are {', '.join(map(repr, [*names, DEFAULT]))}")
    fallback = score.get(DEFAULT, Magnitude.name)
    return {p.name: _defined(_resolved(score.get(p.name, fallback)), p) for p in patterns}


def _resolved(score: ScoreLike) -> Score | ScoreFunction:
    if isinstance(score, str):
        return score_named(score)()
    if isinstance(score, type):
        raise PatternError(f"score {score.__name__} is a class; write {score.__name__}()")
    if isinstance(score, Score) and registered_scores().get(score.name) is not type(score):
        raise PatternError(
            f"{type(score).__name__} is not registered; decorate it with @register_score('a-name'), so that bundles "
            "and reports can name it"
        )
    if isinstance(score, Score) or callable(score):
        return score
    raise PatternError(
        f"score must be one of {', '.join(map(repr, registered_scores()))}, a Score, a function, or a mapping from "
        f"patterns to these; not {score!r}"
    )


def _defined(score: Score | ScoreFunction, pattern: Pattern) -> Score | ScoreFunction:
    if not isinstance(score, Score) or score.scores_elements():
        return score
    if pattern.ranks == "units" and score.scores_units():
        return score
    if pattern.ranks == "layers" and score.scores_layers():
        return score
    if pattern.ranks == "experts" and score.scores_experts():
        return score
    own = {
        "channel units": score.scores_units(),
        "layers": score.scores_layers(),
        "experts": score.scores_experts(),
    }
    what = [w for w, has in own.items() if has]
    raise PatternError(
        f"score {score.name!r} is for {' and '.join(what)}, and the pattern {pattern.name!r} ranks {pattern.ranks}; "
        f"give a score for each pattern, as in score={{{pattern.name!r}: 'magnitude', '*': {score.name!r}}}"
    )


def needs_data(scores: Mapping[str, Score | ScoreFunction]) -> bool:
    """Whether calibration data is needed for what :func:`resolve_scores` returned."""
    return any(isinstance(s, Score) and bool(s.needs) for s in scores.values())


def described_scores(scores: Mapping[str, Score | ScoreFunction]) -> dict[str, str]:
    """The score of each pattern as text, for configurations and bundles: ``"wanda"``, or a function's name.

    Empty where all rank by magnitude, as they do where nothing was chosen.

    Args:
        scores: From :func:`resolve_scores`.
    """
    if all(isinstance(s, Magnitude) for s in scores.values()):
        return {}
    return {pattern: _described(score) for pattern, score in scores.items()}


def _described(score: Score | ScoreFunction) -> str:
    if not isinstance(score, Score):
        return str(getattr(score, "__qualname__", type(score).__qualname__))
    # other values than these may be shown with their address, which differs from run to run
    plain = {k: v for k, v in vars(score).items() if isinstance(v, bool | int | float | str | None)}
    settings = ", ".join(f"{name}={value!r}" for name, value in sorted(plain.items()))
    name = score.name or type(score).__qualname__
    return f"{name}({settings})" if settings else name


def sharded_error(scores: Mapping[str, Score | ScoreFunction]) -> PatternError:
    """The error for scores that are wanted of a model whose weights are sharded."""
    other = next((_described(s) for s in scores.values() if not isinstance(s, Magnitude)), "a score")
    return PatternError(
        f"score {other!r} sees whole weights, and the model's are sharded (FSDP2): rank by score='magnitude', or train "
        "without sharding (one process, or DDP)"
    )


@dataclass(frozen=True)
class PatternScores:
    """How patterns rank: each by a score, and by what calibration observed for it.

    Attributes:
        by_pattern: The score of each pattern, by its name. Others rank by magnitude.
        summaries: By score name and weight name, what scores keep of their observations.
        layers: By pattern name, the scores of its layers or branches.
        experts: By pattern name and set of experts, the scores of these.
    """

    by_pattern: Mapping[str, Score | ScoreFunction] = field(default_factory=dict)
    summaries: Mapping[str, Mapping[str, Summary]] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    _units: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def seen_by(self, pattern: Pattern, umg: UMG, subnet: Subnet) -> UMG:
        """What a pattern sees, with its score.

        Args:
            pattern: The pattern.
            umg: What it sees without.
            subnet: Whose mask is made.

        Raises:
            PatternError: A user's function or score returned something else than scores, or weights are sharded.
        """
        del subnet
        score = self.by_pattern.get(pattern.name)
        if score is None or isinstance(score, Magnitude):
            return umg
        if isinstance(umg.values, ShardedValues):
            raise sharded_error({pattern.name: score})
        if not isinstance(score, Score):
            return _by_function(score, pattern, umg)
        summaries = self.summaries.get(score.name, {})
        if pattern.ranks == "units" and score.scores_units():
            if score.name not in self._units:  # levels of a pattern share it; weights do not change meanwhile
                found = score.units(umg.coupling, umg.values, summaries)
                self._units[score.name] = unit_tensor(found, umg.coupling.n_units, f"score {score.name!r}")
            return replace(umg, unit_scores=self._units[score.name])
        if pattern.ranks == "layers" and score.scores_layers():
            return replace(umg, layer_scores=self.layers[pattern.name])
        if pattern.ranks == "experts" and score.scores_experts():
            return replace(umg, expert_scores=self.experts[pattern.name])
        weights = {w.name: w for w in umg.coupling.weights}
        return replace(umg, scores=_Elements(score, weights, umg.values, summaries), comparison=score.comparison)


class _Elements(Mapping[str, Tensor]):
    """Scores of elements, computed when they are asked for: kept, they would take as much memory as the model."""

    def __init__(
        self,
        score: Score,
        weights: Mapping[str, Weight],
        values: Mapping[str, Tensor],
        summaries: Mapping[str, Summary],
    ) -> None:
        self._score, self._weights, self._values, self._summaries = score, weights, values, summaries

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        if name not in self._weights or (self._score.needs and name not in self._summaries):
            return value  # embeddings are not multiplied with anything: magnitudes compare their rows
        return self._score.elements(self._weights[name], value, self._summaries.get(name, {}))

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _by_function(function: ScoreFunction, pattern: Pattern, umg: UMG) -> UMG:
    found = function(umg)
    if isinstance(found, Mapping):
        for weight in umg.eligible:
            scores = found.get(weight.name)
            if not isinstance(scores, Tensor) or tuple(scores.shape) != weight.shape:
                shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise PatternError(
                    f"score must return scores of shape {list(weight.shape)} for {weight.name!r}, not {shape}"
                )
        return replace(umg, scores={**umg.values, **found})
    if pattern.ranks != "units":
        raise PatternError(
            f"the pattern {pattern.name!r} ranks {pattern.ranks}: score must return a mapping from weight names to "
            f"scores of elements, not {type(found).__name__}"
        )
    return replace(umg, unit_scores=unit_tensor(found, umg.coupling.n_units))


def unit_tensor(found: object, n_units: int, what: str = "score") -> Float64[Tensor, " units"]:
    """A user's scores of units, checked.

    Raises:
        PatternError: It is not one finite number for each unit.
    """
    if not isinstance(found, Tensor) or tuple(found.shape) != (n_units,):
        shape = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise PatternError(f"{what} must return a tensor of shape {[n_units]}, one score a unit, not {shape}")
    scores = found.detach().cpu().to(torch.float64)
    if not bool(torch.isfinite(scores).all()):
        raise PatternError(f"{what} returned scores that are not finite")
    return scores
