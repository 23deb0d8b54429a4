"""From a bundle to a net."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import BundleError, CocktailError, PatternError, SubnetError
from ..graph import Coupling
from ..io.tensors import TensorFile
from ..io.values import distinct, flag, integer, items, keyed, more, quoted, shortened, small, text, texts
from ..masks.encoder import decode_masks
from ..net.subnet_model import SubnetModel, constructible
from ..net.target_modules import Selection
from ..patterns import DENSE, UMG, Pattern, Subnet, make_pattern
from ..printable import printable
from ..utils.batchnorm import statistics_of
from ..utils.nearest import no_subnet
from .couplings import read_coupling
from .examples import remake
from .files import SUBNETS_FILE, WEIGHTS_FILE, listed_subnets, meta_of, open_tensors, opened
from .hub import folder_of
from .model import all_tensors, built, check_model, fingerprint, stored_as, stored_names
from .private import read_private
from .statistics import read_statistics
from .write import check_masks, row

log = logging.getLogger(__name__)

NetT = TypeVar("NetT", bound=SubnetModel)

_KEYS = {
    "checksum",
    "format",
    "format_version",
    "files",
    "model",
    "patterns",
    "subnets",
    "selection",
    "example",
    "masks",
    "statistics",
    "dense_statistics",
    "coupling",
}
_SINCE_2 = {"build", "stored", "provenance"}
_SINCE_3 = {"private"}


def load_bundle(
    path: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    net_type: type[NetT],
    subnets: Iterable[str] | None = None,
    trust_build_record: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> NetT:
    """Load a bundle into a freshly built model, as a net of a class; see :func:`cocktailsdk.from_pretrained`.

    Args:
        path: As there, like all arguments but the next.
        model: The model.
        net_type: The class of the net that is returned.
        subnets: Names to read.
        trust_build_record: Whether unlisted classes may be built.
        revision: Of the hub's repository.
        token: The hub's access token.
        cache_dir: Of the hub's client.
        force_download: Whether the client fetches again what it has.
        local_files_only: Whether the client fetches nothing.
    """
    if isinstance(model, SubnetModel) or not isinstance(model, nn.Module | None):
        raise BundleError(f"from_pretrained loads into a plain nn.Module, not into a {type(model).__name__}")
    folder = folder_of(
        path,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    try:
        with opened(folder) as bundle:
            meta = meta_of(bundle)
            masks = len(items(meta.get("masks"), "its masks"))
            weights_file = open_tensors(bundle, meta, WEIGHTS_FILE)
            subnets_file = open_tensors(bundle, meta, SUBNETS_FILE, masks + _OTHER_TENSORS)
        if model is None:
            model = built(meta, weights_file, trust_build_record)
        net, weights = _Bundle(meta, model, weights_file, subnets_file, net_type).net(subnets)
    except PatternError as e:
        raise BundleError(
            f"the bundle in {folder} does not fit this {type(model).__name__}: {shortened(e)}"
        ) from _told(e)
    except CocktailError as e:
        _told(e)
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, OSError) as e:
        # The bytes are as they were written, so whoever wrote them broke the format.
        raise BundleError(f"the bundle in {folder} is malformed: {type(e).__name__}: {shortened(e)}") from _told(e)
    for file in (weights_file, subnets_file):
        log.debug("read %d of %d bytes of %s", file.bytes_read, file.size, file.file)
    tensors = all_tensors(model)
    with torch.no_grad():
        for name, value in weights.items():
            tensors[name].copy_(value)
    if meta["dense_statistics"]:
        net.statistics = {DENSE: statistics_of(model), **net.statistics}
    return net


@dataclass(frozen=True)
class _Bundle(Generic[NetT]):
    """A bundle's parts, and the model that they should be of."""

    meta: Mapping[str, Any]
    model: nn.Module
    weights_file: TensorFile
    subnets_file: TensorFile
    net_type: type[NetT]

    def net(self, only: Iterable[str] | None) -> tuple[NetT, dict[str, Tensor]]:
        """The net, and its weights, which are not in the model yet."""
        meta = self.meta
        version = meta["format_version"]
        first = version == 1
        since = (_SINCE_2 if version > 1 else set()) | (_SINCE_3 if version > 2 else set())
        keyed(meta, JSON, _KEYS | since)
        weights = self.weights()
        patterns, rows = self.patterns()
        names = [s.name for s in rows if s.name != DENSE]
        wanted = names if only is None else _wanted(only, names)
        shapes = {n: tuple(p.shape) for n, p in self.model.named_parameters()}
        buffers = {n: tuple(b.shape) for n, b in self.model.named_buffers()}
        file = self.subnets_file
        coupling = read_coupling(meta["coupling"], file["units"], meta["model"]["tensors"], shapes, buffers)
        selection = self.old_selection() if first else self.selection(coupling)
        eligible = selection.eligible(coupling)
        # The first version did not say where a subnet's statistics begin: all must be read to know.
        masks = decode_masks(
            meta["masks"], file.__getitem__, names, coupling, eligible, names if first else set(wanted)
        )
        check_masks(patterns, masks, UMG(coupling, eligible, weights), "get the bundle again from who trained it")
        statistics = read_statistics(meta["statistics"], file, masks, coupling, buffers, names, places=not first)
        private = read_private(meta, file, masks, coupling, self.stored_dtypes(), names)
        if len(masks) == len(names) and file.unread:
            raise BundleError(f"the bundle has {quoted(file.unread[0])}, which belongs to no subnet{more(file.unread)}")
        example = None if meta["example"] is None else _checked_example(remake(meta["example"]))
        flag(meta["dense_statistics"], "whether the dense network has statistics")
        provenance = {} if first else dict(keyed(meta["provenance"], "its provenance", (), meta["provenance"]))
        net = constructible(self.net_type)(
            self.model, patterns, coupling, selection, example, {n: m for n, m in masks.items() if n in wanted}
        )
        net.statistics.update({n: own for n, own in statistics.items() if n in wanted})
        self.give_private(net, {n: own for n, own in private.items() if n in wanted})
        net.metrics.update({s["name"]: float(s["metric"]) for s in meta["subnets"] if "metric" in s})
        net.provenance = provenance
        return net, weights

    def weights(self) -> dict[str, Tensor]:
        """The dense tensors, checked against the model's; views of the file."""
        keyed(self.meta["model"], "what it says of the model", ("class", "fingerprint", "tensors"))
        check_model(text(self.meta["model"]["class"], "the model's class"), self.model, self.weights_file.shapes)
        tensors, dtypes = all_tensors(self.model), self.stored_dtypes()
        file = self.weights_file
        for n in stored_names(self.model):
            should = dtypes.get(n, tensors[n].dtype)
            if file.dtype(n) != should:
                raise BundleError(
                    f"the bundle was made from another model than this {type(self.model).__name__}: {n!r} is "
                    f"{tensors[n].dtype}, in the bundle {file.dtype(n)}"
                )
        if fingerprint(self.model) != self.meta["model"]["fingerprint"] or (
            items(self.meta["model"]["tensors"], "the model's tensors") != list(tensors)
        ):
            raise BundleError(
                f"the bundle was made from another model than this {type(self.model).__name__}: its parameters and "
                "buffers have other names, shapes or dtypes"
            )
        fleeting = [n for n, t in tensors.items() if t.is_meta]
        if fleeting:
            raise BundleError(
                f"the model has no memory yet ({fleeting[0]!r} is on 'meta'): call model.to_empty(device=...)"
            )
        return {n: file[n] for n in stored_names(self.model)}

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """By parameter name, the dtype in which values are stored."""
        known = {None: None, "float16": torch.float16, "bfloat16": torch.bfloat16}
        if self.meta.get("stored") not in known:
            raise BundleError(f"the bundle's weights are stored as {quoted(self.meta['stored'])}, which is not known")
        small = known[self.meta.get("stored")]
        return {n: stored_as(p.dtype, small) for n, p in self.model.named_parameters()}

    def give_private(self, net: NetT, private: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give subnetworks their private tensors, in the parameters' own dtypes."""
        parameters = dict(self.model.named_parameters())
        for name, own in private.items():
            try:
                net.set_private(name, {n: t.to(parameters[n].dtype) for n, t in own.items()})
            except SubnetError as e:
                raise BundleError(f"the bundle does not fit this {type(self.model).__name__}: {shortened(e)}") from e

    def patterns(self) -> tuple[tuple[Pattern, ...], list[Subnet]]:
        """The patterns and all subnets, which are those that the bundle lists."""
        listed = listed_subnets(self.meta)
        patterns: list[Pattern] = []
        rows = [Subnet(DENSE, DENSE, 0.0)]
        for spec in items(self.meta["patterns"], "its patterns"):  # made only as far as they are what is listed
            pattern = _pattern(spec, len(listed))
            patterns.append(pattern)
            rows += pattern.subnets()
            if len(rows) > len(listed):
                raise BundleError(f"the bundle's patterns have more subnets than the {len(listed)} that it lists")
        distinct([p.name for p in patterns], "its patterns")
        stored = [{k: v for k, v in entry.items() if k != "metric"} for entry in listed]
        if [s["name"] for s in stored] != [s.name for s in rows]:
            odd = sorted({s["name"] for s in stored} ^ {s.name for s in rows})
            raise BundleError(
                "the bundle's patterns now have other subnets than when it was saved: "
                f"{', '.join(map(quoted, odd[:5])) or 'another order'}{more(odd[4:])}"
            )
        wrong = [s.name for s, entry in zip(rows, stored, strict=True) if _as_json(row(s)) != entry]
        if wrong:
            raise BundleError(f"the bundle says of {wrong[0]!r} something else than its pattern does{more(wrong)}")
        return tuple(patterns), rows

    def selection(self, coupling: Coupling) -> Selection:
        """What the user selected, by the names that it came to: no expression from a file is run."""
        said = keyed(self.meta["selection"], "its selection", ("target", "exclude", "whole", "eligible"))
        last = len(self.meta["model"]["tensors"]) - 1
        places = [integer(i, "an eligible weight", high=last) for i in items(said["eligible"], "its eligible weights")]
        names = [self.meta["model"]["tensors"][i] for i in places]
        if names != [w.name for w in coupling.weights if w.name in set(names)]:
            raise BundleError("the bundle's eligible weights are not among its weights, in their order")
        kept = texts(said["whole"], "the modules that keep their channels")
        if kept != sorted(kept):
            raise BundleError("the modules that keep their channels are not sorted in the bundle")
        target, exclude = (_said(said[k], f"what it {k}s") for k in ("target", "exclude"))
        return Selection(target, exclude, frozenset(kept), frozenset(names))

    def old_selection(self) -> Selection:
        """The first version held only what the user wrote, which may be an expression that takes forever."""
        said = keyed(self.meta["selection"], "its selection", ("target", "exclude"))
        target, exclude = (_said(said[k], f"what it {k}s") for k in ("target", "exclude"))
        if isinstance(target, str) or isinstance(exclude, str):
            raise BundleError(
                f"the bundle is of format version 1 and selects modules by an expression, which is not run from "
                f"a file ({quoted(target or exclude)}): save it anew with cocktailsdk 0.1.0 and lists of names"
            )
        return Selection.of(self.model, target, exclude)


JSON = "bundle.json"
_OTHER_TENSORS = 32
"""In ``subnets.safetensors`` besides masks: the units, and statistics of each dtype."""
_CONFIG_VALUES = 32
"""In the configuration of a pattern, and besides for each subnetwork."""


def _told(error: Exception) -> Exception:
    """An error whose causes a traceback may print: other libraries quote names of the file as they are."""
    at: BaseException | None = error
    while at is not None:
        cause = at.__cause__ or at.__context__
        if cause is not None and printable(str(cause)) != str(cause):
            at.__cause__, at.__suppress_context__ = None, True
            break
        at = cause
    return error


def _wanted(only: Iterable[str], names: Collection[str]) -> list[str]:
    chosen = [only] if isinstance(only, str) else list(only)
    odd = [n for n in chosen if n != DENSE and n not in names]
    if odd:
        raise SubnetError(f"the bundle has {no_subnet(odd[0], [DENSE, *names], 'cocktail-cli subnets lists')}")
    return [n for n in chosen if n != DENSE]


def _pattern(entry: Any, listed: int) -> Pattern:
    keyed(entry, "a pattern", ("name", "config"))
    config = entry["config"]
    if not small(config, _CONFIG_VALUES + _CONFIG_VALUES * listed):
        raise BundleError(f"the bundle configures the pattern {quoted(entry['name'])} at a length beyond its subnets")
    keyed(config, "the configuration of a pattern", (), config if type(config) is dict else ())
    try:
        pattern = make_pattern(text(entry["name"], "a pattern"), config)
    except PatternError as e:
        raise BundleError(f"the bundle uses a pattern that cannot be made here: {shortened(e)}") from e
    if _as_json(pattern.config()) != config:
        raise BundleError(f"the bundle gives the pattern {pattern.name!r} a configuration that it does not have")
    return pattern


def _as_json(value: Any) -> Any:
    """A value as it is once written as JSON and read: tuples are lists."""
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, list | tuple) else value


def _said(value: Any, what: str) -> str | tuple[str, ...] | None:
    return value if value is None or isinstance(value, str) else tuple(texts(value, what))


def _checked_example(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not (type(value) is tuple and len(value) == 2 and type(value[0]) is tuple and type(value[1]) is dict):
        raise BundleError("the bundle's example inputs are no pair of positional and keyword arguments")
    return value
