"""The files of a bundle: checked bytes in, whole folders out. Nothing here loads torch before it reads tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import BundleError
from ..io import open_regular, usual_mode
from ..io.atomic import fsync
from ..io.folders import Replaced, locate, new_folder, read_consistently
from ..io.limits import MAX_JSON_BYTES, MAX_PIECES, MAX_SUBNETS, MAX_TENSORS
from ..io.values import distinct, integer, items, keyed, label, parse, quoted, text

if TYPE_CHECKING:
    from torch import Tensor

    from ..io.tensors import TensorFile

FORMAT = "cocktail-bundle"
VERSION = 2
VERSION_PRIVATE = 3
"""Of bundles with private tensors: a release that does not know these must refuse them."""
JSON_FILE = "bundle.json"
WEIGHTS_FILE = "weights.safetensors"
SUBNETS_FILE = "subnets.safetensors"
FILES = (JSON_FILE, WEIGHTS_FILE, SUBNETS_FILE)

PIECE = 256 << 10  # bytes, of files with at most MAX_PIECES of them
_READ = (1, 2, 3)
_PREFIX = re.compile(rb'\{"checksum":"([0-9a-f]{64})",')
_SUM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class OpenBundle:
    """The three files of one bundle, open: they stay the same if another bundle is put in its place.

    Attributes:
        folder: Where it lies.
        files: By name.
    """

    folder: Path
    files: Mapping[str, BinaryIO]

    def file(self, name: str) -> BinaryIO:
        """One of them.

        Raises:
            BundleError: It is missing.
        """
        if name not in self.files:
            raise BundleError(f"{self.folder / name} is missing; copy the bundle again")
        return self.files[name]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return os.fstat(self.file(name).fileno()).st_size


class _Incomplete(FileNotFoundError):
    """A folder lacks files, unless it was replaced while they were opened."""

    def __init__(self, bundle: OpenBundle) -> None:
        super().__init__()
        self.bundle = bundle


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[OpenBundle]:
    """Open a bundle, the old one or the new one where another process replaces it meanwhile.

    Raises:
        BundleError: There is none, or one of its files is no file.
    """
    with ExitStack() as stack:

        def look(folder: Path, handle: int | None) -> OpenBundle:
            stack.close()  # what was opened of a folder that was replaced
            files = {}
            for name in FILES:
                try:
                    file = open_regular(name if handle is not None else folder / name, handle)
                except FileNotFoundError:
                    continue
                files[name] = stack.enter_context(file)
            bundle = OpenBundle(folder, files)
            if len(files) < len(FILES):
                raise _Incomplete(bundle)
            return bundle

        yield _looked(Path(path).expanduser(), look)


def is_bundle(path: Path) -> bool:
    """Whether a folder holds a bundle, whole or damaged."""

    def look(folder: Path, handle: int | None) -> bool:
        os.stat(JSON_FILE if handle is not None else folder / JSON_FILE, dir_fd=handle)
        return True

    try:
        return read_consistently(path, look)
    except OSError:
        return False


def _looked(path: Path, look: Callable[[Path, int | None], OpenBundle]) -> OpenBundle:
    try:
        return read_consistently(path, look)
    except _Incomplete as e:
        if JSON_FILE in e.bundle.files:
            return e.bundle  # which file is missing is said once it is known to be a bundle
        raise BundleError(f"{e.bundle.folder} is no bundle: it has no {JSON_FILE}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path} is no bundle: it has no {JSON_FILE}") from None
    except Replaced as e:
        raise BundleError(f"{e}; read it when nobody writes it") from None
    except OSError as e:
        raise BundleError(f"{path / Path(str(e.filename)).name} cannot be read: {e.strerror}") from None


def bundle_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a bundle's three files together."""
    with opened(path) as bundle:
        return sum(bundle.size(name) for name in FILES)


def write_folder(
    path: str | os.PathLike[str], meta: Mapping[str, Any], weights: Mapping[str, Tensor], subnets: Mapping[str, Tensor]
) -> None:
    """Write a bundle's folder as a whole or not at all.

    It is made beside and exchanged with a bundle that was there; other files in its folder stay.

    Raises:
        BundleError: The path holds something that is no bundle, or the bundle is larger than one that is read.
    """
    from safetensors.torch import save_file  # late: reading a bundle's JSON needs no torch

    version = VERSION_PRIVATE if "private" in meta else VERSION
    target = Path(path).expanduser().resolve()
    _check_target(locate(target))
    with new_folder(target) as made:
        files = {}
        for name, tensors in ((WEIGHTS_FILE, weights), (SUBNETS_FILE, subnets)):
            with usual_mode(made / name):
                save_file(dict(tensors), made / name)
            fsync(made / name)
            files[name] = _sums(made / name)
        raw = _to_json({"format": FORMAT, "format_version": version, "files": files, **meta})
        if len(raw) > MAX_JSON_BYTES:
            raise BundleError(f"{target / JSON_FILE} would have {len(raw)} bytes; {MAX_JSON_BYTES} are read at most")
        try:
            parse(raw)
        except ValueError as e:
            raise BundleError(f"{target / JSON_FILE} could not be read again: {e}; say less in net.provenance") from e
        (made / JSON_FILE).write_bytes(raw)
        fsync(made / JSON_FILE)


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file; a bundle is a folder: choose another path")
    if (target / JSON_FILE).is_file() or not any(target.iterdir()):
        return
    content = ", ".join(sorted(p.name for p in target.iterdir())[:5])
    raise BundleError(f"{target} holds other things ({content}) and no bundle; choose a new or an empty folder")


