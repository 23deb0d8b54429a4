"""A fence around the code of other libraries while it builds a model from a bundle's record.

The tables already keep every record from leading anywhere. The fence is the second lock: it stops what a release of
a library does that nobody has read. Python's audit events are the one hook below all libraries, and the fence acts on
the thread that builds alone. Offline flags of libraries are left alone: they are global, and would break the downloads
of other threads.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from ..errors import AdapterError
from .kinds import shown

__all__ = ["fenced"]

_REFUSED = frozenset(
    (
        *("pickle.find_class", "builtins.input", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"),
        *("os.spawn", "os.startfile", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"),
    )
)
_REFUSED_FAMILIES = ("socket.", "subprocess.", "urllib.", "pty.", "webbrowser.", "http.client.", "shutil.")
_HARMLESS = ("socket.gethostname",)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CODE = (".py", ".pyc", ".pyi", ".so", ".pyd", ".dylib", ".dll")


class _State(threading.local):
    """What this thread was stopped from doing; ``None`` outside the fence."""

    stopped: list[str] | None = None


_STATE = _State()


@contextmanager
def fenced() -> Iterator[None]:
    """Inside, this thread opens no socket, unpickles no class, starts no process, and asks nothing at the terminal.

    It writes no files, and reads only those of Python's installation.

    Raises:
        AdapterError: Something was stopped, even if a library caught the error.
    """
    _install()
    outer = _STATE.stopped
    stopped: list[str] = []
    _STATE.stopped = stopped
    try:
        yield
    finally:
        _STATE.stopped = outer
    if stopped:
        raise AdapterError(f"building the model was stopped: it tried {stopped[0]}")


@cache
def _install() -> None:
    """Audit hooks cannot be removed, so there is one for the process, which does nothing outside of a fence."""
    sys.addaudithook(_watch)


def _watch(event: str, args: tuple[Any, ...]) -> None:
    stopped = _STATE.stopped
    if stopped is None:
        return
    refusal = _refused(event, args)
    if refusal is not None:
        stopped.append(refusal)
        # No OSError: libraries catch those, and try again after a while.
        raise AdapterError(f"a build record may not lead to {refusal}")


def _refused(event: str, args: tuple[Any, ...]) -> str | None:
    if event == "open":
        return _refused_file(*args)
    if event in _HARMLESS:
        return None
    return event if event in _REFUSED or event.startswith(_REFUSED_FAMILIES) else None


def _refused_file(path: Any, mode: Any, flags: Any) -> str | None:
    del mode  # the flags say the same
    if type(path) is int:  # a descriptor that is open already
        return None
    name = os.path.abspath(os.fsdecode(path))
    if type(flags) is int and flags & _WRITING:
        # Python keeps the byte code of modules that are imported late.
        cached = os.path.basename(os.path.dirname(name)) == "__pycache__" and ".pyc." in name
        return None if cached or name == os.devnull else f"writing {shown(name)}"
    if name.endswith(_CODE) or name.startswith(_installation()):
        return None
    return f"reading {shown(name)}"


@cache
def _installation() -> tuple[str, ...]:
    """Folders of Python and of the installed packages."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folders = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, here}
    modules = ("torch", "timm", "torchvision", "transformers", "huggingface_hub")
    homes = [getattr(sys.modules.get(m), "__file__", None) for m in modules]
    folders |= {os.path.dirname(os.path.dirname(home)) for home in homes if home}
    # Where Python reads what the machine has: numbers of processors, time zones.
    system = ("/proc/", "/sys/", "/dev/null", "/etc/localtime", "/usr/share/zoneinfo/")
    return (*(os.path.join(os.path.abspath(f), "") for f in folders if f), *system)
