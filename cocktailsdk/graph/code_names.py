"""Names that the methods of a class use, read from their byte code."""

from __future__ import annotations

import inspect
from types import CodeType

from torch import nn

__all__ = ["names_read"]


def names_read(cls: type) -> set[str]:
    """Names that a class's methods use, other than when it is built."""
    out: set[str] = set()
    # Methods of bases run too. nn.Module's own would add every name that it manages, such as `training`.
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        for name, function in vars(base).items():
            # Decorated forwards (torch.no_grad, can_return_tuple of transformers) hide the code that reads the names.
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is not None and name != "__init__":
                out.update(_names_in(code))
    return out


def _names_in(code: CodeType) -> set[str]:
    """Names in a function's code and in the functions defined inside it (generators, lambdas)."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
