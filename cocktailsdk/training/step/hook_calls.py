"""A run's hooks: its own copies, their states, and the calls of one step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .hooks import StepContext, StepHook

__all__ = ["HookCalls", "StepHooks"]


@dataclass(frozen=True)
class HookCalls:
    """The hooks of one step, called by the engine."""

    hooks: Sequence[StepHook]
    context: StepContext

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of all hooks."""
        for hook in self.hooks:
            getattr(hook, method)(self.context, *arguments)


class StepHooks:
    """A run's own copies of a recipe's hooks.

    Args:
        schedule: The step schedule of the rounds.
        finishing_schedule: That of finishing.
        hooks: Those that the recipe names.
    """

    def __init__(self, schedule: Any, finishing_schedule: Any, hooks: Sequence[StepHook]) -> None:
        self._schedules = [
            copy.deepcopy(s) if isinstance(s, StepHook) else None for s in (schedule, finishing_schedule)
        ]
        self._others = tuple(copy.deepcopy(hook) for hook in hooks)

    @property
    def _all(self) -> list[StepHook]:
        return [*filter(None, self._schedules), *self._others]

    def of(self, *, scheduled: bool, finishing: bool) -> tuple[StepHook, ...]:
        """The hooks of a step.

        Args:
            scheduled: Whether a schedule chose it.
            finishing: Whether that was the schedule of finishing.
        """
        own = self._schedules[finishing] if scheduled else None
        return self._others if own is None else (own, *self._others)

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of all."""
        return [hook.state_dict() for hook in self._all]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """The inverse of :meth:`state_dict`."""
        for hook, state in zip(self._all, states, strict=True):
            hook.load_state_dict(state)

    def __len__(self) -> int:
        return len(self._all)
