"""Which network to run now: the widest that holds the latency goal. Pure: it is told the time and asks nobody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Controller", "Policy", "Rung"]


@dataclass(frozen=True)
class Rung:
    """A network on the ladder.

    Attributes:
        name: Its name.
        seconds: That it takes for one example when nothing else goes on.
    """

    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When to go to another network.

    A *load* is the share of the time that a network would be busy at the rate at which examples arrive.

    Attributes:
        goal: Seconds from a request's arrival to its answer.
        high: Share of the goal above which the estimate calls for a narrower network.
        low: Share of the goal below which it lets a wider one be tried.
        full: Load above which a network is left for a narrower one.
        fit: Load up to which a network is taken. Between ``fit`` and ``full`` nothing changes.
        hurry: Seconds that a network runs at least before a narrower one is taken.
        dwell: Seconds for which all must have spoken for a wider one before it is taken.
        most_dwell: A network's ``dwell`` doubles, up to this, each time it had to be left again within ``trial``.
        trial: Seconds after which a network has proven itself, and its ``dwell`` is as at first.
        latency_memory: Time constant in seconds of the latency's exponential average.
        rate_memory: That of the rate of arrival.
        cost_memory: After how many seconds what was seen of a network that no longer runs fades.
    """

    goal: float
    high: float = 0.5
    low: float = 0.3
    full: float = 0.85
    fit: float = 0.65
    hurry: float = 0.25
    dwell: float = 3.0
    most_dwell: float = 60.0
    trial: float = 10.0
    latency_memory: float = 0.5
    rate_memory: float = 1.0
    cost_memory: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what would flap or never move."""
        wrong = [f"{name}={value}" for name, value in vars(self).items() if not 0 < value < math.inf]
        if wrong:
            raise ValueError(f"a policy is made of numbers above 0, not {', '.join(wrong)}")
        if not (self.low < self.high <= 1 and self.fit < self.full <= 1):
            raise ValueError("a policy needs low < high <= 1 and fit < full <= 1: the gaps keep it from flapping")


class Controller:
    """Chooses among networks from the widest to the narrowest.

    Narrower at once, and as far as needed: when the smoothed latency nears the goal, or when examples arrive faster
    than the network can take. Wider one step at a time, only after a while in which the latency was low and the wider
    network would have had time to spare.

    It must be told of every arrival and every end, and asked regularly (:meth:`decide`), by one thread, with times of
    one clock in seconds.

    Attributes:
        policy: When it moves.
        rungs: The networks.
        estimate: Seconds: the smoothed latency, waiting included.
        switches: How often it moved.
    """

    SEEN = 0.1
    """How much one run counts in a network's cost."""

    def __init__(self, rungs: Sequence[Rung], policy: Policy, now: float = 0.0) -> None:
        if not rungs or not all(0 < r.seconds < math.inf for r in rungs):
            raise ValueError("a controller needs at least one network, and how long each takes")
        if len({r.name for r in rungs}) < len(rungs):
            raise ValueError(f"networks have the same name: {', '.join(r.name for r in rungs)}")
        self.policy = policy
        self.rungs = tuple(rungs)
        self.estimate = 0.0
        self.switches = 0
        self._at = 0
        self._place = {r.name: i for i, r in enumerate(rungs)}
        self._seen = [(r.seconds, now) for r in rungs]
        self._rate, self._size = 0.0, 1.0  # examples a second when the last request came, and in a request
        self._slowest = 0.0  # of what has ended since the last decision
        self._changed = self._decided = self._arrived = now
        self._calm_since: float | None = None
        self._dwell = [policy.dwell] * len(rungs)
        self._on_trial = False

    @property
    def active(self) -> str:
        """Name of the network to run."""
        return self.rungs[self._at].name

    def arrived(self, now: float, examples: int = 1) -> None:
        """A request came, be it let in or not."""
        self._rate = self.rate(now) + examples / self.policy.rate_memory
        self._arrived = now
        self._size += self.SEEN * (examples - self._size)

    def finished(self, now: float, name: str, examples: int, *, latency: float, ran: float) -> None:
        """A request was answered.

        Args:
            now: The time.
            name: The network that ran.
            examples: How many it ran on.
            latency: Seconds since the request came.
            ran: Seconds of these that the network took.
        """
        if now - latency >= self._changed:  # what came before waited for another network
            self._slowest = max(self._slowest, latency)
        k = self._place[name]
        cost = self._cost(k, now)
        self._seen[k] = (cost + self.SEEN * (ran / examples - cost), now)

    def decide(self, now: float, waiting: int) -> str:
        """The network to run from now on.

        Args:
            now: The time.
            waiting: Examples that were let in and not answered yet.
        """
        p = self.policy
        newest = max(self._slowest, (waiting + self._size) * self._cost(self._at, now))
        self._slowest = 0.0
        self.estimate += (newest - self.estimate) * -math.expm1((self._decided - now) / p.latency_memory)
        self._decided = now
        if self._on_trial and now - self._changed >= p.trial:
            self._on_trial, self._dwell[self._at] = False, p.dwell
        if self._must_narrow(now):
            self._go(self._narrow_enough(now, waiting), now, waiting)
        elif self._may_widen(now):
            self._go(self._at - 1, now, waiting)
        return self.active

    def rate(self, now: float) -> float:
        """Examples a second that arrive, smoothed."""
        return self._rate * math.exp((self._arrived - now) / self.policy.rate_memory)

    def load(self, name: str, now: float) -> float:
        """Share of the time that a network would be busy at the present rate."""
        return self._load(self._place[name], now)

    def _must_narrow(self, now: float) -> bool:
        if self._at == len(self.rungs) - 1 or now - self._changed < self.policy.hurry:
            return False
        late = self.estimate > self.policy.high * self.policy.goal
        return late or self._load(self._at, now) > self.policy.full

    def _narrow_enough(self, now: float, waiting: int) -> int:
        """The widest of the narrower networks that takes the rate, and what waits in time."""
        p = self.policy
        for k in range(self._at + 1, len(self.rungs) - 1):
            if self._load(k, now) <= p.fit and waiting * self._cost(k, now) <= p.high * p.goal:
                return k
        return len(self.rungs) - 1

    def _may_widen(self, now: float) -> bool:
        """Whether all has spoken for the next wider network for long enough."""
        p, k = self.policy, self._at - 1
        if k < 0 or not (
            self.estimate <= p.low * p.goal
            and (load := self._load(k, now)) <= p.fit
            and self._size * self._cost(k, now) / (1 - load) <= p.high * p.goal
        ):
            self._calm_since = None
            return False
        if self._calm_since is None:
            self._calm_since = now
        return now - self._calm_since >= self._dwell[k]

    def _go(self, k: int, now: float, waiting: int) -> None:
        p = self.policy
        if k > self._at and self._on_trial:
            self._dwell[self._at] = min(2 * self._dwell[self._at], p.most_dwell)
        self._on_trial = k < self._at
        self._at, self._changed, self._calm_since = k, now, None
        self.estimate = (waiting + self._size) * self._cost(k, now)
        self.switches += 1

    def _load(self, k: int, now: float) -> float:
        return self.rate(now) * self._cost(k, now)

    def _cost(self, k: int, now: float) -> float:
        """Seconds that one example takes: as seen lately, else as measured at first."""
        first, (seen, at) = self.rungs[k].seconds, self._seen[k]
        return first + (seen - first) * math.exp((at - now) / self.policy.cost_memory)
