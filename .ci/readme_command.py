"""Prints one of the two commands of README.md: its first or second ``bash`` block."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def commands(text: str) -> list[str]:
    """The contents of a page's ``bash`` blocks."""
    return [block.strip() for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


if __name__ == "__main__":
    readme = Path(__file__).resolve().parent.parent / "README.md"
    print(commands(readme.read_text(encoding="utf-8"))[int(sys.argv[1]) - 1])
