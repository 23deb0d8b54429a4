"""Mutated bundles by the ten thousand: each must be refused with a BundleError, or hold exactly what its files say.

    python benchmarks/bundle_fuzz.py --cases 101000
    python benchmarks/bundle_fuzz.py --case 31415        one of them again, with its traceback

Some mutations leave the checksums as they were, most mend them, so that the checks behind them are reached: bytes,
lengths, JSON values, keys, shapes, dtypes and offsets, tensors of another bundle, files that are missing or empty; and
well-formed files that lie: masks that are not those of their patterns, levels of other sparsities, sizes, couplings,
statistics, private tensors, example inputs and build records.

What counts as a failure: any other exception, a crash, more than so much time of the processor or so much memory (the
process may take no more address space), a model changed by a bundle that was refused, and a bundle that was accepted
but whose networks differ from those that examples/read_bundle.py, which shares no code with the package, finds in the
same files, whose masks do not have exactly the counts that their patterns ask for, or that cannot be switched, counted,
saved and loaded again.

The cases are numbered and depend on nothing else; those done are kept in a file, and the next call goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import BundleError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from read_bundle import Bundle, cut  # noqa: E402

JSON, WEIGHTS, SUBNETS = "bundle.json", "weights.safetensors", "subnets.safetensors"
FILES = (JSON, WEIGHTS, SUBNETS)
SECONDS = 20  # of the processor, for one case; a sound bundle takes some hundredths
MEMORY = 1 << 30  # more than before, for all a case does; a sound bundle takes less than a megabyte
CHUNK = 500
Mutate = Callable[[random.Random, dict[str, bytes]], bool]


class Small(nn.Module):
    """Convolutions, norms and a residual branch, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 8, 1)
        self.back = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 3)
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.first(x)))
        x = torch.relu(self.bn2(self.conv(x)))
        x = x + self.back(torch.relu(self.inner(x)))
        return self.fc(x.mean((2, 3)))


SEEDS: tuple[tuple[list[str | cocktail.Pattern], dict[str, Any]], ...] = (
    ([cocktail.Unstructured(rounds=3), "2:4", "1:2", cocktail.Channel(rounds=3, round_to=1)], {}),
    (["block2x2@0.5", "transposable1:2", "depth@1", "channel@0.5+1:2"], {}),
    ([cocktail.Channel([0.3, 0.5], round_to=1), "unstructured@0.5"], {"dtype": "float16"}),
    (["2:4", "channel@0.5", "unstructured@0.5"], {}),
)
PRIVATE = 3  # the seed whose subnetworks have private tensors


def small(seed: int) -> Small:
    """The model with norms that do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Small().eval()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data.uniform_(0.5, 2.0)
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2.0)
    return model


def seeds() -> list[dict[str, bytes]]:
    """Sound bundles of the model, as the bytes of their files."""
    out = []
    for i, (patterns, options) in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(i)
        net = cocktail.sparsify(small(i), patterns, example_inputs=(torch.zeros(2, 2, 5, 5),))
        for name in net.names[:: 1 + i]:
            net.recalibrate(name, [torch.randn(2, 2, 5, 5, generator=generator)])
            net.metrics[name] = 0.5 + i / 8
        for name in net.names[1:] if i == PRIVATE else ():
            shapes = {n: net.coupling.shapes[n] for n in ("fc.weight", "conv.weight", "bn2.bias")}
            net.set_private(name, {n: torch.randn(s, generator=generator) for n, s in shapes.items()})
        net.provenance["command"] = "python train.py"
        with tempfile.TemporaryDirectory() as beside:
            net.save_pretrained(Path(beside) / "bundle", **options)
            out.append({name: (Path(beside) / "bundle" / name).read_bytes() for name in FILES})
    return out


# Mutations: each changes some of a bundle's files, and says whether their checksums are to be mended.


def bytes_of_a_file(rng: random.Random, files: dict[str, bytes]) -> bool:
    """Flip, insert, delete, double, zero or cut."""
    name = rng.choice(FILES)
    data = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(len(data) or 1) if rng.random() < 0.6 else rng.randrange(min(len(data), 64) or 1)
        many = rng.choice((1, 1, 2, 7, 8, 64))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = rng.randbytes(many)
            case 2:
                del data[at : at + many]
            case 3:
                data[at:at] = data[at : at + many]
            case 4:
                data[at : at + many] = bytes(min(many, len(data) - at))
            case _:
                del data[at:]
    files[name] = bytes(data)
    return rng.random() < 0.5


def other_files(rng: random.Random, files: dict[str, bytes]) -> bool:
    """Missing, empty, or in each other's places."""
    name = rng.choice(FILES)
    match rng.randrange(3):
        case 0:
            del files[name]
        case 1:
            files[name] = b""
        case _:
            other = rng.choice(FILES)
            files[name], files[other] = files[other], files[name]
    return rng.random() < 0.7


