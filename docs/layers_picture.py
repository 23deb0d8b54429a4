"""The picture of the layers on the page for contributors, drawn from the contract in ``pyproject.toml``.

    python docs/layers_picture.py   write docs/assets/layers.svg, which a test compares

The phrase beside a module is the first line of its docstring.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

from svg_parts import drawing, text

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "assets" / "layers.svg"

LINE, PADDING, GAP = 20, 8, 6
LEFT, WIDTH, INDENT = 44, 900, 110


def layers() -> list[list[str]]:
    """The contract's lines from the top, each with its modules; planned ones are in brackets."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (c for c in data["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    return [[module.strip() for module in line.split("|")] for line in contract["layers"]]


def phrase(module: str) -> str:
    """What a module is, by the first line of its docstring."""
    if module.startswith("("):
        return "planned"
    package = ROOT / "cocktailsdk" / module
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".").replace("``", "")


def layers_picture() -> str:
    """The whole file."""
    parts, y = [], 60
    for modules in layers():
        height = LINE * len(modules) + PADDING
        parts.append(f'<rect class="rule" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 24}" height="{height}" rx="4"/>')
        for i, module in enumerate(modules):
            line = y + PADDING / 2 + LINE * (i + 0.7)
            planned = module.startswith("(")
            parts.append(text(LEFT + 12, line, module.strip("()"), "code faint" if planned else "code strong"))
            parts.append(text(LEFT + 12 + INDENT, line, phrase(module), "faint"))
        y += height + GAP
    bottom = y - GAP
    arrow = f"M24 64V{bottom - 4}M19 {bottom - 11}l5 7l5 -7"
    head = [
        text(LEFT, 28, "What may import what", "big"),
        text(LEFT, 46, "A module imports from the boxes below its own, never from above or beside it", "faint"),
        f'<path class="ink line" d="{arrow}"/>',
    ]
    told = "From the top: " + "; ".join(", ".join(modules) for modules in layers()) + "."
    return drawing(WIDTH, bottom + 20, "The layers of cocktailsdk", told, [*head, *parts])


if __name__ == "__main__":
    PICTURE.write_text(layers_picture(), encoding="utf-8")
