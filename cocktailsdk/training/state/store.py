"""A run's state on disk: written so that a crash at any moment loses at most what came after the last save.

The folder holds::

    configuration.json                     what was trained, readable; another configuration is refused
    state-000007.pt                        the run as it stood; the last two are kept
    rewind-4d2c….safetensors               the rewind point, written once
    round-03-91ab….safetensors             the weights that a round ended with, written once
    masks-03-07fe….safetensors             the masks made in a round, written once
    lock                                   empty; held by the process that trains

Every file is written beside its place, flushed to the disk and renamed. A state begins with the checksum of what
follows, and names the other files that it needs with theirs. Those carry the beginning of their checksum in their
names, so that what a state needs is never written over, and are removed once neither of the last two states names them.
Nothing is unpickled: states are read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ...errors import TrainingError
from ...io import open_regular
from ...io.atomic import HashingWriter, Written, remove_stale, sha256_of, write_atomic, write_json
from ...io.tensors import READ_ERRORS, read_tensors, write_tensors
from ...printable import printable
from ..recipes import recipes
from .compatibility import Foreign
from .configuration import CONFIGURATION, differences, stored_configuration
from .locking import locked

__all__ = ["Check", "FolderStore", "MemoryStore", "Store"]

log = logging.getLogger(__name__)

MAGIC = b"cocktail-state-2 "
OLD_MAGIC = b"cocktail-state-1 "
"""Of release 0.1.0, whose files had no checksum in their names."""
KEEP = 2
Check = Callable[[dict[str, Any], Mapping[str, bool], Callable[[str], Mapping[str, Tensor]]], None]
"""Sees that a state is one of the run: see :meth:`FolderStore.load`."""
_OURS = re.compile(r"(rewind|round-\d+|masks-\d+|weights-[^/\\\0\n]+?)(-[0-9a-f]{12})?\.safetensors")
"""Names of a run's files, none of which leaves the folder."""