def of_another_bundle(rng: random.Random, files: dict[str, bytes]) -> bool:
    """One file of another bundle."""
    name = rng.choice(FILES)
    files[name] = rng.choice(KNOWN)[name]
    return rng.random() < 0.8


def values_of_the_json(rng: random.Random, files: dict[str, bytes]) -> bool:
    """Values, keys and elements of bundle.json, one to three of them."""
    meta = json.loads(files[JSON])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change(rng, meta)
    files[JSON] = dumped(rng, meta)
    return True


def values_of_a_header(rng: random.Random, files: dict[str, bytes]) -> bool:
    """Names, dtypes, shapes and offsets of a safetensors file, or the length of its header."""
    name = rng.choice((WEIGHTS, SUBNETS))
    data = files[name]
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**62, 2**64 - 1))
        files[name] = length.to_bytes(8, "little") + data[8:]
        return True
    for _ in range(rng.choice((1, 1, 2))):
        match rng.randrange(4):
            case 0:  # two tensors exchange their places or their names
                a, b = rng.choice(list(header)), rng.choice(list(header))
                if isinstance(header[a], dict) and isinstance(header[b], dict):
                    header[a], header[b] = header[b], header[a]
            case 1:  # a shape of as many elements
                entry = header[rng.choice(list(header))]
                if isinstance(entry, dict) and isinstance(entry.get("shape"), list):
                    entry["shape"] = rng.choice((entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1]))
            case 2:  # a dtype of as many bytes
                entry = header[rng.choice(list(header))]
                if isinstance(entry, dict) and isinstance(entry.get("dtype"), str):
                    alike = {"F32": "I32", "F16": "BF16", "U8": "BOOL", "BOOL": "U8", "I64": "F64", "I16": "U16"}
                    entry["dtype"] = alike.get(entry["dtype"], "U8")
            case _:
                change(rng, header)
        if not isinstance(header, dict) or not header:
            break
    raw = dumped(rng, header)
    files[name] = len(raw).to_bytes(8, "little") + raw + body
    return True


def values_of_tensors(rng: random.Random, files: dict[str, bytes]) -> bool:
    """Bytes of tensors: other masks, statistics, weights, units."""
    name = rng.choice((SUBNETS, SUBNETS, WEIGHTS))
    data = bytearray(files[name])
    begin = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice((1, 1, 4, 32))):
        if begin < len(data):
            data[rng.randrange(begin, len(data))] = rng.choice((0, 1, 255, rng.randrange(256)))
    files[name] = bytes(data)
    return True


