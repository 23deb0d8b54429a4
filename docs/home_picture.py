"""The picture of the first page: one set of weights under four masks, and every network of a measured bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from svg_parts import drawing, grid, text

from cocktailsdk.report.numbers import bytes_text
from cocktailsdk.report.run import NetworkRow, RunReport

SIZE = 8
LOOKS = {"unstructured": "a", "n:m": "b", "channel": "c"}
WIDTH, HEIGHT = 800, 540
TOP, BOTTOM = 262, 478


def home_picture(report: RunReport) -> str:
    """The file, as the report of a run has its numbers."""
    by_pattern: dict[str, list[NetworkRow]] = {}
    for row in report.networks:
        by_pattern.setdefault(row.pattern, []).append(row)
    dense = by_pattern["dense"][0]
    count = len(report.networks)
    title = f"{count} networks in one bundle of {bytes_text(report.bundle_bytes)}"
    beside = f"{report.bundle_bytes / report.dense_bytes:.2f} times one dense checkpoint"
    told = (
        f"Above, the same {SIZE} by {SIZE} weights dense, unstructured, 2:4 and without half of the channels. Below, "
        f"test {report.metric_name} of the {count} networks of {report.model} on {report.preset}, against the share of "
        "FLOPs that dense kernels compute and against the share of weights that is left."
    )
    parts = [
        text(24, 34, title, "big"),
        text(24, 54, beside + f"; {report.model} on {report.preset}, one run", "faint"),
    ]
    parts += _masks(by_pattern)
    low = min(r.metric for r in report.networks)
    span = (100 * low, 100 * max(r.metric for r in report.networks))
    parts += _chart(
        70, 340, "FLOPs that dense kernels compute, % of dense", lambda r: r.flops / dense.flops, by_pattern, span, True
    )
    parts += _chart(440, 340, "weights that are left, % of dense", lambda r: r.params / dense.params, by_pattern, span)
    parts.append(text(24, TOP - 22, f"test {report.metric_name}, %", "faint"))
    return drawing(WIDTH, HEIGHT, f"{title}, {beside}", told, parts)


def _masks(by_pattern: dict[str, list[NetworkRow]]) -> list[str]:
    """The same weights four times, the darker the larger, with how many networks there are of each kind."""
    values = _weights()
    rank = sorted(range(SIZE * SIZE), key=lambda n: values[n])
    small = set(rank[: SIZE * SIZE // 2])
    rows = _best([sum(values[i * SIZE + j] for j in range(SIZE)) for i in range(SIZE)], SIZE // 2)
    columns = _best([sum(values[i * SIZE + j] for i in range(SIZE)) for j in range(SIZE)], SIZE // 2)

    def two_of_four(i: int, j: int) -> bool:
        run = range(i * SIZE + j // 4 * 4, i * SIZE + j // 4 * 4 + 4)
        return i * SIZE + j in sorted(run, key=lambda n: -values[n])[:2]

    kept: dict[str, Callable[[int, int], bool]] = {
        "dense": lambda i, j: True,
        "unstructured": lambda i, j: i * SIZE + j not in small,
        "n:m": two_of_four,
        "channel": lambda i, j: i in rows and j in columns,
    }
    out: list[str] = []
    for at, (pattern, keeps) in enumerate(kept.items()):
        x, y, look = 24 + 194 * at, 104, LOOKS.get(pattern, "w")

        def cell(i: int, j: int, keeps: Callable[[int, int], bool] = keeps, look: str = look) -> str:
            if not keeps(i, j):
                return 'class="rule" stroke-width="1"'
            return f'class="{look}" style="stroke:none" fill-opacity="{0.3 + 0.7 * values[i * SIZE + j]:.2f}"'

        many, indent = len(by_pattern.get(pattern, ())), 14 if pattern != "dense" else 0
        out += [_mark(pattern, x + 5, y - 15)] if indent else []
        out.append(text(x + indent, y - 11, f"{'N:M' if pattern == 'n:m' else pattern}, {many}", "strong"))
        out += grid(x, y, SIZE, SIZE, cell)
    return out


def _weights() -> Sequence[float]:
    """64 numbers in [0, 1) without order, always the same."""
    state, out = 20, []
    for _ in range(SIZE * SIZE):
        state = (1103515245 * state + 12345) % 2**31
        out.append(state / 2**31)
    return out


def _best(sums: Sequence[float], keep: int) -> set[int]:
    return set(sorted(range(len(sums)), key=lambda i: -sums[i])[:keep])


def _mark(pattern: str, x: float, y: float) -> str:
    look, x, y = LOOKS.get(pattern, "w"), round(x, 1), round(y, 1)
    if pattern == "channel":
        return f'<rect class="{look}" x="{x - 4:g}" y="{y - 4:g}" width="8" height="8"/>'
    if pattern == "n:m":
        return f'<path class="{look}" d="M{x:g} {y - 5:g} l5 9 h-10 z"/>'
    return f'<circle class="{look}" cx="{x:g}" cy="{y:g}" r="4"/>'


def _chart(
    left: float,
    width: float,
    label: str,
    share: Callable[[NetworkRow], float],
    by_pattern: dict[str, list[NetworkRow]],
    span: tuple[float, float],
    numbered: bool = False,
) -> list[str]:
    low, high = span
    step = next((s for s in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20) if (high - low) / s <= 6), 20)
    bottom = low - 0.1 * (high - low)

    def across(part: float) -> float:
        return left + width * min(part, 1.05) / 1.08

    def up(percent: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (percent - bottom) / (1.06 * (high - bottom))

    out = [f'<path class="ink" d="M{left:g} {TOP}V{BOTTOM}H{left + width:g}"/>']
    tick = -(-bottom // step) * step
    while tick <= high:
        out.append(f'<path class="rule" d="M{left:g} {up(tick):.1f}H{left + width:g}"/>')
        if numbered:
            out.append(text(left - 8, up(tick) + 4, f"{tick:g}", "", "end"))
        tick = round(tick + step, 6)
    out += [text(across(p / 100), BOTTOM + 18, str(p), "", "middle") for p in (0, 20, 40, 60, 80, 100)]
    out.append(text(left + width / 2, BOTTOM + 40, label, "faint", "middle"))
    dense = up(100 * by_pattern["dense"][0].metric)
    out.append(f'<path class="ink" stroke-dasharray="6 4" d="M{left:g} {dense:.1f}H{left + width:g}"/>')
    out.append(text(left + 8, dense - 6, "dense"))
    for pattern, rows in by_pattern.items():
        if pattern == "dense":
            continue
        places = [(across(share(r)), up(100 * r.metric)) for r in rows]
        if pattern != "n:m":
            look, line = LOOKS.get(pattern, "w"), " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            out.append(f'<polyline class="{look} line" style="fill:none" points="{line}"/>')
        out += [_mark(pattern, x, y) for x, y in places]
    return out
