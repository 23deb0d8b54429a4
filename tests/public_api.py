"""The public names of cocktailsdk with their signatures, as text.

    python tests/public_api.py           print them
    python tests/public_api.py --write   write them to tests/public_api.txt, which a test holds the code against

Public is what ``cocktailsdk.__all__`` names, and what docs/reference.md and docs/reference-parts.md document. The
text is the same in every supported version of Python and torch: annotations are as the source has them, and what
classes have from other packages' is left out, as is what they have from a public one unchanged.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cocktailsdk

TEXT = Path(__file__).with_name("public_api.txt")
DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = "# The public names. After a change that is meant: python tests/public_api.py --write\n"
PLAIN = (bool, int, float, str, bytes, type(None))


def documented() -> list[str]:
    """Modules with public names, and names documented one by one."""
    pages = (DOCS / "reference.md", DOCS / "reference-parts.md")
    return ["cocktailsdk", *(n for page in pages for n in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M))]


def listed(text: str) -> list[str]:
    """What a text is about: the names after ``##``."""
    return re.findall(r"^## (\S+)$", text, re.MULTILINE)


def public_api(names: list[str]) -> str:
    """A line for each public name, and below the lines of a class one for each of its members."""
    alone = [n for n in dict.fromkeys(names) if not is_module(n) and not n.removeprefix("cocktailsdk.").isidentifier()]
    sections = []
    for name in [*sorted(n for n in set(names) if is_module(n)), *sorted(alone)]:
        if is_module(name):
            module = importlib.import_module(name)
            lines = [line for each in sorted(exported(module)) for line in described(each, getattr(module, each))]
        else:
            lines = list(described(name.rpartition(".")[2], found(name)))
        sections.append("\n".join([f"\n## {name}", *lines]) + "\n")
    return HEAD + "".join(sections)


def exported(module: ModuleType) -> list[str]:
    """What a module says is public, or else the classes and functions that it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", "") == module.__name__]


def is_module(name: str) -> bool:
    """Whether a dotted name is a module's."""
    return isinstance(found(name), ModuleType)


def found(name: str) -> Any:
    """What a dotted name means."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        return getattr(importlib.import_module(parent), last)


def described(name: str, value: Any) -> Iterator[str]:
    """The lines of one name."""
    if isinstance(value, type) and ours(value):
        bases = [b.__name__ for b in value.__bases__ if b is not object]
        yield f"class {name}" + (f"({', '.join(bases)})" if bases else "")
        if issubclass(value, enum.Enum):
            yield from (f"    {member.name} = {member.value!r}" for member in value)
            return
        if not issubclass(value, Exception) and not getattr(value, "_is_protocol", False):
            yield f"    {parameters(value)}"
        known = {
            line for c in value.__mro__[1:] if ours(c) and c.__name__ in cocktailsdk.__all__ for line in members(c)
        }
        yield from (f"    {line}" for line in members(value) if line not in known)
    elif inspect.isfunction(inspect.unwrap(value)):
        yield f"def {name}{parameters(value)}{result(value)}"
    else:
        yield f"{name}: {type(value).__name__ if type(value) in PLAIN else 'value'}"


def members(cls: type) -> Iterator[str]:
    """Public fields, properties and methods, those of other packages' classes left out."""
    mine = [c for c in cls.__mro__ if ours(c)]
    annotations = {k: v for c in reversed(mine) for k, v in inspect.get_annotations(c).items()}
    defined = {k: v for c in reversed(mine) for k, v in vars(c).items()}
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else getattr(cls, "_fields", ())
    for name in sorted({*annotations, *defined}):
        value = defined.get(name)
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"{name}{result(value.fget)} (property{', settable' if value.fset else ''})"
        elif isinstance(value, classmethod | staticmethod):
            kind = type(value).__name__
            yield f"def {name}{parameters(value.__func__, kind == 'classmethod')}{result(value.__func__)} ({kind})"
        elif inspect.isfunction(value):
            yield f"def {name}{parameters(value, True)}{result(value)}"
        elif name not in fields:  # a field is among the parameters already
            yield f"{name}: {as_written(annotations[name]) if name in annotations else type(value).__name__}"


def parameters(callable_: Any, bound: bool = False) -> str:
    """``(a: int, *, b: str = 'x')``."""
    given = list(inspect.signature(callable_).parameters.values())[int(bound) :]
    out: list[str] = []
    for i, p in enumerate(given):
        if p.kind is p.KEYWORD_ONLY and not any(q.kind in (q.KEYWORD_ONLY, q.VAR_POSITIONAL) for q in given[:i]):
            out.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        kind = "" if p.annotation is p.empty else f": {as_written(p.annotation)}"
        out.append(f"{stars}{p.name}{kind}" + ("" if p.default is p.empty else f" = {default(p.default)}"))
    return f"({', '.join(out)})"


def result(function: Any) -> str:
    """``-> int``."""
    returned = inspect.get_annotations(inspect.unwrap(function)).get("return")
    return "" if returned in (None, "None") else f" -> {as_written(returned)}"


def as_written(annotation: Any) -> str:
    """An annotation's source. Those of named tuples are references to it; others were not written here."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__forward_arg__", "value")
    return str(text)


def default(value: Any) -> str:
    """A default value; of objects whose text is not the same everywhere the kind."""
    if type(value) in PLAIN or (isinstance(value, tuple | list | dict) and plain(value)):
        return repr(value)
    return "…"


def plain(value: Any) -> bool:
    """Whether a value is made of numbers and texts alone."""
    if isinstance(value, dict):
        return all(plain(v) for pair in value.items() for v in pair)
    return all(map(plain, value)) if isinstance(value, tuple | list) else type(value) in PLAIN


def ours(cls: type) -> bool:
    """Whether a class is defined in this repository."""
    return cls.__module__.partition(".")[0] in ("cocktailsdk", "cocktail_adapters")


def main() -> None:
    """Print the text, or write it."""
    text = public_api(documented())
    if "--write" in sys.argv[1:]:
        TEXT.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
