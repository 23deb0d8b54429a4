"""Which share each round's weights get: the full search's choice, at less than its cost."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_tiny import assert_identical, tiny_images, tiny_net, tiny_trainer, to_float

import cocktailsdk as cocktail
from cocktailsdk.presets.datasets import TensorLoader
from cocktailsdk.training import events as ev
from cocktailsdk.training.merge import candidates, merging
from cocktailsdk.training.merge.alpha_search import Choice, choose_alpha, interpolate
from cocktailsdk.training.merge.candidates import Candidates, doubling, regrouped
from cocktailsdk.training.merge.layerwise import descended
from cocktailsdk.training.metrics import Score
from cocktailsdk.training.recipes import recipe_named
from cocktailsdk.training.session import model_tensors
from cocktailsdk.training.settings import ALPHAS

NAMES = ["a", "b", "c", "d"]

tables = st.lists(
    st.lists(st.integers(0, 6), min_size=len(NAMES), max_size=len(NAMES)),
    min_size=len(ALPHAS),
    max_size=len(ALPHAS),
)


@given(tables, st.booleans())
def test_the_choice_is_that_of_the_full_search(table: list[list[int]], bounded: bool) -> None:
    scores = {(a, n): Fraction(table[i][j], 6) for i, a in enumerate(ALPHAS) for j, n in enumerate(NAMES)}
    calls: list[tuple[float, str]] = []

    def judge(alpha: float, name: str) -> Score:
        calls.append((alpha, name))
        return Score(scores[alpha, name], Fraction(1) if bounded else None)

    choice = choose_alpha(ALPHAS, NAMES, judge)
    means = {a: sum(scores[a, n] for n in NAMES) / len(NAMES) for a in ALPHAS}
    best = max(means.values())
    assert choice.value == best
    assert choice.alpha == max(a for a in ALPHAS if means[a] == best)
    assert {n: s.value for n, s in choice.scores.items()} == {n: scores[choice.alpha, n] for n in NAMES}
    assert len(set(calls)) == len(calls)
    assert [t.alpha for t in choice.tried] == sorted(ALPHAS, reverse=True)
    for t in choice.tried:  # what is kept of the shares for people's curves
        assert means[t.alpha] == t.value if t.whole else means[t.alpha] <= t.value <= best
    if not bounded:
        assert all(t.whole for t in choice.tried)
        assert len(calls) == len(ALPHAS) * len(NAMES)


PARTS = [1, 2, 3]
CELLS = [(name, part) for part in range(3) for name in NAMES[:3]]
parted = st.lists(
    st.lists(st.integers(0, 6), min_size=len(CELLS), max_size=len(CELLS)), min_size=len(ALPHAS), max_size=len(ALPHAS)
)


@given(parted)
def test_in_parts_too_the_choice_is_that_of_the_full_search(table: list[list[int]]) -> None:
    """A network's metric is the sum of its hits in parts of 1, 2 and 3 of 6 examples."""
    hits = {(a, c): min(table[i][j], PARTS[c[1]]) for i, a in enumerate(ALPHAS) for j, c in enumerate(CELLS)}
    calls: list[tuple[float, tuple[str, int]]] = []

    def judge(alpha: float, cell: tuple[str, int]) -> Score:
        calls.append((alpha, cell))
        return Score(Fraction(hits[alpha, cell], 6), Fraction(PARTS[cell[1]], 6))

    choice = choose_alpha(ALPHAS, CELLS, judge, order=lambda latest: sorted(latest, reverse=True), networks=3)
    means = {a: Fraction(sum(hits[a, c] for c in CELLS), 18) for a in ALPHAS}
    best = max(means.values())
    assert (choice.alpha, choice.value) == (max(a for a in ALPHAS if means[a] == best), best)
    assert len(set(calls)) == len(calls)


