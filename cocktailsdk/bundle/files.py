"""The files of a bundle: checked bytes in, whole folders out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "cocktail-bundle"
VERSION = 1
JSON_FILE = "bundle.json"
WEIGHTS_FILE = "weights.safetensors"
SUBNETS_FILE = "subnets.safetensors"

_MAX_JSON_BYTES = 256 << 20
_PREFIX = re.compile(rb'\{"checksum":"([0-9a-f]{64})",')


def bundle_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a bundle's three files together."""
    return sum((Path(path) / name).stat().st_size for name in (JSON_FILE, WEIGHTS_FILE, SUBNETS_FILE))


def write_folder(
    path: str | os.PathLike[str], meta: Mapping[str, Any], weights: Mapping[str, Tensor], subnets: Mapping[str, Tensor]
) -> None:
    """Write a bundle's folder as a whole or not at all.

    It is made beside and renamed. A bundle that was there is replaced; other files in its folder stay.

    Raises:
        BundleError: The path holds something that is no bundle.
    """
    from safetensors.torch import save_file  # late: reading a bundle's JSON needs no torch

    target = Path(path).expanduser().resolve()
    _check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        files = {}
        for name, tensors in ((WEIGHTS_FILE, weights), (SUBNETS_FILE, subnets)):
            save_file(dict(tensors), made / name)
            _sync(made / name)
            files[name] = {"bytes": (made / name).stat().st_size, "sha256": _sha256(made / name)}
        (made / JSON_FILE).write_bytes(_to_json({"format": FORMAT, "format_version": VERSION, "files": files, **meta}))
        _sync(made / JSON_FILE)
        mask = os.umask(0)  # mkdtemp makes folders for their owner alone
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        _replace(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file; a bundle is a folder: choose another path")
    if (target / JSON_FILE).is_file() or not any(target.iterdir()):
        return
    held = ", ".join(sorted(p.name for p in target.iterdir())[:5])
    raise BundleError(f"{target} holds other things ({held}) and no bundle; choose a new or an empty folder")


def _replace(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent)) / target.name
    target.rename(old)
    try:
        made.rename(target)
    except BaseException:
        old.rename(target)
        old.parent.rmdir()
        raise
    for entry in old.iterdir():
        if not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(old.parent, ignore_errors=True)


def read_meta(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """A bundle's folder and its ``bundle.json``, with every file's bytes checked.

    Raises:
        BundleError: No bundle, another format or version, or a file that is not as it was written.
    """
    folder = Path(path).expanduser()
    file = folder / JSON_FILE
    if not folder.is_dir() or not file.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {JSON_FILE}")
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise BundleError(f"{file} has {file.stat().st_size} bytes; none this large is ever written")
    raw = file.read_bytes()
    try:
        meta = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{file} is damaged: it is not JSON ({e}); copy the bundle again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise BundleError(f"{file} is not a bundle's: its format is {found!r}, not {FORMAT!r}")
    if meta.get("format_version") != VERSION:
        raise BundleError(
            f"{file} has format version {meta.get('format_version')!r}; this release of cocktailsdk reads {VERSION}"
        )
    begin = _PREFIX.match(raw)
    if not begin or begin[1].decode() != hashlib.sha256(raw[begin.end() :]).hexdigest():
        raise BundleError(f"{file} was changed after it was written: its checksum does not fit; copy the bundle again")
    for name in (WEIGHTS_FILE, SUBNETS_FILE):
        _check_file(folder / name, meta["files"][name])
    return folder, meta


def _check_file(file: Path, said: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise BundleError(f"{file} is missing; copy the bundle again")
    size = file.stat().st_size
    if size != said["bytes"]:
        what = "truncated" if size < said["bytes"] else "damaged"
        raise BundleError(f"{file} is {what}: it has {size} bytes, and had {said['bytes']} when written")
    if _sha256(file) != said["sha256"]:
        raise BundleError(f"{file} is damaged: its checksum does not fit; copy the bundle again")


def open_tensors(file: Path) -> Any:
    """A safetensors file, its bytes already checked, as a context manager.

    Raises:
        BundleError: It cannot be read all the same.
    """
    import safetensors

    try:
        return safetensors.safe_open(file, framework="pt")
    except Exception as e:  # the library's own error class derives from Exception alone
        raise BundleError(f"{file} cannot be read: {e}") from None


def _to_json(meta: Mapping[str, Any]) -> bytes:
    body = json.dumps(meta, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()[1:]
    return b'{"checksum":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(file: Path) -> None:
    with file.open("rb+") as f:
        os.fsync(f.fileno())
