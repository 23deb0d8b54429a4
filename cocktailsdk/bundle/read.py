"""From a bundle to a net."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import BundleError, CocktailError, PatternError
from ..net import CocktailNet
from ..patterns import DENSE, Pattern, make_pattern
from ..selection import Selection
from ..statistics import statistics_of
from .couplings import read_coupling
from .examples import remake
from .files import SUBNETS_FILE, WEIGHTS_FILE, open_tensors, read_meta
from .subnets import read_masks, read_statistics
from .write import all_tensors, fingerprint, stored_names


def from_pretrained(path: str | PathLike[str], model: nn.Module) -> CocktailNet:
    """Load a bundle into a freshly built model.

    No code is run from the files. Everything is checked before the model is touched: if this raises, the model is as
    it was.

    Args:
        path: The bundle's folder.
        model: Of the class and configuration that the bundle was made from; its weights are replaced in place, on the
            device where they lie.

    Returns:
        A net with the dense network active.

    Raises:
        BundleError: The bundle is damaged, of an unknown version, of an unregistered pattern, or of another model.
    """
    if isinstance(model, CocktailNet) or not isinstance(model, nn.Module):
        raise BundleError(f"from_pretrained loads into a plain nn.Module, not into a {type(model).__name__}")
    try:
        folder, meta = read_meta(path)
        net, weights = _read(folder, meta, model)
    except PatternError as e:
        raise BundleError(f"the bundle in {path} does not fit this {type(model).__name__}: {e}") from e
    except CocktailError:
        raise
    except (
        SafetensorError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as e:
        # The bytes are as they were written, so whoever wrote them broke the format.
        raise BundleError(f"the bundle in {path} is malformed: {type(e).__name__}: {e}") from e
    tensors = all_tensors(model)
    with torch.no_grad():
        for name, value in weights.items():
            tensors[name].copy_(value)
    if meta["dense_statistics"]:
        net.statistics = {DENSE: statistics_of(model), **net.statistics}
    return net


def _read(folder: Path, meta: Mapping[str, Any], model: nn.Module) -> tuple[CocktailNet, dict[str, Tensor]]:
    with open_tensors(folder / WEIGHTS_FILE) as file:
        _check_model(meta, model, {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()})  # noqa: SIM118
        weights = {n: file.get_tensor(n) for n in stored_names(model)}
    tensors = all_tensors(model)
    wrong = [n for n, t in weights.items() if t.dtype != tensors[n].dtype]
    if wrong or fingerprint(model) != meta["model"]["fingerprint"]:
        found = (
            f"{wrong[0]!r} is {tensors[wrong[0]].dtype}, in the bundle {weights[wrong[0]].dtype}"
            if wrong
            else ("its parameters and buffers have other names, shapes or dtypes")
        )
        raise BundleError(f"the bundle was made from another model than this {type(model).__name__}: {found}")
    meta_device = [n for n, t in tensors.items() if t.is_meta]
    if meta_device:
        raise BundleError(
            f"the model has no memory yet ({meta_device[0]!r} is on 'meta'): call model.to_empty(device=...)"
        )

    patterns = tuple(_pattern(p) for p in meta["patterns"])
    subnets = [s for p in patterns for s in p.subnets()]
    names = [s.name for s in subnets]
    stored = [s["name"] for s in meta["subnets"]]
    if [DENSE, *names] != stored:
        odd = sorted(set(stored) ^ {DENSE, *names})
        raise BundleError(
            f"the bundle's patterns now have other subnets than when it was saved: {', '.join(odd) or 'another order'}"
        )
    target, exclude = (_entries(meta["selection"][k]) for k in ("target", "exclude"))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    buffers = {n: tuple(b.shape) for n, b in model.named_buffers()}
    with open_tensors(folder / SUBNETS_FILE) as file:
        coupling = read_coupling(meta["coupling"], file.get_tensor("units"), meta["model"]["tensors"], shapes, buffers)
        selection = Selection.of(model, target, exclude)
        eligible = selection.eligible(coupling)
        masks = read_masks(meta["masks"], file.get_tensor, names, coupling, eligible)
        statistics = read_statistics(meta["statistics"], file.get_tensor, masks, coupling, buffers)
    example = None if meta["example"] is None else remake(meta["example"])
    net = CocktailNet(model, patterns, coupling, selection, example, masks)
    net.statistics.update(statistics)
    net.metrics.update({s["name"]: float(s["metric"]) for s in meta["subnets"] if "metric" in s})
    return net, weights


def _pattern(entry: Mapping[str, Any]) -> Pattern:
    try:
        return make_pattern(entry["name"], entry["config"])
    except PatternError as e:
        raise BundleError(f"the bundle uses a pattern that cannot be made here: {e}") from e


def _entries(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_model(meta: Mapping[str, Any], model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> None:
    tensors = all_tensors(model)
    want = {n: tuple(tensors[n].shape) for n in stored_names(model)}
    missing = [n for n in found if n not in want]
    extra = [n for n in want if n not in found]
    other = [n for n in want if n in found and want[n] != found[n]]
    said = []
    if other:
        said.append(f"{other[0]!r} has shape {want[other[0]]}, in the bundle {found[other[0]]}" + _more(other))
    if missing:
        said.append(f"the bundle has {missing[0]!r}, which the model lacks" + _more(missing))
    if extra:
        said.append(f"the model has {extra[0]!r}, which the bundle lacks" + _more(extra))
    if said:
        raise BundleError(
            f"the bundle was made from another model ({meta['model']['class']}) than this {type(model).__name__}: "
            f"{'; '.join(said)}; build the model with the same arguments"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
