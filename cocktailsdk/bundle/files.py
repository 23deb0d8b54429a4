"""The files of a bundle: checked bytes in, whole folders out."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError
from .limits import MAX_JSON_BYTES, MAX_PIECES
from .replacing import flush, found, new_folder
from .values import items, keyed, parse, quoted, text, whole

if TYPE_CHECKING:
    from torch import Tensor

    from .tensors import TensorFile

FORMAT = "cocktail-bundle"
VERSION = 2
JSON_FILE = "bundle.json"
WEIGHTS_FILE = "weights.safetensors"
SUBNETS_FILE = "subnets.safetensors"
FILES = (JSON_FILE, WEIGHTS_FILE, SUBNETS_FILE)

PIECE = 256 << 10  # bytes, of files with at most MAX_PIECES of them
_READ = (1, 2)
_PREFIX = re.compile(rb'\{"checksum":"([0-9a-f]{64})",')
_SUM = re.compile(r"[0-9a-f]{64}")


def bundle_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a bundle's three files together."""
    return sum((Path(path) / name).stat().st_size for name in FILES)


def write_folder(
    path: str | os.PathLike[str], meta: Mapping[str, Any], weights: Mapping[str, Tensor], subnets: Mapping[str, Tensor]
) -> None:
    """Write a bundle's folder as a whole or not at all.

    It is made beside and exchanged with a bundle that was there; other files in its folder stay.

    Raises:
        BundleError: The path holds something that is no bundle, or the bundle is larger than one that is read.
    """
    from safetensors.torch import save_file  # late: reading a bundle's JSON needs no torch

    target = Path(path).expanduser().resolve()
    _check_target(found(target))
    with new_folder(target) as made:
        files = {}
        for name, tensors in ((WEIGHTS_FILE, weights), (SUBNETS_FILE, subnets)):
            save_file(dict(tensors), made / name)
            flush(made / name)
            files[name] = _sums(made / name)
        raw = _to_json({"format": FORMAT, "format_version": VERSION, "files": files, **meta})
        if len(raw) > MAX_JSON_BYTES:
            raise BundleError(f"{target / JSON_FILE} would have {len(raw)} bytes; {MAX_JSON_BYTES} are read at most")
        (made / JSON_FILE).write_bytes(raw)
        flush(made / JSON_FILE)


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file; a bundle is a folder: choose another path")
    if (target / JSON_FILE).is_file() or not any(target.iterdir()):
        return
    held = ", ".join(sorted(p.name for p in target.iterdir())[:5])
    raise BundleError(f"{target} holds other things ({held}) and no bundle; choose a new or an empty folder")


def read_meta(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """A bundle's folder and its ``bundle.json``, checked. Of its other files only the sizes are.

    Raises:
        BundleError: No bundle, another format or version, or a file that is not as it was written.
    """
    folder = found(Path(path).expanduser())
    file = folder / JSON_FILE
    if not folder.is_dir() or not file.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {JSON_FILE}")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise BundleError(f"{file} has {file.stat().st_size} bytes; {MAX_JSON_BYTES} are read at most")
    raw = file.read_bytes()
    try:
        meta = parse(raw)
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{file} is damaged: it is not JSON ({e}); copy the bundle again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        said = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise BundleError(f"{file} is not a bundle's: its format is {quoted(said)}, not {FORMAT!r}")
    version = meta.get("format_version")
    if type(version) is not int or version not in _READ:
        raise BundleError(
            f"{file} has format version {quoted(version)}; this release of cocktailsdk reads "
            f"{' and '.join(map(str, _READ))}: load it with a release that reads it"
        )
    begin = _PREFIX.match(raw)
    if not begin or begin[1].decode() != hashlib.sha256(raw[begin.end() :]).hexdigest():
        raise BundleError(f"{file} was changed after it was written: its checksum does not fit; copy the bundle again")
    files = keyed(meta.get("files"), "the list of its files", (WEIGHTS_FILE, SUBNETS_FILE))
    for name, said in files.items():
        _check_size(folder / name, said, version)
    return folder, meta


def _check_size(file: Path, said: Any, version: int) -> None:
    keyed(said, f"what it says of {file.name}", ("bytes", "sha256"), ("piece",) if version > 1 else ())
    should = whole(said["bytes"], f"the bytes of {file.name}")
    if not file.is_file():
        raise BundleError(f"{file} is missing; copy the bundle again")
    size = file.stat().st_size
    if size != should:
        what = "truncated" if size < should else "damaged"
        raise BundleError(f"{file} is {what}: it has {size} bytes, and had {should} when written")


def open_tensors(folder: Path, meta: Mapping[str, Any], name: str) -> TensorFile:
    """A safetensors file of a bundle, mapped; each piece of it is checked when it is first read.

    Raises:
        BundleError: It cannot be read.
    """
    from .tensors import TensorFile

    said = meta["files"][name]
    if meta["format_version"] == 1:  # one checksum for all of a file
        piece, sums = max(1, said["bytes"]), [said["sha256"]]
    else:
        piece = whole(said.get("piece"), f"the pieces of {name}", 1)
        sums = items(said["sha256"], f"the checksums of {name}", -(-said["bytes"] // piece))
    if len(sums) > MAX_PIECES:
        raise BundleError(f"the bundle has {len(sums)} checksums for {name}; at most {MAX_PIECES} are read")
    if not all(_SUM.fullmatch(text(s, f"a checksum of {name}")) for s in sums):
        raise BundleError(f"the bundle has a checksum of {name} that is none")
    return TensorFile(folder / name, piece, sums)


def _to_json(meta: Mapping[str, Any]) -> bytes:
    body = json.dumps(meta, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()[1:]
    return b'{"checksum":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body


def _sums(file: Path) -> dict[str, Any]:
    size, piece = file.stat().st_size, PIECE
    while size > piece * MAX_PIECES:
        piece *= 2
    with file.open("rb") as f:
        sums = [hashlib.sha256(f.read(piece)).hexdigest() for _ in range(-(-size // piece))]
    return {"bytes": size, "piece": piece, "sha256": sums}
