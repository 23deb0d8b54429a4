"""Merging the rounds, and what comes after: statistics and metrics of every network."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from ...patterns.base import DENSE
from ...utils.batchnorm import statistics_of
from ...utils.fsdp import like, local
from ..checkpoints import save, save_if_due, save_if_late
from ..evaluation import compare_dense, displayed, measure, recalibrate
from ..events import AlphaChosen, MergeProgress, MergeStarted, NetworkFinished
from ..left_out import check_trained
from ..need import warn_if_improving
from ..session import Session, load_tensors, model_tensors
from ..user_code import emit, guarded_batches
from .alpha_search import Choice, interpolate
from .candidates import Candidates, hardest_first, regrouped
from .layerwise import refine

__all__ = ["finish", "merge_rounds"]

log = logging.getLogger(__name__)


def merge_rounds(session: Session) -> None:
    """Merge the weights of all rounds into the model, one round after the other (paper, section 3.3).

    Starts from round 1's weights; what was chosen before an interruption is not searched again.
    """
    if session.position.phase != "merge":
        return
    options, history = session.options, session.history
    check_trained(history.rounds, scaled=session.scaled, standing=session.store.standing)
    session.modes.apply()
    if options.merges:
        shares = len(set(options.settings.rounds.alphas))
        total = sum(shares * len(session.names(k)) for k in range(2, options.rounds + 1))
        emit(session, MergeStarted(options.rounds, total))
        merged = _round(session, 1)
        _arrange(session, merged)
        done = 0
        for k in range(2, options.rounds + 1):
            other = _round(session, k)
            if len(history.alphas) < k - 1:
                choice, layers = _search(session, merged, other, k, done, total)
                history.alphas.append(choice.alpha)
                history.shares.append(layers)
                history.merged.append(displayed(session, choice.value))
                # at α = 1 the next round's candidate is this one: its networks are judged already
                session.merging.scores = {(1.0, cell): score for cell, score in choice.scores.items()}
            alpha = history.alphas[k - 2]
            merged = interpolate(merged, other, alpha, history.shares[k - 2])
            done += shares * len(session.names(k))
            log.info("merged round %d with alpha %g: mean metric %.4f", k, alpha, history.merged[k - 2])
            save_if_due(session)
            emit(session, AlphaChosen(k, alpha, history.merged[k - 2]))
    else:
        merged = _round(session, options.rounds)
    load_tensors(session.net.model, merged)
    session.merging.scores = {}
    if options.finishing_epochs:
        session.position.phase, session.position.round = "finishing", options.finishing_round
    else:
        session.position.phase = "finish" if options.recipe.refit_head == "none" else "refit"
    save(session)


def _round(session: Session, k: int) -> dict[str, Tensor]:
    parameters = dict(session.net.model.named_parameters())
    stored = session.store.get(f"round-{k:02d}")
    return {n: local(like(parameters[n], t) if n in parameters else t).to(session.device) for n, t in stored.items()}


def _arrange(session: Session, merged: Mapping[str, Tensor]) -> None:
    """Choose in which order held-out examples are judged, or take the order of the run that is resumed."""
    if session.options.rounds < 2 or not session.names(1):
        return
    held_out, merging = session.data.held_out, session.merging
    if not merging.score_count:
        load_tensors(session.net.model, merged)
        merging.order, merging.score_count = hardest_first(session, session.names(1))
    elif held_out is not None and held_out.cached is None:
        for _ in guarded_batches(session, held_out, "val_loader"):  # the first pass fills the cache
            pass
    if merging.order is not None and held_out is not None and held_out.cached is not None:
        merging.batches = regrouped(held_out.cached, merging.order) or held_out.cached


def _search(
    session: Session, merged: Mapping[str, Tensor], other: Mapping[str, Tensor], k: int, done: int, total: int
) -> tuple[Choice, dict[str, float]]:
    names, history = session.names(k), session.history
    candidates = Candidates(session, merged, other, names)
    alphas = session.options.settings.rounds.alphas
    shares = len(set(alphas))

    def report(alpha: float, judged: int) -> None:
        if session.timing.event_due():
            emit(session, MergeProgress(k, alpha, done + judged, total))
        save_if_late(session)

    def judged(alpha: float, settled: int) -> None:
        report(alpha, settled * len(names) // len(candidates.cells))

    choice = candidates.choose(alphas, judged)
    points = [{"alpha": t.alpha, "metric" if t.whole else "bound": displayed(session, t.value)} for t in choice.tried]
    layers, choice = refine(candidates, choice, lambda alpha, settled: report(alpha, shares * len(names)))
    history.curves.append({"round": k, "points": points})
    in_all = (shares + len(candidates.proposed)) * len(names)
    history.reused += len(session.names(k - 1)) if k > 2 and 1.0 in alphas else 0
    history.to_judge += in_all
    history.to_judge_batches += in_all * len(session.merging.batches or ())
    return choice, layers


def finish(session: Session) -> None:
    """Give every network its own statistics and its held-out metric; those that have them already keep them."""
    net, position = session.net, session.position
    check_trained(session.history.rounds, scaled=session.scaled, standing=session.store.standing)
    session.modes.apply()
    names = [DENSE, *session.names(session.options.rounds)]
    own, tracked = session.history.weights, _tracked(session)
    if position.step == 0:
        net.statistics.clear()
        net.statistics.update(tracked)  # whole, should this be interrupted
        net.metrics.clear()
    for i, name in enumerate(names[position.step :], position.step):
        with session.weights_of(name):
            if name not in tracked:
                recalibrate(session, name)
            if session.data.held_out is not None:
                net.metrics[name] = displayed(session, measure(session, name).value)
        position.step = i + 1
        emit(session, NetworkFinished(name, net.metrics.get(name), i + 1, len(names)))
        save_if_late(session)
    if own:
        dense = session.store.get(own[DENSE]) if DENSE in own else model_tensors(net.model)
        load_tensors(net.model, {**dense, **net.statistics[DENSE]})
        log.warning(
            "recipe %r trains networks one at a time: the net holds the dense network's weights, and %d others have "
            "their own (CoTrainer.using(name))",
            session.options.recipe.name,
            len(own.keys() - {DENSE}),
        )
    compare_dense(session)
    warn_if_improving(session)
    position.phase, position.step = "done", 0
    save(session)


def _tracked(session: Session) -> dict[str, dict[str, Tensor]]:
    """Statistics that networks have already: of a last round in which all trained, or measured with their heads."""
    options = session.options
    if options.recipe.refit_head != "none":
        return dict(session.net.statistics)
    together = options.finishing_epochs or options.recipe.rounds == "one"
    if options.recipe.statistics != "separate" or not together:
        return {}
    return {DENSE: statistics_of(session.net.model), **session.net.statistics}