def masks_that_lie(rng: random.Random, files: dict[str, bytes]) -> bool:
    """One network's mask as no pattern makes it, written in the smallest form that holds it."""
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / "bundle"
        written(files, folder)
        net = cocktail.from_pretrained(folder, small(5))
        name = rng.choice(net.names[1:])
        elements = {k: v.clone() for k, v in net.masks[name].elements.items()}
        removed = None if (units := net.masks[name].removed) is None else units.clone()
        flat = [t.view(-1) for t in elements.values()] + ([] if removed is None else [removed])
        for _ in range(rng.choice((1, 1, 2, 8))):
            if flat:
                of = rng.choice(flat)
                at = rng.randrange(of.numel())
                of[at] = ~of[at]
                if rng.random() < 0.3:  # as many as before, elsewhere
                    other = rng.randrange(of.numel())
                    of[other] = ~of[other]
        if rng.random() < 0.2:
            elements, removed = rng.choice(
                (({}, removed), (elements, None), ({}, torch.zeros(net.coupling.n_units) > 0))
            )
        statistics, metrics = dict(net.statistics), dict(net.metrics)
        net.set_mask(name, cocktail.Mask(elements, removed))
        net.statistics.update(statistics)
        net.metrics.update(metrics)
        with unchecked():
            net.save_pretrained(folder)
        files.update({file: (folder / file).read_bytes() for file in FILES})
    return True


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Let bundles be written that the package would not write."""
    from cocktailsdk.bundle import write

    check: Any = write.check_masks
    write.check_masks = lambda *_: None
    try:
        yield
    finally:
        write.check_masks = check


def another_level(rng: random.Random, files: dict[str, bytes]) -> bool:
    """A level of a pattern as one of another sparsity, or an N:M as another, under its new name everywhere."""
    meta = json.loads(files[JSON])
    row = rng.choice(meta["subnets"][1:])
    old = row["name"]
    if row["pattern"] in ("n:m", "transposable"):
        new, pair = rng.choice((("3:4", [3, 4]), ("1:4", [1, 4]), ("2:3", [2, 3]), ("2:8", [2, 8])))
        new = new if row["pattern"] == "n:m" else row["pattern"] + new
        config = {"pairs": [pair if f"{n}:{m}" in old else [n, m] for n, m in config_of(meta, row)["pairs"]]}
        row["options"] |= {"n": pair[0], "m": pair[1]}
        row["sparsity"] = 1 - pair[0] / pair[1]
    elif row["pattern"] == "product":
        return True
    else:
        levels = [r["sparsity"] for r in meta["subnets"] if r["pattern"] == row["pattern"]]
        other = round(min(1.0, max(0.0, row["sparsity"] + rng.choice((-0.2, -0.01, 0.01, 0.2)))), 3)
        levels[levels.index(row["sparsity"])] = other
        given = config_of(meta, row)
        config = {k: v for k, v in given.items() if k not in ("rounds", "rate")} | {"sparsities": sorted(levels)}
        new, row["sparsity"] = f"{old.split('@')[0]}@{f'{other:.3f}'.rstrip('0').rstrip('.')}", other
    next(p for p in meta["patterns"] if p["name"] == row["pattern"])["config"] = config
    for entry in meta["masks"]:
        for key in ("runs", "zeroed"):
            if entry.get(key) == old:
                entry[key] = new
                if "n" in entry and rng.random() < 0.7:
                    entry |= {"n": row["options"]["n"], "m": row["options"]["m"]}
        if "levels" in entry:
            entry["levels"] = [new if n == old else n for n in entry["levels"]]
    for entry in (*meta["statistics"], *meta.get("private", [])):
        if entry["subnet"] == old:
            entry["subnet"] = new
    row["name"] = new
    files[JSON] = dumped(rng, meta)
    return True


def config_of(meta: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a subnetwork's pattern."""
    config: dict[str, Any] = next(p for p in meta["patterns"] if p["name"] == row["pattern"])["config"]
    return config


PARTS = ("coupling", "statistics", "example", "selection", "masks", "model", "files", "build", "patterns", "provenance")
OPTIONAL = ("private",)


