"""Bundles by their names on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..io.folders import locate
from .files import FILES

__all__ = ["first_line", "folder_of"]


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _is_here(folder: Path) -> bool:
    """Whether a folder is here, though another process may be replacing it."""
    # Asked twice: the writer's rename may come between the two looks of the first locate().
    return locate(folder).exists() or locate(folder).exists()


def folder_of(path: str | os.PathLike[str], **options: Any) -> Path:
    """The folder that a path is, or the local copy of what a name on the hub stands for.

    Args:
        path: A path, or ``"user/name"`` where no such path exists.
        **options: Of the hub's ``snapshot_download``: ``revision``, ``token``, ``cache_dir``, …

    Raises:
        BundleError: The hub cannot be reached, or has nothing of that name, and neither has the local cache.
    """
    folder = Path(path).expanduser()
    if not isinstance(path, str) or _is_here(folder) or not _NAME.fullmatch(path):
        return folder
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    here = f"no folder {path!r} is here, and"
    try:
        return Path(snapshot_download(path, allow_patterns=list(FILES), **options))
    except RepositoryNotFoundError as e:
        raise BundleError(
            f"{here} the Hugging Face hub has no {path!r} that you may read: correct the path or name"
        ) from e
    except LocalEntryNotFoundError as e:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the Hugging Face hub cannot be reached"
        if options.get("local_files_only"):
            why = "local_files_only was asked for"
        raise BundleError(
            f"{here} no copy of the hub's {path!r} is in the local cache, and {why}: correct the path, or load "
            "it once with internet access"
        ) from e
    except Exception as e:  # the client raises its own errors, its HTTP library's and the system's
        raise BundleError(
            f"{here} {path!r} could not be had from the Hugging Face hub ({type(e).__name__}: {first_line(e)})"
        ) from e


def first_line(error: Exception) -> str:
    """Of what an error says."""
    return next(iter(str(error).strip().splitlines()), "no message")