def test_a_whole_search_by_parts_chooses_what_a_full_one_does_and_judges_less() -> None:
    def searched(batch_size: int, full: bool, monkeypatch: pytest.MonkeyPatch) -> cocktail.CoTrainer:
        with monkeypatch.context() as patch:
            if full:
                patch.setattr(candidates, "choose_alpha", exhaustively)
                patch.setattr(merging, "_arrange", lambda session, merged: None)
            held_out = TensorLoader(tiny_images(160, seed=1), batch_size, to_float)
            options = {"alphas": ALPHAS, "epochs": 3, "val_loader": held_out, "seed": 2}
            trainer = tiny_trainer(**options)
            trainer.fit()
        return trainer

    def exhaustively(alphas: Any, cells: Any, judge: Any, known: Any, judged: Any, **_: Any) -> Choice:
        assert all(part == 0 for _, part in cells)
        table = {a: {c: judge(a, c) for c in cells} for a in sorted(alphas, reverse=True)}
        means = {a: sum(s.value for s in row.values()) / len(cells) for a, row in table.items()}
        alpha = max(means, key=lambda a: (means[a], a))
        return Choice(alpha, means[alpha], table[alpha])

    with pytest.MonkeyPatch.context() as monkeypatch:
        whole = searched(16, True, monkeypatch)
        assert whole.history.to_judge == len(ALPHAS) * (5 + 7)
        for batch_size in (160, 16):
            quick = searched(batch_size, False, monkeypatch).history
            assert (quick.alphas, quick.merged) == (whole.history.alphas, whole.history.merged)
            for curve, alpha, value in zip(quick.curves, quick.alphas, quick.merged, strict=True):
                found = {p["alpha"]: p.get("metric") for p in curve["points"]}
                assert (list(found), found[alpha]) == (list(ALPHAS), value)
            assert quick.to_judge == whole.history.to_judge > quick.judged
            assert quick.reused == 5
            assert quick.reused + quick.judged <= quick.to_judge
            assert quick.to_judge_batches == quick.to_judge * 160 // batch_size
            assert quick.judged_batches <= quick.judged * 160 // batch_size


@pytest.mark.parametrize("merging", ["layerwise", "gradient"])
def test_shares_by_layer_are_never_worse_than_one_share_for_all(merging: Any) -> None:
    recipe = dataclasses.replace(recipe_named("paper"), merging=merging)
    refined = tiny_trainer(recipe=recipe, rounds=3, epochs=3, seed=4)
    refined.fit()
    history = refined.history
    plain = tiny_trainer(epochs=3, seed=4)
    plain.fit()
    assert history.alphas[0] == plain.history.alphas[0]
    assert history.merged[0] >= plain.history.merged[0]
    assert (history.merged[0] > plain.history.merged[0]) is bool(history.shares[0])
    for shares in filter(None, history.shares):
        assert set(shares) == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "fc"}
        assert all(0 <= share <= 1 for share in shares.values())
    assert plain.history.shares == [{}, {}]


def test_the_gradient_of_the_loss_along_the_shares_leads_away_from_noise() -> None:
    """Where another round's layer is noise, its share falls."""
    net = tiny_net()
    trainer = tiny_trainer(net, recipe="paper-no-merging", epochs=8)
    trainer.fit()
    session = trainer._done
    assert session is not None
    merged = {n: t.clone() for n, t in model_tensors(net.model).items()}
    noisy = {**merged, "conv2.weight": torch.randn_like(merged["conv2.weight"])}
    shares = descended(Candidates(session, merged, noisy, ["unstructured@0.3", "channel@0.2"]), 0.5)
    assert shares["conv2"] > 0.8
    assert shares["fc"] == 0.5  # the same in both
    assert_identical(
        {n: t.clone() for n, t in model_tensors(net.model).items() if "running" in n},
        {n: t for n, t in merged.items() if "running" in n},
    )


def test_batches_are_regrouped_where_their_tensors_are_alike() -> None:
    batches = [
        (torch.arange(4).reshape(2, 2), {"y": torch.tensor([0, 1])}),
        (torch.tensor([[9, 9]]), {"y": torch.tensor([2])}),
    ]
    new = regrouped(batches, torch.tensor([2, 0, 1]))
    assert new is not None
    assert [b[1]["y"].tolist() for b in new] == [[2, 0], [1]]
    assert [b[0].tolist() for b in new] == [[[9, 9], [0, 1]], [[2, 3]]]
    assert regrouped([(torch.zeros(2, 3),), (torch.zeros(2, 4),)], torch.arange(4)) is None  # padded to their longest
    assert regrouped([(torch.zeros(2, 3), "a")], torch.arange(2)) is None
    assert regrouped([(torch.zeros(2, 3), torch.zeros(3))], torch.arange(2)) is None
    assert [len(r) for r in doubling(11)] == [1, 1, 2, 4, 3]