def one_part(rng: random.Random, files: dict[str, bytes]) -> bool:
    """Values of one part of bundle.json, as likely in each."""
    meta = json.loads(files[JSON])
    part = rng.choice([*PARTS, *(3 * [p for p in OPTIONAL if p in meta])])
    if part == "build":  # read only where no model is given
        meta["build"] = {"adapter": "timm", "record": {"name": "resnet18"}, "dtype": "float32"}
    for _ in range(rng.choice((1, 1, 2))):
        change(rng, meta[part])
    if rng.random() < 0.1:
        meta["example"] = {
            "tuple": [{"tuple": [{"tensor": "float32", "shape": [0]}] * rng.choice((3, 20_000))}, {"dict": []}]
        }
    files[JSON] = dumped(rng, meta)
    return True


def numbers(rng: random.Random, files: dict[str, bytes]) -> bool:
    """Small changes to numbers of the coupling, masks, statistics and private tensors: axes, units, places, starts."""
    meta = json.loads(files[JSON])
    parts = ("coupling", "masks", "statistics", "selection", *(p for p in OPTIONAL if p in meta))
    found = [place for part in parts for place in whole_numbers(meta[part])]
    for _ in range(rng.choice((1, 1, 2, 4))):
        of, key = rng.choice(found)
        of[key] = max(0, of[key] + rng.choice((-1, 1, 1, 2, 8)))
    files[JSON] = dumped(rng, meta)
    return True


def whole_numbers(tree: Any) -> list[tuple[Any, Any]]:
    """Every whole number in a JSON value, as what holds it and where."""
    out = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if type(value) is int:
            out.append((tree, key))
        elif isinstance(value, dict | list):
            out += whole_numbers(value)
    return out


MUTATIONS: tuple[tuple[Mutate, int], ...] = (
    (values_of_the_json, 20),
    (masks_that_lie, 12),
    (another_level, 8),
    (one_part, 16),
    (numbers, 12),
    (values_of_a_header, 10),
    (values_of_tensors, 10),
    (bytes_of_a_file, 8),
    (of_another_bundle, 4),
    (other_files, 4),
)


def nasty(rng: random.Random, beside: Any) -> Any:
    """A value that is likely to be wrong where it is put."""
    if type(beside) is int and rng.random() < 0.5:
        return beside + rng.choice((-1, 1, 2, -2, 7, 1000))
    if type(beside) is float and rng.random() < 0.5:
        return rng.choice((beside + 0.1, -beside, int(beside), 1e308, 5e-324))
    if isinstance(beside, str) and rng.random() < 0.5:
        return rng.choice((beside[:-1], beside + "x", beside.upper(), beside[::-1]))
    return rng.choice(
        (
            None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**16, 2**31, 2**40, 2**63 - 1, 2**63, 10**30, -(2**63), 0.0,
            0.5, -0.5, 1e300, "", "x", "dense", "2:4", "nan", "../../etc/passwd", "(a+)+$", "a" * 5000, [], {}, [[]],
            [0], [-1], [None], {"x": 1}, [1] * 2000, [10**9, 10**9], nested(200),
        )
    )  # fmt: skip


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def change(rng: random.Random, tree: Any) -> None:
    """Change one place of a JSON value."""
    place, other = somewhere(rng, tree), somewhere(rng, tree)
    if place is None or other is None:
        return
    of, key = place
    match rng.randrange(8):
        case 0 | 1 | 2:
            of[key] = nasty(rng, of[key])
        case 3:
            del of[key]
        case 4:
            of[key], other[0][other[1]] = other[0][other[1]], of[key]
        case 5:
            at = rng.choice(list(of) if isinstance(of, dict) else range(len(of)))
            of[key] = of[at]
        case 6 if isinstance(of, list):
            of.insert(key, of[key])
        case 6:
            of[str(key) + rng.choice(("", "x", "2"))] = of.pop(key)
        case _:
            if isinstance(of, list):
                of.append(nasty(rng, of[key]))
            else:
                of[rng.choice(("x", "levels", "left", "units", "weights", "metric", "start", "block"))] = nasty(
                    rng, None
                )