class MemoryStore:
    """What a run keeps of its rounds, without a folder: it cannot be resumed."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}

    @property
    def standing(self) -> str:
        """What is said of the last state."""
        return "Without out_dir there is no state to go back to."

    @contextlib.contextmanager
    def held(self) -> Iterator[MemoryStore]:
        """Nobody else can write here."""
        yield self

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""
        self._tensors[name] = {k: v.detach().cpu().clone() for k, v in tensors.items()}

    def items(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """All that was put there, by name."""
        yield from self._tensors.items()

    def get(self, name: str) -> dict[str, Tensor]:
        """What was put there."""
        return dict(self._tensors[name])

    def save(self, state: Callable[[], Mapping[str, Any]], needed: Callable[[str], bool]) -> Path | None:
        """Nowhere to save to."""
        return None

    def load(self, check: Check | None = None) -> dict[str, Any] | None:
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
        self._files: dict[str, dict[str, Any]] = {}  # by name: file, sha256, bytes
        self._kept: list[set[str]] = []  # files that each of the last states names
        self._number = 0
        self._readable = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"{folder} cannot be made for the run's state ({error}): choose another out_dir"
            ) from error
        now = json.loads(json.dumps(configuration))
        if then := stored_configuration(folder):
            if lines := differences(then, now):
                raise TrainingError(
                    f"{folder} holds the state of a run with another configuration ({'; '.join(lines[:8])}"
                    f"{'; …' if len(lines) > 8 else ''}): {_other_recipe(then, now)}{_other_stream(lines)}train "
                    "into another folder, or remove it to start anew"
                )
        else:
            write_json(folder / CONFIGURATION, now, sort_keys=True)

    @property
    def standing(self) -> str:
        """What is said of the last state."""
        if not self._number:
            return f"No state was saved in {self.folder} yet."
        return f"The last good state, {self._state(self._number)}, stands: the same call goes on from it."

    @contextlib.contextmanager
    def held(self) -> Iterator[FolderStore]:
        """Keep other processes from training here meanwhile, and remove what a killed one left half-written.

        Raises:
            TrainingError: Where another one does.
        """
        with locked(self.folder / "lock"):
            for path in remove_stale(self.folder):
                log.info("removed %s, which a process left half-written", path)
            yield self

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors once, as ``NAME-CHECKSUM.safetensors``.

        Raises:
            TrainingError: Where the disk fails.
        """
        written = write_tensors(
            self.folder / f"{name}.safetensors",
            tensors,
            name=lambda checksum: f"{name}-{checksum[:12]}.safetensors",
            advice=self.standing,
        )
        self._files[name] = _entry(written)

    def get(self, name: str) -> dict[str, Tensor]:
        """Read tensors that the last saved or loaded state knows of.

        Raises:
            TrainingError: Where the file is gone or is not what was written.
        """
        if why := self._wrong(self._files.get(name, {"file": f"{name}.safetensors"})):
            raise TrainingError(f"{why}: remove {self.folder} to start anew")
        path = self.folder / self._files[name]["file"]
        try:
            return read_tensors(path)
        except READ_ERRORS as error:
            raise TrainingError(f"{path} cannot be read ({error}): remove {self.folder} to start anew") from error

    def save(self, state: Callable[[], Mapping[str, Any]], needed: Callable[[str], bool]) -> Path:
        """Write the run's state, and remove all but the last two with the files that only older ones named.

        Args:
            state: Makes it. Tensors may be on any device; one at a time is copied to the CPU.
            needed: Whether the run still needs the file of a name.

        Raises:
            TrainingError: Where the disk fails, or the state holds what cannot be read without running code.
        """
        files = {name: {**entry, "needed": needed(name)} for name, entry in self._files.items()}
        content = {**state(), "files": files}

        def write(writer: HashingWriter) -> None:
            torch.save(content, cast(IO[bytes], writer))

        path = self._state(self._number + 1)
        check = None if self._readable else _check_readable
        write_atomic(path, write, header=_head, check=check, advice=self.standing)
        self._readable = True
        self._number += 1
        self._kept = [*self._kept, {entry["file"] for entry in files.values()}][-KEEP:]
        self._remove_old()
        return path

    def load(self, check: Check | None = None) -> dict[str, Any] | None:
        """The newest state that is whole and of this run, with all files that it needs; ``None`` where none was saved.

        Where the newest is damaged or of something else, a warning says so and the one before it is taken.

        Args:
            check: Raises :class:`~cocktailsdk.training.state.compatibility.Foreign` for a state that is not of this
                run. It is called with the state, the files that it names (and whether it needs them) and a function
                that reads the tensors in one of them.

        Raises:
            TrainingError: Where all that was saved is damaged, or of something else.
        """
        found: list[str] = []
        saved = self._saved()
        for number, path in reversed(saved):
            try:
                state, files = self._whole(path, check)
            except (_Damaged, Foreign) as error:
                why = printable(str(error))
                found.append(f"{path.name}: {why}")
                if number > saved[0][0]:
                    log.warning("%s cannot be gone on from (%s); going back to the state before it", path, why)
                continue
            self._number, self._files = number, files
            self._kept = [{entry["file"] for entry in files.values()}]
            return state
        if saved:
            raise TrainingError(
                f"no state in {self.folder} can be gone on from ({'; '.join(found)}): put back a copy of it, or "
                "remove it to start anew"
            )
        return None

    def _whole(self, path: Path, check: Check | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """A state and the files that it names.

        Raises:
            _Damaged: It, or a file that it needs, is not as it was written.
            Foreign: It is no state of this run.
        """
        state = _read(path)
        if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
            raise Foreign("it holds something else than a run's state")
        files = {name: _compatible(name, entry) for name, entry in state.pop("files").items()}
        for entry in files.values():
            if entry["needed"] and (why := self._wrong(entry)):
                raise _Damaged(why)
        if check is not None:
            needed = {name: bool(entry["needed"]) for name, entry in files.items()}
            check(state, needed, lambda name: _tensors(self.folder / files[name]["file"]))
        return state, files

    def _state(self, number: int) -> Path:
        return self.folder / f"state-{number:06d}.pt"

    def _saved(self) -> list[tuple[int, Path]]:
        found = ((re.fullmatch(r"state-(\d+)\.pt", path.name), path) for path in self.folder.glob("state-*.pt"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def _wrong(self, entry: Mapping[str, Any]) -> str | None:
        """What is wrong with a file that a state names, if anything."""
        path = self.folder / entry["file"]
        try:
            size = path.stat().st_size
            if size == entry.get("bytes", size) and sha256_of(path) == entry.get("sha256"):
                return None
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error})"
        return f"{path} is damaged (its checksum is wrong)"

    def _remove_old(self) -> None:
        old = [path for number, path in self._saved() if number <= self._number - KEEP]
        if len(self._kept) == KEEP or self._number == 1:  # otherwise what the state before names is not known yet
            named = set().union(*self._kept)
            ours = (path for path in self.folder.glob("*.safetensors") if _OURS.fullmatch(path.name))
            old += [path for path in ours if path.name not in named]
        for path in old:
            with contextlib.suppress(OSError):  # what stays is removed next time
                path.unlink()


Store = MemoryStore | FolderStore


class _Damaged(Exception):
    """A state is not as it was written."""


def _other_recipe(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What to type where a run had another recipe, which it may not have named: defaults change between releases."""
    found = [(of.get("training") or {}).get("recipe") for of in (then, now)]
    before, wanted = (recipe.get("name") if isinstance(recipe, Mapping) else None for recipe in found)
    if before == wanted or before not in recipes():
        return ""
    return f"the run was of recipe {before!r}, so give recipe={before!r} to resume it; or "


def _other_stream(lines: Sequence[str]) -> str:
    """What to type where a run of before narrowed a transformer's residual stream, which is not the default now."""
    changed = any("include_stream" in line for line in lines)
    return (
        "to resume a run that narrowed the residual stream, give Channel(include_stream=True); or " if changed else ""
    )


def _head(checksum: str) -> bytes:
    return MAGIC + checksum.encode() + b"\n"


def _entry(written: Written) -> dict[str, Any]:
    return {"file": written.path.name, "sha256": written.sha256, "bytes": written.bytes, "needed": True}


def _compatible(name: Any, entry: Any) -> dict[str, Any]:
    """What a state says of a file; release 0.1.0 named it by its checksum alone.

    Raises:
        Foreign: It makes no sense, or names a file that is no file of a run.
    """
    if isinstance(entry, str):
        entry = {"file": f"{name}.safetensors", "sha256": entry, "needed": True}
    kinds = {"file": str, "sha256": str, "needed": bool}
    if not isinstance(name, str) or not isinstance(entry, dict):
        raise Foreign("it names files in another way than a run's state")
    if any(type(entry.get(key)) is not kind for key, kind in kinds.items()) or not _OURS.fullmatch(entry["file"]):
        raise Foreign(f"it names {str(entry.get('file'))[:60]!r}, which is no file of a run")
    return dict(entry)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file. It is mapped into memory: of those that nobody looks at no byte is read.

    Raises:
        Foreign: It is no safetensors file.
    """
    try:
        return read_tensors(path)
    except READ_ERRORS as error:
        raise Foreign(f"{path} is no safetensors file ({error})") from error


def _read(path: Path) -> Any:
    """A state, in pieces as far as the checksum goes, its tensors on the CPU.

    Raises:
        _Damaged: It is not as it was written.
    """
    length = len(_head("0" * 64))
    try:
        with open_regular(path) as file:
            head = file.read(length)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
            if head not in (_head(checksum), _head(checksum).replace(MAGIC, OLD_MAGIC)):
                raise _Damaged("its checksum is wrong")
            file.seek(length)
            return torch.load(file, map_location="cpu", weights_only=True)
    except _Damaged:
        raise
    except Exception as error:  # of pickle, zip files and torch; the checksum is right, so somebody wrote it so
        said = " ".join(str(error).split())
        raise _Damaged(f"it cannot be read: {said[:300]}") from error


def _check_readable(path: Path) -> None:
    """See once in a run that what was written can be read again, and without running code."""
    try:
        _read(path)
    except Exception as error:
        raise TrainingError(
            "the run's state cannot be read again without running code, so it cannot be resumed: the optimizer, "
            "the schedule or a hook keeps something in its state_dict() that is neither a number, a text nor a tensor "
            f"({error})"
        ) from error
