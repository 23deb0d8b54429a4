"""The tables of classes and arguments, and the versions of the libraries that they were tested with."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from ..errors import AdapterError
from ..utils.optional import install_command
from .kinds import KINDS, Kind, one_of

__all__ = ["LIBRARIES", "PASS", "Entry", "Library", "check_version", "library"]

LIBRARIES = ("timm", "torchvision", "transformers")
"""The libraries whose models a bundle may have built."""

PASS = "pass the model: from_pretrained(bundle, model)"


@dataclass(frozen=True)
class Entry:
    """What a record may give a class.

    Attributes:
        section: The table's section: a type of model, or the module of timm that defines the architecture.
        fields: Kinds of arguments by name.
        nested: Objects that are arguments themselves, by name.
    """

    section: str
    fields: Mapping[str, Kind]
    nested: Mapping[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Library:
    """A library's table.

    Attributes:
        oldest: The first version that the table was tested with.
        newest: The last one; its patch releases are included where this has no patch number.
        entries: Entries by the name of a class or builder.
    """

    oldest: str
    newest: str
    entries: Mapping[str, Entry]


@cache
def library(name: str) -> Library:
    """The table of a library of :data:`LIBRARIES`."""
    table = tomllib.loads(files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8"))
    entries = _configurations(table) if name == "transformers" else _builders(table)
    return Library(table["oldest"], table["newest"], entries)


def check_version(name: str) -> None:
    """Refuse a library that is not installed, or whose version the table was not tested with.

    Raises:
        AdapterError: Says which versions were tested.
    """
    table = library(name)
    try:
        found = version(name)
    except PackageNotFoundError as error:
        raise AdapterError(f"{name} is not installed; {install_command(name)}, or {PASS}") from error
    numbers, oldest, newest = (_numbers(v) for v in (found, table.oldest, table.newest))
    if numbers[: len(oldest)] < oldest or numbers[: len(newest)] > newest:
        raise AdapterError(
            f"build records are tested with {name} {table.oldest} to {table.newest}, and {found} is installed; {PASS}"
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3])


def _builders(table: Mapping[str, Any]) -> dict[str, Entry]:
    fields = _fields(table["fields"])
    groups = table.get("architectures") or table["builders"]
    return {name: Entry(section, fields) for section, names in groups.items() for name in names.split()}


def _configurations(table: Mapping[str, Any]) -> dict[str, Entry]:
    sections = {k: v for k, v in table.items() if type(v) is dict and k != "common"}
    common = _fields(table["common"])

    def entry(kind: str) -> Entry:
        section = sections[kind]
        nested = {name: entry(of) for name, of in section.get("nested", {}).items()}
        fields = {k: v for k, v in section.items() if k not in ("classes", "nested")}
        return Entry(kind, {**common, **_fields(fields), "model_type": one_of({kind})}, nested)

    return {name: entry(kind) for kind, section in sections.items() for name in section["classes"].split()}


def _fields(groups: Mapping[str, str]) -> dict[str, Kind]:
    return {name: KINDS[kind] for kind, names in groups.items() for name in names.split()}