def test_hopeless_shares_are_given_up_early() -> None:
    calls = 0

    def judge(alpha: float, name: str) -> Score:
        nonlocal calls
        calls += 1
        return Score(Fraction(95 if alpha == 1 else 50, 100), Fraction(1))

    assert choose_alpha(ALPHAS, NAMES, judge).alpha == 1
    assert calls == len(NAMES) + len(ALPHAS) - 1


def test_what_was_judged_before_is_not_judged_again() -> None:
    known: dict[tuple[float, str], Score] = {}
    asked: list[tuple[float, str]] = []

    def judge(alpha: float, name: str) -> Score:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append((alpha, name))
        return Score(Fraction(1, 2))

    with pytest.raises(KeyboardInterrupt):
        choose_alpha(ALPHAS, NAMES, judge, known)
    assert len(known) == 7
    first = list(asked)
    asked.clear()
    choice = choose_alpha(ALPHAS[:2], NAMES, judge, known)
    assert choice.alpha == 1.0
    assert not set(first) & set(asked)


def test_interpolation_is_linear_and_exact_at_one() -> None:
    a = {"w": torch.randn(50), "n": torch.tensor(3), "h": torch.randn(5).half()}
    b = {"w": torch.randn(50), "n": torch.tensor(8), "h": torch.randn(5).half()}
    for alpha in ALPHAS:
        out = interpolate(a, b, alpha)
        torch.testing.assert_close(out["w"], alpha * a["w"] + (1 - alpha) * b["w"])
        assert out["n"] == 3
        assert out["h"].dtype == torch.float16
    assert all(torch.equal(v, a[k]) for k, v in interpolate(a, b, 1.0).items())


class Wreck(torch.optim.SGD):
    """Trains nothing: fills the weights with noise."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.normal_()


@pytest.mark.parametrize("wrecked", [1, 2])
def test_a_round_that_only_hurts_is_rejected(wrecked: int) -> None:
    """Share 1 where round 2's weights are noise, the smallest where round 1's are."""
    made = 0

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        nonlocal made
        made += 1  # the first is made when the run is described, then one in each round
        kind = Wreck if made == wrecked + 2 else torch.optim.SGD
        return kind(parameters, lr=0.1, momentum=0.9)

    weights = []

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundEnded):
            weights.append({n: p.detach().clone() for n, p in trainer.net.model.named_parameters()})

    trainer = tiny_trainer(optimizer=optimizer, epochs=6, rounds=3, alphas=(1.0, 0.5, 0.05), callbacks=[keep], seed=1)
    # three levels in three rounds; the third round takes part as any other
    trainer.fit()
    assert trainer.history.alphas[0] == (1.0 if wrecked == 2 else 0.05)


def test_the_merged_weights_are_those_of_the_chosen_shares() -> None:
    weights: list[dict[str, torch.Tensor]] = []

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundEnded) and event.round > 0:
            weights.append({n: p.detach().clone() for n, p in trainer.net.model.named_parameters()})

    trainer = tiny_trainer(callbacks=[keep], alphas=(0.7, 0.4))
    trainer.fit()
    merged = weights[0]
    for alpha, other in zip(trainer.history.alphas, weights[1:], strict=True):
        assert alpha in (0.7, 0.4)
        merged = {n: alpha * merged[n] + (1 - alpha) * other[n] for n in merged}
    for name, parameter in trainer.net.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), merged[name])


def test_without_merging_the_last_round_is_the_result() -> None:
    last: dict[str, torch.Tensor] = {}

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundEnded):
            last.update({n: p.detach().clone() for n, p in trainer.net.model.named_parameters()})

    trainer = tiny_trainer(callbacks=[keep], merge=False)
    trainer.fit()
    assert trainer.history.alphas == []
    for name, parameter in trainer.net.model.named_parameters():
        assert torch.equal(parameter, last[name])
