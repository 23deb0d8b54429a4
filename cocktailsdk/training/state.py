"""A run's state on disk: written so that a crash at any moment loses at most what came after the last save.

The folder holds::

    configuration.json        what was trained, readable; another configuration is refused
    state-000007.pt           the run as it stood; the last two are kept
    rewind.safetensors        the rewind point, written once
    round-03.safetensors      the weights that a round ended with, written once
    masks-03.safetensors      the masks made in a round, written once

Every file is written beside its place, flushed to the disk and renamed. The rolling file begins with the checksum
of what follows, and names the checksums of all others. Nothing is unpickled: it is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import TrainingError

__all__ = ["FolderStore", "MemoryStore", "Store", "differences", "fingerprint", "stored_configuration", "write_atomic"]

log = logging.getLogger(__name__)

MAGIC = b"cocktail-state-1 "
KEEP = 2
CONFIGURATION = "configuration.json"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file such that after a crash there is either all of it or what was there before."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration of JSON values."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Where two configurations differ, as readable lines: ``epochs: 20, now 30``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for name in sorted({*old, *new}):
            lines += differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        return lines
    if old == new:
        return []
    return [f"{key}: {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def stored_configuration(folder: Path) -> dict[str, Any]:
    """The configuration of the run whose state a folder holds; empty where it holds none.

    Raises:
        TrainingError: Where the file is damaged.
    """
    path = folder / CONFIGURATION
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise TrainingError(
            f"{path} is no JSON ({error}): remove {folder} to start anew, or train into another folder"
        ) from error
    return stored if isinstance(stored, dict) else {}


class MemoryStore:
    """What a run keeps of its rounds, without a folder: it cannot be resumed."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""
        self._tensors[name] = {k: v.detach().cpu().clone() for k, v in tensors.items()}

    def get(self, name: str) -> dict[str, Tensor]:
        """What was put there."""
        return dict(self._tensors[name])

    def save(self, state: Mapping[str, Any]) -> Path | None:
        """Nowhere to save to."""
        del state
        return None

    def load(self) -> dict[str, Any] | None:
        """Nothing was saved."""
        return None


class FolderStore:
    """A run's state in a folder (see the module's text).

    Args:
        folder: Made where it does not exist.
        configuration: JSON values. What is found there must have been trained with the same.

    Raises:
        TrainingError: Where the folder holds the state of another configuration; names what differs.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any]) -> None:
        self.folder = folder
        self._sums: dict[str, str] = {}
        self._number = 0
        folder.mkdir(parents=True, exist_ok=True)
        now = json.loads(json.dumps(configuration))
        if then := stored_configuration(folder):
            if lines := differences(then, now):
                raise TrainingError(
                    f"{folder} holds the state of a run with another configuration ({'; '.join(lines[:8])}"
                    f"{'; …' if len(lines) > 8 else ''}): train into another folder, or remove it to start anew"
                )
        else:
            write_atomic(folder / CONFIGURATION, (json.dumps(now, indent=1, sort_keys=True) + "\n").encode())

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors once, as ``NAME.safetensors``."""
        data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
        self._sums[name] = hashlib.sha256(data).hexdigest()
        write_atomic(self._path(name), data)

    def get(self, name: str) -> dict[str, Tensor]:
        """Read tensors that the last saved or loaded state knows of.

        Raises:
            TrainingError: Where the file is gone or is not what was written.
        """
        path = self._path(name)
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != self._sums.get(name):
                raise TrainingError(f"{path} is damaged (its checksum is wrong): remove {self.folder} to start anew")
            return load(data)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path} cannot be read ({error}): remove {self.folder} to start anew") from error

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write the run's state, and remove all but the last two."""
        buffer = io.BytesIO()
        torch.save({**state, "files": dict(self._sums)}, buffer)
        data = buffer.getvalue()
        self._number += 1
        path = self.folder / f"state-{self._number:06d}.pt"
        write_atomic(path, MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
        for number, old in self._saved():
            if number <= self._number - KEEP:
                old.unlink(missing_ok=True)
        return path

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole, or ``None`` where none was saved.

        Raises:
            TrainingError: Where all that was saved is damaged.
        """
        saved = self._saved()
        for number, path in reversed(saved):
            state = _read(path)
            if state is None:
                log.warning("%s is damaged; going back to the state before it", path)
                continue
            self._number = number
            self._sums = dict(state.pop("files"))
            return state
        if saved:
            raise TrainingError(
                f"no state in {self.folder} can be read ({', '.join(p.name for _, p in saved)} are damaged): remove "
                "it to start anew"
            )
        return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _saved(self) -> list[tuple[int, Path]]:
        found = ((re.fullmatch(r"state-(\d+)\.pt", path.name), path) for path in self.folder.glob("state-*.pt"))
        return sorted((int(match[1]), path) for match, path in found if match)


Store = MemoryStore | FolderStore


def _read(path: Path) -> dict[str, Any] | None:
    head, _, data = path.read_bytes().partition(b"\n")
    if head != MAGIC + hashlib.sha256(data).hexdigest().encode():
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state
