"""What the drawings of docs/ share: paper and ink that follow light and dark, text, grids of weights.

A drawing has its own paper, so that it can be read on any page, and says in a title and a description what it shows.
Nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

CELL = 13

STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#1f2328}"
    ".code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
    ".big{font-size:16px;font-weight:600}.strong{font-weight:600}.faint{fill:#59636e}"
    ".paper{fill:#fff}.rule{stroke:#d1d9e0;fill:none}.ink{stroke:#1f2328;fill:none}"
    ".cell{fill:#dfe5ec}.gone{fill:#0072b2}.stays{fill:url(#hatch)}.hatch{stroke:#818b98;stroke-width:1.5}"
    ".a{fill:#0072b2;stroke:#0072b2}.b{fill:#008060;stroke:#008060}.c{fill:#b86e00;stroke:#b86e00}"
    ".line{fill:none;stroke-width:1.6}.w{fill:#1f2328}"
    "@media(prefers-color-scheme:dark){"
    "text{fill:#e6edf3}.faint{fill:#9da7b3}.paper{fill:#14171c}.rule{stroke:#3d444d}.ink{stroke:#e6edf3}"
    ".cell{fill:#313843}.gone{fill:#56b4e9}.hatch{stroke:#8b949e}.w{fill:#e6edf3}"
    ".a{fill:#56b4e9;stroke:#56b4e9}.b{fill:#2fc48d;stroke:#2fc48d}.c{fill:#e69f00;stroke:#e69f00}"
    ".line{fill:none}}"
)

HATCH = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="cell" width="5" height="5"/><path class="hatch" d="M0 0V5"/></pattern></defs>'
)


def drawing(width: int, height: int, title: str, told: str, parts: Sequence[str]) -> str:
    """A whole file."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-labelledby="title told">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="told">{escape(told)}</desc>',
            f"<style>{STYLE}</style>",
            HATCH,
            f'<rect class="paper" width="{width}" height="{height}" rx="6"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def text(x: float, y: float, words: str, look: str = "", anchor: str = "start") -> str:
    """A line of text."""
    look = f' class="{look}"' if look else ""
    at = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:g}" y="{y:g}"{look}{at}>{escape(words)}</text>'


def grid(x: float, y: float, rows: int, columns: int, look: Callable[[int, int], str]) -> list[str]:
    """Cells; ``look`` gives each one's attributes, nothing where there is to be none."""
    out = []
    for i in range(rows):
        for j in range(columns):
            attributes = look(i, j)
            if attributes:
                at = f'x="{x + j * CELL:g}" y="{y + i * CELL:g}" width="{CELL - 2}" height="{CELL - 2}"'
                out.append(f"<rect {attributes} {at}/>")
    return out
