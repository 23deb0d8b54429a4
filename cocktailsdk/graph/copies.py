"""Copies of a user's model."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..errors import SlimError
from ..utils.reachable import Walk

__all__ = ["duplicate", "duplicate_in_double"]


def duplicate(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, also of models that ``copy.deepcopy`` alone cannot copy, or copies by half.

    - Tensors that were computed (old weight norm's ``weight``, a saved attention map) are detached.
    - What cannot be copied (a lock, an open file) is shared with the original.
    - Hooks and attributes that are functions refer, in their closures, to the copy's modules, no longer to the
      original's. So do weak references.

    Args:
        model: The model.
        memo: Copies that are to stand for some of its objects, by ``id``.

    Raises:
        SlimError: If the model cannot be copied.
    """
    memo = {} if memo is None else memo
    # copy.deepcopy refuses tensors with a grad_fn, which hooks leave in attributes (torch.nn.utils.weight_norm).
    _detach(memo, (value for module in model.modules() for value in vars(module).values()))
    initial_memo = dict(memo)
    try:
        copied = copy.deepcopy(model, memo)
    # deepcopy stops at the first object that it cannot copy. The memo then holds half-made copies and is reset.
    except Exception:
        memo.clear()
        memo.update(initial_memo)
        _detach(memo, Walk([model]).tensors)
        _share_what_cannot_be_copied(model, memo)
        try:
            copied = copy.deepcopy(model, memo)
        except Exception as error:
            raise SlimError(
                f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); a slim model is a copy. "
                "Let copy.deepcopy(model) work, for example by a __deepcopy__ method of the class that fails"
            ) from error
    _rebind(copied, memo)
    return copied


def duplicate_in_double(model: nn.Module) -> nn.Module:
    """A copy in float64, with the tensors that it keeps in plain attributes (masks and anchors of an earlier run)."""
    made = duplicate(model).double()  # leaves complex buffers complex
    for module in made.modules():
        for tensor in _nested_tensors(vars(module)):
            if tensor.is_floating_point():
                # In the same object: double() makes another one, and several containers may hold this one.
                tensor.data = tensor.data.double()
    return made


def _nested_tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in nested containers; parameters and buffers are in double precision by now."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _nested_tensors(item, depth - 1)


def _detach(memo: dict[int, Any], values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor) and not value.is_leaf:
            memo.setdefault(id(value), value.detach().clone())


def _share_what_cannot_be_copied(model: nn.Module, memo: dict[int, Any]) -> None:
    known = memo | {id(m): m for m in model.modules()}
    for module in model.modules():
        attributes = [v for k, v in vars(module).items() if k not in ("_modules", "_parameters", "_buffers")]
        # The dictionaries themselves (of hooks, above all) are copied: what is added to one must not be in the other.
        for value in [leaf for v in attributes for leaf in (v.values() if isinstance(v, dict) else (v,))]:
            if isinstance(value, nn.Module | Tensor):
                continue
            try:
                copy.deepcopy(value, dict(known))
            except Exception:
                memo[id(value)] = value


def _rebind(made: nn.Module, memo: dict[int, Any]) -> None:
    """Rebinds functions and weak references in a copy to the copy; ``copy.deepcopy`` leaves them bound to the original.

    A hook such as ``lambda m, x, y: self.features.append(y)`` would otherwise fill the original's list.
    """
    copies = {key: value for key, value in memo.items() if isinstance(value, nn.Module)}
    for module in made.modules():
        for holder in (vars(module), *(v for v in vars(module).values() if isinstance(v, dict))):
            # deepcopy returns functions and weak references as they are, still bound to the original's modules.
            for key, value in list(holder.items()):
                bound = _bound(value, copies)
                if bound is not value:
                    with suppress(TypeError):
                        holder[key] = bound


def _bound(value: Any, copies: dict[int, Any], within: tuple[Any, ...] = ()) -> Any:
    """The value with references to original modules replaced by references to their copies."""
    if isinstance(value, weakref.ReferenceType):
        target = copies.get(id(value()))
        return value if target is None else weakref.ref(target)
    if type(value) is MethodType:
        target = copies.get(id(value.__self__))
        return value if target is None else MethodType(value.__func__, target)
    if type(value) is functools.partial:
        function, args = _bound(value.func, copies, within), tuple(copies.get(id(a), a) for a in value.args)
        if function is value.func and all(a is b for a, b in zip(args, value.args, strict=True)):
            return value
        return functools.partial(function, *args, **value.keywords)
    # `within` stops recursion: a function may be in its own closure.
    if type(value) is not FunctionType or not value.__closure__ or any(value is w for w in within):
        return value
    contents = [_content(cell) for cell in value.__closure__]
    bound = [copies[id(c)] if id(c) in copies else _bound(c, copies, (*within, value)) for c in contents]
    if all(a is b for a, b in zip(contents, bound, strict=True)):
        return value
    cells = tuple(
        cell if a is b else CellType(b) for cell, a, b in zip(value.__closure__, contents, bound, strict=True)
    )
    # Cells cannot be replaced in a function, so the function is built anew around new cells.
    made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__, made.__dict__ = value.__kwdefaults__, dict(vars(value))
    return made


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
