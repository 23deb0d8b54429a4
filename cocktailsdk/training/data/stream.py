"""The training loader as one long stream: a pass over it goes on in the next epoch, wherever epochs and rounds end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ...errors import TrainingError
from .batches import draw_groups
from .loader_state import generator_states, set_epoch, set_generator_states

__all__ = ["Stream"]

Place = tuple[int, int, int]
"""Where in a run something is: its round, epoch, and step of the epoch."""
Guard = Callable[[Iterable[Any]], Iterator[Any]]


class Stream:
    """Batches for one optimizer step after the other, pass after pass over a loader, repeatable from any point.

    Every batch of the loader is drawn before any is drawn again, also where an epoch has fewer steps than the loader
    has batches. A pass is seeded by the place in the run at which it began.

    Args:
        loader: As the user gave it: its generators and samplers are set.
        shared: What this process draws of it.
        seed: The run's.
        size: Batches of a step; the last step of a pass may get fewer.
        length: Batches of a pass; ``None`` where the loader cannot say.

    Attributes:
        generators: States of the loader's own generators when the pass began, or when the last one ended.
        begun: Where in the run the pass began; ``None`` between two passes.
        drawn: Steps that the pass has given batches to.
        passes: How many passes have begun.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        shared: Iterable[Any],
        seed: int,
        *,
        size: int,
        length: int | None,
        generators: Mapping[str, Any],
    ) -> None:
        self.generators = generators
        self.begun: Place | None = None
        self.drawn = self.passes = 0
        self._loader, self._shared, self._seed = loader, shared, seed
        self._size, self._length = size, length
        self._open: Iterator[list[Any]] | None = None

    def draw(self, place: Place, guard: Guard) -> tuple[list[Any], int]:
        """The batches of the next step, and the index of the first in its pass.

        Args:
            place: Where the run is: a pass that begins here is seeded by it.
            guard: Surrounds the pass, to stop or to say which batch failed.

        Raises:
            TrainingError: A whole pass over the loader gave no batch.
        """
        for _ in range(2):  # a loader without a length may turn out to be at its end
            if self.begun is None:
                self._begin(place)
            if self._open is None:
                self._open = self._drawing(guard)
            if (group := next(self._open, None)) is not None:
                first = self.drawn * self._size
                self.drawn += 1
                if self._length is not None and self.drawn * self._size >= self._length:
                    self._end()
                return group, first
            self._end()
        raise TrainingError("train_loader gave no batches in a whole pass: it must be iterable again and again")

    def close(self) -> None:
        """Let go of the loader, so that others can iterate over it; the pass is found again by drawing it anew."""
        if self._open is not None:
            self._open.close()  # type: ignore[attr-defined]
            self._open = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, without the generators' states."""
        return {"begun": None if self.begun is None else list(self.begun), "drawn": self.drawn, "passes": self.passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be where another stream was."""
        self.close()
        self.begun = None if state["begun"] is None else tuple(state["begun"])
        self.drawn, self.passes = state["drawn"], state["passes"]

    def _begin(self, place: Place) -> None:
        self.begun, self.drawn = place, 0
        self.passes += 1

    def _end(self) -> None:
        self.close()
        self.generators = generator_states(self._loader)
        self.begun, self.drawn = None, 0

    def _drawing(self, guard: Guard) -> Iterator[list[Any]]:
        """The pass that has begun, from where it was left."""
        assert self.begun is not None
        round_, epoch, step = self.begun
        set_generator_states(self._loader, self.generators)
        set_epoch(self._loader, self.passes - 1)
        key: tuple[int | str, ...] = (self._seed, "epoch", round_, epoch)
        if step:  # not the epoch's first pass
            key = (*key, "from step", step)
        groups = guard(draw_groups(self._shared, key, self._length, self._size))
        for _ in range(self.drawn):
            if next(groups, None) is None:
                break
        return groups
