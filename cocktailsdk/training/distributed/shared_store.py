"""A run's state in the main process's hands: it alone reads and writes, the others are told."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...utils.fsdp import full_tensor, is_sharded
from ..state.store import Check, Store
from .ranks import Ranks

__all__ = ["SharedStore"]


class SharedStore:
    """A store of several processes, which need no file system in common.

    Errors of reading and writing are raised in all.

    Args:
        ranks: The processes.
        make: Makes the store; called in the main process alone.
        sharded: Whether tensors may be sharded; whole ones are gathered then, one at a time, and only the main process
            keeps them.
    """

    def __init__(self, ranks: Ranks, make: Callable[[], Store], *, sharded: bool = False) -> None:
        self._ranks = ranks
        self._sharded = sharded
        self._store: Store | None = None

        def opened() -> None:
            self._store = make()

        ranks.from_main(opened)

    @property
    def _main(self) -> Store:
        assert self._store is not None
        return self._store

    @property
    def standing(self) -> str:
        """What the main process says of the last state."""
        return "" if self._store is None else self._store.standing

    @contextmanager
    def held(self) -> Iterator[SharedStore]:
        """Keep other runs from training there meanwhile."""
        with ExitStack() as stack:

            def hold() -> None:
                stack.enter_context(self._main.held())

            self._ranks.from_main(hold)
            yield self

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""
        content = self._gathered(tensors) if self._sharded else tensors
        self._ranks.from_main(lambda: self._main.put(name, content))

    def get(self, name: str) -> dict[str, Tensor]:
        """What was put there, on the CPU."""
        found: dict[str, Tensor] = {}

        def read() -> list[str]:
            found.update(self._main.get(name))
            return list(found)

        return {n: self._ranks.tensor(found.get(n)) for n in self._ranks.from_main(read)}

    def save(self, state: Callable[[], Mapping[str, Any]], needed: Callable[[str], bool]) -> Path | None:
        """Write the run's state, the main process's."""
        if self._sharded:
            content = self._gathered(state())
            return self._ranks.from_main(lambda: self._main.save(lambda: content, needed))
        return self._ranks.from_main(lambda: self._main.save(state, needed))

    def _gathered(self, value: Any) -> Any:
        if is_sharded(value):
            full = full_tensor(value)
            return full.cpu() if self._ranks.is_main else full.new_empty(0)
        if isinstance(value, Mapping):
            return {key: self._gathered(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._gathered(part) for part in value)
        return value

    def load(self, check: Check | None = None) -> dict[str, Any] | None:
        """The newest state that is whole and of this run, or ``None``."""
        state: dict[str, Any] | None = None

        def read() -> bool:
            nonlocal state
            state = self._main.load(check)
            return state is not None

        if not self._ranks.from_main(read):
            return None
        if state is None:
            data = self._ranks.tensor(None).numpy()
            return torch.load(io.BytesIO(data.data), map_location="cpu", weights_only=True)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._ranks.tensor(torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8))
        return state