def somewhere(rng: random.Random, tree: Any) -> tuple[Any, Any] | None:
    """A place in a JSON value, as what holds it and its key or index: as likely in a short part as in a long one."""
    of, key = None, None
    while isinstance(tree, dict | list) and tree and (of is None or rng.random() < 0.8):
        of = tree
        key = rng.choice([k for k in of if k != "checksum"] if isinstance(of, dict) else range(len(of)))
        tree = of[key]
    return None if of is None else (of, key)


def dumped(rng: random.Random, value: Any) -> bytes:
    """JSON, now and then as nobody writes it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    odd = rng.random()
    if odd < 0.02:
        text = text.replace(":0", rng.choice((":NaN", ":Infinity", ":-0", ":0.0", ":1e400", ":00")), 1)
    elif odd < 0.04:
        text = text.replace("{", '{"format":"cocktail-bundle",', 1)
    elif odd < 0.06:
        text = text.replace(",", rng.choice((" ,", ",,", ",\n")), 1)
    elif odd < 0.07:
        text = "[" * 100_000
    return text.encode("utf-8", "surrogatepass")


def mended(files: dict[str, bytes]) -> None:
    """The checksums of what is there, as someone would give them who wants it to be read."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, AttributeError):
        meta = json.loads(files[JSON])
        meta.pop("checksum", None)
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            for name in (WEIGHTS, SUBNETS):
                if name in files and isinstance(meta["files"][name], dict):
                    piece = 4096
                    data = files[name]
                    sums = [hashlib.sha256(data[i : i + piece]).hexdigest() for i in range(0, len(data), piece)]
                    meta["files"][name] |= {"bytes": len(data), "piece": piece, "sha256": sums}
        body = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode()[1:]
        files[JSON] = b'{"checksum":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body


# One case


class Wrong(Exception):
    """What a case found."""


class TooLong(BaseException):
    """Raised by the timer; nothing may catch it."""


KNOWN: list[dict[str, bytes]] = []
OTHER = small(99)  # what is loaded into
MODELS: list[Small] = []  # copies of it that nothing was loaded into yet


