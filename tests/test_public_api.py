"""Public names and signatures are those that are written down: nobody's code breaks by accident."""

from __future__ import annotations

import difflib

from public_api import TEXT, described, listed, public_api

import cocktailsdk


def test_public_names_and_signatures_are_those_written_down() -> None:
    written = TEXT.read_text(encoding="utf-8")
    found = public_api(listed(written))
    lines = difflib.unified_diff(written.splitlines(), found.splitlines(), "written", "found", n=0, lineterm="")
    changed = "\n".join(lines)
    assert not changed, (
        f"{changed}\nThe public names or signatures changed. Where that is meant: python tests/public_api.py --write, "
        "and a line in CHANGELOG.md"
    )


def test_what_is_written_down_is_all_that_is_public() -> None:
    section = TEXT.read_text(encoding="utf-8").split("## cocktailsdk\n")[1].partition("\n\n")[0]
    names = [line.partition("(")[0].partition(":")[0].split()[-1] for line in section.splitlines() if line[0] != " "]
    assert names == sorted(cocktailsdk.__all__)
    assert {"cocktailsdk.errors", "cocktailsdk.models", "cocktailsdk.choosing.bench"} <= {*listed(TEXT.read_text())}


def test_a_signature_is_written_as_in_the_source() -> None:
    def example(a: int, *rest: str, b: dict[str, list[int]] | None = None, c: object = object, **more: float) -> None:
        """Of every kind of parameter."""

    def keywords(*, sizes: tuple[int, ...] = (1, 2)) -> str:
        return str(sizes)

    assert list(described("example", example)) == [
        "def example(a: int, *rest: str, b: dict[str, list[int]] | None = None, c: object = …, **more: float)"
    ]
    assert list(described("keywords", keywords)) == ["def keywords(*, sizes: tuple[int, ...] = (1, 2)) -> str"]
