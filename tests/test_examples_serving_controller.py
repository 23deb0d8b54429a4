"""The serving example: when its controller goes to another network. Time is told to it, and no clock is read."""

from __future__ import annotations

import pytest
import torch
from cocktail_serving.controller import Controller, Policy, Rung
from cocktail_serving.networks import Network, ladder

RUNGS = [Rung("dense", 0.016), Rung("half", 0.008), Rung("quarter", 0.004)]
POLICY = Policy(goal=0.1)


class Load:
    """A queue before one worker, simulated: what the controller is told is what a service would tell it."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.now, self.due, self.free = controller, 0.0, 0.0, 0.0
        self.queue: list[float] = []  # when those came that wait
        self.running: list[tuple[float, float, float, str]] = []  # came, began, ends, network
        self.latencies: list[tuple[float, float]] = []
        self.moves: list[tuple[float, str]] = []

    def run(self, seconds: float, rate: float, slower: float = 1.0) -> None:
        """Requests come at a rate; networks take longer than the controller was told."""
        cost = {r.name: slower * r.seconds for r in self.controller.rungs}
        ends, self.due = self.now + seconds, self.now
        while self.now < ends:
            self.now += 0.05
            while self.due <= self.now:
                self.controller.arrived(self.due)
                self.queue.append(self.due)
                self.due += 1 / rate
            while self.queue and (began := max(self.free, self.queue[0])) <= self.now:
                name = self.controller.active
                self.free = began + cost[name]
                self.running.append((self.queue.pop(0), began, self.free, name))
            while self.running and self.running[0][2] <= self.now:
                came, began, ended, name = self.running.pop(0)
                self.latencies.append((ended, ended - came))
                self.controller.finished(ended, name, 1, latency=ended - came, ran=ended - began)
            before = self.controller.active
            after = self.controller.decide(self.now, len(self.queue) + len(self.running))
            if after != before:
                self.moves.append((self.now, after))

    def worst(self, since: float) -> float:
        return max(latency for ended, latency in self.latencies if ended >= since)


def test_at_a_rate_that_the_widest_takes_nothing_moves() -> None:
    load = Load(Controller(RUNGS, POLICY))
    load.run(30, rate=30)  # a load of 0.48
    assert load.moves == []
    assert load.worst(0) <= POLICY.goal


def test_a_rate_that_the_widest_cannot_hold_is_held_by_a_narrower_one_and_then_the_widest_comes_back() -> None:
    load = Load(Controller(RUNGS, POLICY))
    load.run(5, rate=30)
    load.run(20, rate=75)  # 1.2 of what the widest takes
    assert [name for _, name in load.moves] == ["half"]
    assert load.moves[0][0] < 6
    load.run(20, rate=150)
    assert load.controller.active == "quarter"
    assert load.worst(27) <= POLICY.goal
    load.run(30, rate=20)
    assert [name for _, name in load.moves[-2:]] == ["half", "dense"]  # a step at a time
    assert load.moves[-1][0] - load.moves[-2][0] >= POLICY.dwell
    assert load.worst(0) <= 1.5 * POLICY.goal
    assert load.controller.switches == len(load.moves) == 4


def test_a_jump_goes_as_far_as_it_needs_at_once() -> None:
    load = Load(Controller(RUNGS, POLICY))
    load.run(5, rate=20)
    load.run(5, rate=220)
    assert load.moves[0][1] == "quarter"


@pytest.mark.parametrize("rate", [35, 40, 45, 50, 55, 70, 90, 110, 180])
def test_at_no_steady_rate_does_it_flap(rate: float) -> None:
    load = Load(Controller(RUNGS, POLICY))
    load.run(120, rate=rate)
    assert len(load.moves) <= 2
    assert load.worst(3) <= POLICY.goal


def test_a_machine_that_is_slower_than_measured_is_noticed_and_tries_become_rarer() -> None:
    policy = Policy(goal=0.3, cost_memory=2.0)  # what was seen of the widest is soon forgotten
    load = Load(Controller(RUNGS, policy))
    load.run(300, rate=38, slower=2.5)  # it seems to be busy for 0.6 of the time, and would be for 1.5
    tries = [at for at, name in load.moves if name == "dense"]
    assert len(tries) >= 2
    assert load.controller.active != "dense"
    assert len(tries) <= 8
    within = [latency <= policy.goal for _, latency in load.latencies]
    assert sum(within) >= 0.97 * len(within)


def test_a_network_too_slow_for_the_goal_is_not_tried_however_little_comes() -> None:
    controller = Controller([Rung("slow", 0.2), Rung("fast", 0.01)], POLICY)
    load = Load(controller)
    load.run(60, rate=1)
    assert [name for _, name in load.moves] == ["fast"]


def test_without_requests_the_widest_comes_back() -> None:
    load = Load(Controller(RUNGS, POLICY))
    load.run(5, rate=200)
    assert load.controller.active == "quarter"
    now = load.now
    for i in range(400):
        load.controller.decide(now + 0.05 * i, 0)
    assert load.controller.active == "dense"
    assert load.controller.rate(now + 20) == pytest.approx(0, abs=1e-3)


def test_a_queue_that_does_not_move_counts_as_latency() -> None:
    controller = Controller(RUNGS, POLICY)
    for i in range(20):
        controller.decide(0.05 * i, 50)  # nothing ends, so nothing is told of latency
    assert controller.estimate > POLICY.goal / 2
    assert controller.active == "quarter"


@pytest.mark.parametrize(
    "options",
    [{"goal": 0}, {"goal": float("nan")}, {"goal": 1, "low": 0.6}, {"goal": 1, "fit": 0.9}, {"goal": 1, "full": 2}],
)
def test_a_policy_that_would_flap_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="policy"):
        Policy(**options)


def test_networks_that_are_no_faster_or_no_better_than_others_are_left_out() -> None:
    def network(name: str, ms: float, accuracy: float | None) -> Network:
        return Network(name, torch.nn.Identity(), ms / 1e3, accuracy)

    rows = [
        network("dense", 10, 0.90),
        network("as slow", 9.5, 0.99),
        network("worse than the next", 7, 0.80),
        network("good", 5, 0.85),
        network("noise", 4.9, 0.84),
        network("small", 2, 0.70),
    ]
    assert [n.name for n in ladder(rows)] == ["dense", "good", "small"]
    assert [n.name for n in ladder(network(n.name, 1e3 * n.seconds, None) for n in rows)] == [
        "dense",
        "worse than the next",
        "good",
        "small",
    ]