def written(files: dict[str, bytes], folder: Path) -> None:
    """Write files into a new folder."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def case(number: int, folder: Path) -> str:
    """Make a case's bundle and read it.

    Returns:
        What became of it.

    Raises:
        Wrong: What must not be.
    """
    rng = random.Random(number)
    files = dict(rng.choice(KNOWN))
    for _ in range(rng.choice((1, 1, 1, 2))):
        mutate = rng.choices([m for m, _ in MUTATIONS], [w for _, w in MUTATIONS])[0]
        try:
            mend = mutate(rng, files)
        except (
            KeyError,
            ValueError,
            TypeError,
            RecursionError,
            AttributeError,
            LookupError,
            BundleError,
            StopIteration,
        ):
            mend = True  # there is nothing left to change
    if mend:
        mended(files)
    unchanged = files in KNOWN
    shutil.rmtree(folder, ignore_errors=True)
    written(files, folder)
    model = MODELS.pop() if MODELS else copy.deepcopy(OTHER)
    try:
        net = cocktail.from_pretrained(folder, model)
    except BundleError as e:
        if unchanged:
            raise Wrong(f"a sound bundle was refused: {e}") from e
        if "allocat" in str(e) or "\n" in str(e) or len(str(e)) > 2000:
            raise Wrong(f"refused in the wrong way: {str(e)[:300]}") from e
        before = OTHER.state_dict()
        if any(not torch.equal(t, before[n]) for n, t in model.state_dict().items()):
            raise Wrong("the model was changed by a bundle that was refused") from e
        MODELS.append(model)
        return "refused, " + ("mended" if mend else "not mended")
    examine(net, folder, number)
    return "accepted, unchanged" if unchanged else "accepted, as its files say"


def miscounted(found: Bundle, row: dict[str, Any]) -> str | None:
    """What is wrong with the counts of a network's mask, by another reader and another way of counting."""
    name, pattern, sparsity, options = row["name"], row["pattern"], row["sparsity"], row.get("options", {})
    elements, removed = found.mask(name)
    weights = [found.weight(found.tensors[i]) for i in found.meta["selection"]["eligible"]]
    masks = [elements.get(found.tensors[i]) for i in found.meta["selection"]["eligible"]]
    if pattern == "unstructured":
        zeros = sum(int((~m).sum()) for m in masks if m is not None)
        wanted = round(sparsity * sum(int(np.prod(w.shape)) for w in weights))
        return None if zeros == wanted else f"{zeros} zeros, not {wanted}"
    if pattern in ("n:m", "transposable"):
        for w, m in zip(weights, masks, strict=True):
            kept = cut(w, {"runs": name, **options}, np.ones(w.shape, bool) if m is None else m).sum(-1)
            if (kept != options["n"]).any():
                return f"a run keeps {kept[kept != options['n']][0]}"
    if pattern == "block":
        blocks = np.concatenate(
            [cut(w, options, m).reshape(-1, prod(options["block"])) for w, m in zip(weights, masks, strict=True)]
        )
        if (blocks.any(1) != blocks.all(1)).any() or int((~blocks.any(1)).sum()) != round(sparsity * len(blocks)):
            return "blocks in part, or another number of them"
    if pattern in ("channel", "product"):
        if removed is None:
            return "no units"
        share = 0.5 if pattern == "product" else sparsity
        for _, start, stop, *_ in found.meta["coupling"]["groups"]:
            size = stop - start
            if int(removed[start:stop].sum()) != min(round(share * size), size - 1):
                return f"{int(removed[start:stop].sum())} of {size} units are gone"
    return None


def examine(net: cocktail.CocktailNet, folder: Path, number: int) -> None:
    """Whether an accepted bundle holds what its files say, and can be used.

    Of every fourth all is counted, saved and loaded again.

    Raises:
        Wrong: It does not, or it cannot.
    """
    try:
        found = Bundle(folder)
    except Exception as e:
        raise Wrong(f"accepted, but another reader cannot read it: {type(e).__name__}: {e}") from e
    rows = {s["name"]: s for s in found.meta["subnets"]}
    if list(rows) != net.names or any(
        (r["pattern"], r["sparsity"]) != (net.subnet(n).pattern, net.subnet(n).sparsity) for n, r in rows.items()
    ):
        raise Wrong("accepted with other subnets than its files list")
    metrics = {n: repr(float(r["metric"])) for n, r in rows.items() if "metric" in r}
    if metrics != {n: repr(v) for n, v in net.metrics.items()} or net.provenance != found.meta["provenance"]:
        raise Wrong("accepted with other metrics or provenance than its files have")
    for name in net.names[1:]:
        if wrong := miscounted(found, rows[name]):
            raise Wrong(f"accepted, but the mask of {name!r} has another count than its pattern asks for: {wrong}")
    for name in random.Random(number).sample(net.names, 2):
        net.switch(name)
        state = {
            n: t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for n, t in net.model.state_dict().items()
        }
        try:
            other = found.subnet(name)
        except Exception as e:
            raise Wrong(f"accepted, but another reader cannot read {name!r}: {type(e).__name__}: {e}") from e
        for key, values in state.items():
            fits = values == other[key]
            if values.dtype.kind == "f":  # a mask may multiply: what was not finite and is masked is then NaN
                fits |= np.isnan(values) & (np.isnan(other[key]) | (other[key] == 0))
            if not fits.all():
                raise Wrong(f"accepted with another {key} of {name!r} than its files have")
    net.switch("dense")
    if number % 4:
        return
    reports = net.subnets()
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        net.save_pretrained(Path(beside) / "again")
        again = cocktail.from_pretrained(Path(beside) / "again", small(98))
        if repr(again.subnets()) != repr(reports) or repr(again.coupling) != repr(net.coupling):
            raise Wrong("accepted, but saved and loaded again it is another")


