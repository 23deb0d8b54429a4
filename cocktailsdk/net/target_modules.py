"""Which weights patterns may prune: ``target_modules`` and ``exclude_modules``, as PEFT reads them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from ..errors import PatternError
from ..graph import Coupling, Weight
from .tuners import adapter_weights, rank_modules

Modules = str | Iterable[str] | None
"""One regular expression, or names and suffixes, or nothing."""


@dataclass(frozen=True)
class Selection:
    """Modules chosen by the user.

    A string is a regular expression that must match a module's whole path. A list holds module paths or their last
    parts (``"layer1.0.conv1"``, ``"conv1"``); an entry that names a container stands for all inside it. Parameters that
    are not called ``weight`` (``in_proj_weight``) can be named like modules.

    Attributes:
        target: Only these are eligible; ``None`` for all but the first convolution and the classifier.
        exclude: These are not.
        whole: Paths of the modules that keep their output channels.
        chosen: Names of the weights that are eligible, where a bundle lists them: no regular expression from a file is
            ever run.
        adapters: Names of the weights of adapters (LoRA), eligible only where the user names them.
    """

    target: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    whole: frozenset[str] = frozenset()
    chosen: frozenset[str] | None = field(default=None, compare=False)
    adapters: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def of(cls, model: nn.Module, target: Modules = None, exclude: Modules = None) -> Selection:
        """The selection, checked against the model.

        Raises:
            PatternError: A name or expression that fits nothing in the model, or is malformed.
        """
        wanted = _check_entries(model, "target_modules", target)
        unwanted = _check_entries(model, "exclude_modules", exclude)
        whole = set()
        if unwanted:
            whole |= {path for path, _ in model.named_modules() if path and _module_match(unwanted, path)}
            whole |= {owner_of(name) for name, _ in model.named_parameters() if _match(unwanted, owner_of(name), name)}
        if wanted is not None:
            # Only parameters of two dimensions make channels: a norm beside a targeted convolution must not fix its
            # channels.
            whole |= {
                owner_of(name)
                for name, p in model.named_parameters()
                if p.ndim >= 2 and owner_of(name) and not _match(wanted, owner_of(name), name)
            }
        whole |= rank_modules(model) if wanted is None else set()
        return cls(wanted, unwanted, frozenset(whole), adapters=adapter_weights(model))

    def keeps_channels(self, module: str) -> bool:
        """Whether the module at this path keeps its output channels."""
        return module in self.whole

    def eligible(self, coupling: Coupling) -> tuple[Weight, ...]:
        """The weights that elementwise patterns may touch, in order of execution.

        Raises:
            PatternError: ``target_modules`` was given and selects no weight.
        """
        if self.chosen is not None:
            return tuple(w for w in coupling.weights if w.name in self.chosen)
        out = tuple(w for w in coupling.weights if self._is_eligible(w))
        if self.target is not None and not out:
            raise PatternError(
                f"target_modules={self.target!r} selects no weight that is multiplied with activations, and can be "
                "masked"
                + (f" once exclude_modules={self.exclude!r} are gone" if self.exclude else "")
                + f"; the model has {some_of(w.module or w.name for w in coupling.weights)}"
            )
        return out

    def why_not(self, weight: Weight) -> str | None:
        """Why a weight is not eligible; ``None`` where it is."""
        if self._is_eligible(weight):
            return None
        if self.exclude is not None and _match(self.exclude, weight.module, weight.name):
            return "excluded"
        if self.target is not None and not _match(self.target, weight.module, weight.name):
            return "not targeted"
        if weight.unmaskable:
            return weight.unmaskable
        role = weight.role or "an adapter's"
        return f"{role} (name it in target_modules to prune it)"

    def _is_eligible(self, w: Weight) -> bool:
        if w.unmaskable:
            return False
        if self.exclude is not None and _match(self.exclude, w.module, w.name):
            return False
        by_default = not w.role and w.name not in self.adapters
        if self.target is None:
            return by_default
        how = _match(self.target, w.module, w.name)
        # A container does not name the first convolution in it; the module's own name does.
        return how == "itself" or (how == "inside" and by_default)


def owner_of(parameter: str) -> str:
    """Path of the module that owns a parameter."""
    return parameter.rpartition(".")[0]


def _match(entries: str | tuple[str, ...], module: str, name: str) -> str:
    """``"itself"``, ``"inside"`` or ``""``, for a parameter by its module's path or its own name."""
    how = _module_match(entries, module)
    if how == "itself":
        return how
    if isinstance(entries, str):
        # ``weight`` is left out, or '(?!fc$).*' would find 'fc.weight' after rightly refusing 'fc'.
        named = not name.endswith(".weight") and re.fullmatch(entries, name)
        return "itself" if named else how
    return "itself" if any(is_called(e, name) for e in entries) else how


def _module_match(entries: str | tuple[str, ...], path: str) -> str:
    if isinstance(entries, str):
        return "itself" if re.fullmatch(entries, path) else ""
    if any(is_called(e, path) for e in entries):
        return "itself"
    return "inside" if any(is_called(e, above) for above in containers_of(path) for e in entries) else ""


def is_called(entry: str, path: str) -> bool:
    """Whether an entry of a list is a path or the last parts of it."""
    return path == entry or path.endswith("." + entry)


def containers_of(path: str) -> Iterator[str]:
    """The paths of the modules around one, the innermost first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _check_entries(model: nn.Module, argument: str, value: Modules) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    paths = [p for p, _ in model.named_modules() if p]
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as e:
            raise PatternError(f"{argument}={value!r} is not a regular expression: {e}") from None
        if not any(_match(value, owner_of(n), n) for n in names) and not any(_module_match(value, p) for p in paths):
            hint = f" (write [{value!r}] to find it as a suffix)" if any(is_called(value, p) for p in paths) else ""
            raise PatternError(
                f"{argument}={value!r} matches no module's whole path{hint}{nearest(value, paths)}; modules are "
                f"{some_of(paths)}"
            )
        return value
    try:
        entries = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    except TypeError:
        raise PatternError(f"{argument} must be a regular expression or a list of names, not {value!r}") from None
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise PatternError(f"{argument} must hold names, found {entry!r}")
        if not any(is_called(entry, p) for p in [*paths, *names]):
            raise PatternError(f"{argument}: nothing in the model is called {entry!r}{nearest(entry, paths)}")
    if not entries and argument == "target_modules":
        raise PatternError("target_modules is empty: nothing would be pruned; leave it out for the default")
    return entries or None


def nearest(name: str, paths: list[str]) -> str:
    """In brackets, the paths or last parts of them that look most like a name; empty where none do."""
    tails = {p.rpartition(".")[2] for p in paths}
    near = difflib.get_close_matches(name, [*paths, *sorted(tails)], n=3, cutoff=0.6)
    return f" (did you mean {', '.join(map(repr, near))}?)" if near else ""


def some_of(names: Iterable[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    all_names = list(dict.fromkeys(names))
    return ", ".join(all_names[:most]) + (f" and {len(all_names) - most} more" if len(all_names) > most else "")
