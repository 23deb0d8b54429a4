"""``save_pretrained`` of slim models: by their configuration where one describes them, refused where none does."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

from torch import nn

from cocktailsdk.errors import SlimError
from cocktailsdk.graph.layers import SlimGroupNorm, SlimLayerNorm

from .transformers_configs import Values, in_words, numbers_of, with_values
from .transformers_native import Builder, Randomised, adopt, eps_of, folds_of, reloaded, same_constants, scaled
from .transformers_search import Search, Shapes, pattern_of, shapes_of

__all__ = ["Folded", "Refused", "describe"]

log = logging.getLogger(__name__)

PROOFS = 12
"""Configurations with the right shapes of which models are built and compared by what they compute."""

_BUNDLE = (
    "Save the net's bundle, which holds it together with all others (net.save_pretrained(path), and later "
    "cocktailsdk.from_pretrained(path, model).slim(name))"
)


class Refused:
    """Stands in the place of a slim model's ``save_pretrained`` where no configuration describes the model.

    Args:
        message: What cannot be described, and what to do.
    """

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raises, whatever is asked for.

        Raises:
            SlimError: Always.
        """
        raise SlimError(self.message)


class Folded:
    """``save_pretrained`` of a slim model whose norms count absent channels: these are written as its class's own.

    The model itself is not changed.

    Args:
        model: The model that it belongs to.
        folds: By path, norms with the share of their channels that is left.
    """

    def __init__(self, model: nn.Module, folds: Mapping[str, float]) -> None:
        # Not held: a model that holds its holder is freed late.
        self._model, self.folds = weakref.ref(model), dict(folds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the class's own ``save_pretrained`` does, with the weights as its own norms need them."""
        model: Any = self._model()
        if model is None:
            raise SlimError("the slim model whose save_pretrained this is no longer exists")
        method = type(model).save_pretrained
        given = inspect.signature(method).bind(model, *args, **kwargs).arguments
        rest = given.pop("kwargs", {})
        state = given.get("state_dict")
        given["state_dict"] = scaled(model.state_dict() if state is None else state, self.folds)
        return method(**given, **rest)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "folds": self.folds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model, self.folds = weakref.ref(state["model"]), state["folds"]


class _NotDescribed(Exception):
    """No configuration describes a slim model.

    Attributes:
        why: What cannot be described.
        advice: What to slim otherwise.
    """

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(why)
        self.why, self.advice = why, advice


def describe(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Gives a slim model of transformers, or what of them a model holds, the configuration that describes it.

    A configuration is found from the shapes, and a model that its class builds from it, as read back from a file, is
    compared with the slim one in float64 on random weights of unit scale. Where no configuration passes,
    ``save_pretrained`` of the slim model refuses, and says why.

    Args:
        model: The slim model; what it computes is not changed.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
    """
    parts = list(_outermost(model))
    for _, part in parts:
        for module in _pretrained_in(part):
            if isinstance(vars(module).get("save_pretrained"), Refused | Folded):  # of an earlier slimming
                del module.__dict__["save_pretrained"]

    @cache
    def reference() -> Randomised:
        return Randomised(model, [p for p, _ in parts], args, kwargs)

    for path, part in parts:
        try:
            _refuse_norms(part)
            native, folds, values = _described(path, part, reference)
        except _NotDescribed as found:
            _refuse(part, found.why, found.advice)
        except Exception as error:  # other people's code is run, on configurations that it may not foresee
            log.debug("no configuration for %s", type(part).__name__, exc_info=True)
            said = " ".join(str(error).split()) or "no message"
            _refuse(part, f"{type(error).__name__}: {said[:300].rstrip('.')}", "")
        else:
            adopt(part, native)
            for module, within in _pretrained_with_paths(part):
                own = {p[len(within) :]: share for p, share in folds.items() if p.startswith(within)}
                if own:
                    module.__dict__["save_pretrained"] = Folded(module, own)
            log.info("the slim %s is described by %s", type(part).__name__, in_words(values) or "its configuration")


def _outermost(model: nn.Module, at: str = "") -> Iterator[tuple[str, nn.Module]]:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        yield at, model
        return
    for name, child in model.named_children():
        yield from _outermost(child, f"{at}.{name}" if at else name)


def _pretrained_with_paths(part: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    from transformers import PreTrainedModel

    for path, module in part.named_modules():
        if isinstance(module, PreTrainedModel):
            yield module, f"{path}." if path else ""


def _pretrained_in(part: nn.Module) -> Iterator[nn.Module]:
    return (module for module, _ in _pretrained_with_paths(part))


def _refuse(part: nn.Module, why: str, advice: str) -> None:
    name, config = type(part).__name__, type(part.config).__name__
    otherwise = f", or {advice}" if advice else ""
    message = (
        f"this slim {name} cannot be written by save_pretrained, since no {config} describes it: {why}. "
        f"{_BUNDLE}{otherwise}."
    )
    log.info("%s", message)
    for module in _pretrained_in(part):
        module.__dict__["save_pretrained"] = Refused(message)


def _refuse_norms(part: nn.Module) -> None:
    """No search is needed where a norm counts absent channels in a way that no class has."""
    for path, module in part.named_modules():
        width = module.weight.numel() if isinstance(getattr(module, "weight", None), nn.Parameter) else None
        if isinstance(module, SlimLayerNorm | SlimGroupNorm) and width is not None and width < module.channels:
            kind = "LayerNorm" if isinstance(module, SlimLayerNorm) else "GroupNorm"
            raise _NotDescribed(
                f"{path} normalises over the {width} channels that are left of {module.channels} and goes on counting "
                f"those that are gone as zeros, which a plain {kind} cannot",
                f"keep the channels that it normalises whole (exclude_modules={_writer(part, path, width)})",
            )


def _writer(part: nn.Module, norm: str, width: int) -> str:
    """What writes such channels first, as one would exclude it."""
    for path, module in part.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1 and weight.shape[_axis_made(module)] == width:
            return f"[{path!r}]"
        if path == norm:
            break
    return "[...]"


def _described(
    path: str, part: nn.Module, reference: Callable[[], Randomised]
) -> tuple[nn.Module, dict[str, float], Values]:
    """A model without weights that has the configuration found, the norms folded, and the numbers that are new."""
    builder, wanted, folds = Builder(part), shapes_of(part), folds_of(part)
    search = Search(part.config, builder.shapes_only, wanted, part)
    if search.base.keys() != wanted.keys():
        odd = sorted(search.base.keys() ^ wanted.keys())[0]
        raise _NotDescribed(f"{odd!r} is in one of the slim model and what the configuration builds, not in both", "")
    worst, tried = 0.0, ""
    for found in islice(search.solutions(), PROOFS):
        values = {**found, **_eps_values(part, builder.shapes_only(with_values(part.config, found)), folds)}
        config = with_values(part.config, values)
        native = builder.with_tables(reloaded(config))
        if shapes_of(native) != wanted or _ties(native) != _ties(part):
            tried, worst = f"with {in_words(values)}, what is read back from a file has other shapes or ties", 0.0
            continue
        if (where := same_constants(part, native, folds)) is not None:
            tried, worst = f"{where} would have another eps", 0.0
            continue
        if not reference().ran(path):
            raise _NotDescribed(
                "it is not called when the example inputs are run, so nothing shows what it computes", ""
            )
        error = reference().error_of(path, native, folds)
        if error <= reference().limit:
            live = builder.shapes_only(config)
            error = reference().error_after_adopting(path, live)
            if error <= reference().limit:
                return live, folds, values
        tried, worst = f"with {in_words(values)} the shapes are the same, but", error
    if tried:
        said = f"{tried} {type(part).__name__} computes something else (relative error {worst:.1e})" if worst else tried
        raise _NotDescribed(said, "keep more of its channels whole (exclude_modules=[...])")
    raise _misfit(part, search)


def _eps_values(part: nn.Module, native: nn.Module, folds: Mapping[str, float]) -> Values:
    """What the configuration must say where the class's own norms need a larger eps."""
    needed: dict[float, float] = {}
    for path, share in folds.items():
        for name, value in eps_of(native.get_submodule(path)).items():
            norm = part.get_submodule(path)
            own = eps_of(norm).get(name, getattr(norm, "eps", None))
            if isinstance(own, float):
                needed[value] = own / share
    return {
        place: needed[value]
        for place, value in numbers_of(part.config, fractions=("eps",))
        if isinstance(value, float) and value in needed
    }


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Names that stand for one and the same parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(n) for n in names.values() if len(n) > 1}


def _misfit(part: nn.Module, search: Search) -> _NotDescribed:
    """In words, what the nearest configuration leaves wrong."""
    wanted, base, nearest = shapes_of(part), search.base, search.nearest()
    wrong = nearest.wrong
    kept = {(n, d): (s, base[n][d]) for n, shape in wanted.items() for d, s in enumerate(shape)}
    for name, axis in wrong:
        for other, of in kept.items():
            same = other[1] == axis and pattern_of(other[0]) == pattern_of(name) and base[other[0]] == base[name]
            if same and of != kept[name, axis]:
                a, b = sorted([(name, axis), other], key=list(kept).index)
                return _NotDescribed(
                    f"{a[0]} keeps {kept[a][0]} of {kept[a][1]} {_slices(a)}, {b[0]} {kept[b][0]}",
                    "slim every layer alike (one ratio for all, with round_to if it must be a multiple)",
                )
    if not wrong:
        return _NotDescribed("none was found among all those tried", "keep more of its channels whole")
    (name, axis), (built, _) = next(iter(wrong.items()))
    with_what = f"with {in_words(nearest.values)} " if nearest.values else ""
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    has, had = wanted[name][axis], base[name][axis]
    keeps = f"{has} of {had}" if has < had else f"all {had}"
    return _NotDescribed(
        f"{name} keeps {keeps} {_slices((name, axis))}, where {with_what}it gives {built}{more}",
        f"keep these whole (exclude_modules={_makers(part, wanted, wrong)})",
    )


def _slices(where: tuple[str, int]) -> str:
    name, axis = where
    return "entries" if name.endswith("bias") else ("rows", "columns")[axis] if axis < 2 else f"along axis {axis}"


def _makers(part: nn.Module, wanted: Shapes, wrong: Mapping[tuple[str, int], Any]) -> list[str]:
    """Modules whose output channels are concerned, by the last parts of their paths that no others have."""
    found: dict[str, None] = {}
    for name, axis in wrong:
        path, _, _ = name.rpartition(".")
        if axis == (_axis_made(part.get_submodule(path)) if len(wanted[name]) > 1 else 0):
            found[path] = None
    others = [f".{path}" for path, _ in part.named_modules() if path not in found]
    tails: dict[str, None] = {}
    for path in found:
        parts = path.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
        tails[next((e for e in ends if not any(o.endswith(f".{e}") for o in others)), path)] = None
    return list(tails)


def _axis_made(module: nn.Module) -> int:
    """Along which axis of a module's weight its output channels lie."""
    return int(isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D")