# Many cases


def worker(first: int, last: int, note: Path, folder: Path) -> None:
    """Run cases in this process, which may take no more memory than is allowed."""
    size = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if os.path.exists("/proc") else 0
    )
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))

    def late(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s")

    signal.signal(signal.SIGVTALRM, late)
    counts: Counter[str] = Counter()
    failures: list[list[Any]] = []
    slowest = 0.0
    for number in range(first, last):
        note.write_text(json.dumps({"at": number}))
        began = time.process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            counts[case(number, folder)] += 1
        except BaseException as e:
            counts["failed"] += 1
            failures.append([number, f"{type(e).__name__}: {e}"[:400]])
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        slowest = max(slowest, time.process_time() - began)
    note.write_text(json.dumps({"first": first, "counts": counts, "failures": failures, "slowest": round(slowest, 3)}))


def chunk(first: int, last: int, beside: Path) -> dict[str, Any]:
    """Run cases in a child process; one that dies is a failure of the case it was at, and the rest goes on."""
    note = beside / "note"
    note.write_text("{}")
    child = os.fork()
    if child == 0:
        # What is garbage in the parent is not for the child to free: destructors of onnxruntime wait for threads, which
        # a fork does not copy.
        gc.freeze()
        try:
            worker(first, last, note, beside / "bundle")
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    said: dict[str, Any] = json.loads(note.read_text() or "{}")
    if status == 0:
        return said
    at = said.get("at", first)
    done = [chunk(a, b, beside) for a, b in ((first, at), (at + 1, last)) if a < b]
    failures = [[at, f"the process died with status {status}"], *(f for d in done for f in d["failures"])]
    counts = sum((Counter(d["counts"]) for d in done), Counter({"failed": 1}))
    return {"first": first, "counts": counts, "failures": failures, "slowest": max([0, *(d["slowest"] for d in done)])}


def run(cases: int, kept: Path, *, out: Path | None = None) -> dict[str, Any]:
    """Run all cases that are not done yet.

    Args:
        cases: How many there are.
        kept: A file of one line a chunk that was done.
        out: Where the results go.

    Returns:
        The results.
    """
    torch.set_num_threads(1)
    KNOWN[:] = seeds()
    with tempfile.TemporaryDirectory() as beside:  # so that all is loaded before processes are forked
        case(0, Path(beside) / "bundle")
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {row["first"] for row in rows}
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as beside:
        for first in range(0, cases, CHUNK):
            if first not in done:
                row = chunk(first, min(first + CHUNK, cases), Path(beside))
                rows.append(row)
                with kept.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                print(first + CHUNK, dict(row["counts"]), *row["failures"][:3], flush=True)
    counts: Counter[str] = sum((Counter(row["counts"]) for row in rows), Counter())
    results = {
        "command": f"python benchmarks/bundle_fuzz.py --cases {cases}",
        "cases": sum(counts.values()),
        "counts": dict(sorted(counts.items())),
        "failures": [f for row in rows for f in row["failures"]],
        "slowest_processor_seconds": max([0, *(row["slowest"] for row in rows)]),
        "limit_processor_seconds": SECONDS,
        "limit_memory_bytes": MEMORY,
        "torch": str(torch.__version__),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=101_000)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--kept", type=Path, default=ROOT / "runs" / "bundle_fuzz.jsonl", help="what was done")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bundle_fuzz.json")
    options = parser.parse_args()
    if options.case is not None:
        KNOWN[:] = seeds()
        print(case(options.case, Path(tempfile.mkdtemp()) / "bundle"))
        return
    results = run(options.cases, options.kept, out=options.out)
    print(json.dumps(results, indent=1))
    sys.exit(bool(results["failures"]))


if __name__ == "__main__":
    main()