def read_meta(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """A bundle's folder and its ``bundle.json``, checked. Of its other files only the sizes are.

    Raises:
        BundleError: No bundle, another format or version, or a file that is not as it was written.
    """
    with opened(path) as bundle:
        return bundle.folder, meta_of(bundle)


def meta_of(bundle: OpenBundle) -> dict[str, Any]:
    """What ``bundle.json`` says, checked; see :func:`read_meta`."""
    file = bundle.folder / JSON_FILE
    if bundle.size(JSON_FILE) > MAX_JSON_BYTES:
        raise BundleError(f"{file} has {bundle.size(JSON_FILE)} bytes; {MAX_JSON_BYTES} are read at most")
    raw = bundle.files[JSON_FILE].read(MAX_JSON_BYTES + 1)
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
            f"{', '.join(map(str, _READ[:-1]))} and {_READ[-1]}: load it with a release that reads it"
        )
    begin = _PREFIX.match(raw)
    if not begin or begin[1].decode() != hashlib.sha256(raw[begin.end() :]).hexdigest():
        raise BundleError(f"{file} was changed after it was written: its checksum does not fit; copy the bundle again")
    files = keyed(meta.get("files"), "the list of its files", (WEIGHTS_FILE, SUBNETS_FILE))
    for name, said in files.items():
        _check_size(bundle.folder / name, bundle.size(name), said, version)
    return meta


def _check_size(file: Path, size: int, said: Any, version: int) -> None:
    keyed(said, f"what it says of {file.name}", ("bytes", "sha256"), ("piece",) if version > 1 else ())
    should = integer(said["bytes"], f"the bytes of {file.name}")
    if size != should:
        what = "truncated" if size < should else "damaged"
        raise BundleError(f"{file} is {what}: it has {size} bytes, and had {should} when written")


def open_tensors(bundle: OpenBundle, meta: Mapping[str, Any], name: str, most: int = MAX_TENSORS) -> TensorFile:
    """A safetensors file of a bundle, mapped; each piece of it is checked when it is first read.

    Args:
        bundle: The bundle, open.
        meta: What :func:`meta_of` gave.
        name: The file.
        most: How many tensors it may hold.

    Raises:
        BundleError: It cannot be read.
    """
    from ..io.tensors import TensorFile

    said = meta["files"][name]
    if meta["format_version"] == 1:  # one checksum for all of a file
        piece, sums = max(1, said["bytes"]), [said["sha256"]]
    else:
        # pieces grow with the file; a huge one would be hashed whole for the sake of its header
        largest = max(PIECE, 2 * (-(-said["bytes"] // MAX_PIECES)))
        piece = integer(said.get("piece"), f"the pieces of {name}", 1, largest)
        sums = items(said["sha256"], f"the checksums of {name}", -(-said["bytes"] // piece))
    if len(sums) > MAX_PIECES:
        raise BundleError(f"the bundle has {len(sums)} checksums for {name}; at most {MAX_PIECES} are read")
    if not all(_SUM.fullmatch(text(s, f"a checksum of {name}")) for s in sums):
        raise BundleError(f"the bundle has a checksum of {name} that is none")
    return TensorFile(bundle.folder / name, bundle.file(name), piece, sums, min(most, MAX_TENSORS))


def listed_subnets(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The subnetworks as ``bundle.json`` lists them: name, pattern and sparsity, and options and metric if any.

    Raises:
        BundleError: There are too many, two of one name, or a value that makes no sense.
    """
    listed = items(meta.get("subnets"), "its subnets")
    if len(listed) > MAX_SUBNETS:
        raise BundleError(f"the bundle lists {len(listed)} subnets; at most {MAX_SUBNETS} are read")
    for row in listed:
        entry = keyed(row, "a subnet", ("name", "pattern", "sparsity"), ("options", "metric"))
        text(entry["name"], "a subnet")
        text(entry["pattern"], "the pattern of a subnet")
        if type(entry["sparsity"]) not in (int, float) or not 0 <= entry["sparsity"] <= 1:
            raise BundleError(f"the bundle gives {quoted(entry['sparsity'])} for a sparsity, not a number in [0, 1]")
        options = entry.get("options", {})
        keyed(options, "the options of a subnet", (), options if type(options) is dict else ())
        _check_metric(entry.get("metric", 0.0))
    distinct([row["name"] for row in listed], "its subnets")
    return listed


def model_class(meta: Mapping[str, Any]) -> str:
    """The name of the model's class, for people.

    Raises:
        BundleError: There is none.
    """
    said = keyed(meta.get("model"), "what it says of the model", ("class", "fingerprint", "tensors"))
    return label(said["class"], "the model's class")


def _check_metric(value: Any) -> None:
    finite = type(value) is float and math.isfinite(value)
    finite |= type(value) is int and abs(value) < 2**1023  # as a float it is finite, too
    if not finite and (type(value) is not str or value not in ("nan", "inf", "-inf")):
        raise BundleError(f"the bundle gives {quoted(value)} for a metric")


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
