"""A run, or two side by side, as one page that asks nothing of any other place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.optional import check_installed
from .chart import Chart
from .costs_charts import cost_charts, metric_text
from .course_charts import course_charts, merge_charts
from .drawing import Limits, inline_svg, limits_of
from .html import chart_table, escape, facts, figure, heading, symbol
from .looks import DARK, GRID, INK, PAPER, Look, looks_of
from .numbers import bytes_text, duration_text
from .page_masks import kept_section, overlap_section, sparsity_section
from .page_tables import comparison_table, differences_table, networks_table
from .run import RunReport

if TYPE_CHECKING:
    from ..choosing.profile import DeviceProfile

__all__ = ["ReportedRun", "report_page"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What the page may do: its own styles and script, and no request."""

OLD = (
    "This run's report does not have it: it was made by an earlier release, or by a program that did not add it "
    "(<code>RunReport(…, **recorded(net, trainer))</code>). Where the run's state is still there, remove "
    "report.json and give the command that trained it again."
)

HINT = (
    "Point at a mark, or reach it with Tab and the arrow keys: it names its network and the command that takes it out; "
    "Enter goes to its row. Large, outlined marks are on the front: no other network is both as cheap and better."
)


@dataclass(frozen=True)
class ReportedRun:
    """A run to be shown.

    Attributes:
        report: Its report.
        folder: Where it is, as its commands are to name it.
        profiles: Measurements of its networks.
    """

    report: RunReport
    folder: Path
    profiles: Sequence[DeviceProfile] = field(default=())

    @property
    def title(self) -> str:
        """``resnet8 on digits``."""
        of = f" on {self.report.preset}" if self.report.preset else ""
        return f"{self.report.model or 'networks'}{of}"


def report_page(runs: Sequence[ReportedRun]) -> str:
    """The page.

    Args:
        runs: One, or two to be laid side by side.
    """
    check_installed("matplotlib", purpose="drawing the charts of a report")
    page = _Page(tuple(runs), looks_of(r.report for r in runs))
    title = " and ".join(dict.fromkeys(f"{run.title} ({run.folder.name})" for run in runs))
    parts = {name: text for name, text in page.sections().items() if text}
    links = "".join(f'<li><a href="#{_id(name)}">{escape(name)}</a></li>' for name in parts)
    body = "".join(
        f'<section aria-labelledby="{_id(name)}">{heading(2, name, _id(name))}{text}</section>'
        for name, text in parts.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_asset("page.css")}{_colours(page.looks)}</style>
</head>
<body>
<a class="skip" href="#networks">To the networks</a>
<header>
<h1>{escape(title)}</h1>
{page.pair(_facts)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<form class="filters" hidden onsubmit="return false" aria-label="Filters">
<fieldset><legend>Patterns</legend>{page.boxes()}</fieldset>
<label>Network <input type="search" id="search" autocomplete="off" placeholder="channel@0.4"></label>
<span id="shown" class="quiet" role="status"></span>
</form>
<main>
{body}
</main>
<div id="tip" role="tooltip" hidden></div>
<script>{_asset("page.js")}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class _Page:
    runs: tuple[ReportedRun, ...]
    looks: dict[str, Look]

    def sections(self) -> dict[str, str]:
        """Their headings and contents."""
        out = {}
        if len(self.runs) == 2:
            out["Compared"] = comparison_table(*self.runs) + differences_table(*self.runs)
        out["Networks"] = (
            _p(HINT)
            + self.charts(lambda run: cost_charts(run.report, run.folder, run.profiles))
            + self.pair(lambda run, i: networks_table(run.report, run.folder, _prefix(i)))
            + self.pair(lambda run, _: "" if run.profiles else _p(f"Latency: not measured here. {_bench(run)}"))
        )
        out["Training"] = self.charts(lambda run: course_charts(run.report), OLD)
        out["Merging"] = self.charts(
            lambda run: merge_charts(run.report),
            "This run's recipe does not merge rounds: there is one set of weights throughout.",
        )
        out["Sparsity by layer and round"] = self.pair(
            lambda run, i: sparsity_section(run.report, _prefix(i)) or _p(OLD)
        )
        out["Overlap of masks"] = self.pair(lambda run, i: overlap_section(run.report, _prefix(i)) or _p(OLD))
        out["Kept whole, and why"] = self.pair(lambda run, _: kept_section(run.report) or _p(OLD))
        out["Environment and provenance"] = self.pair(lambda run, _: _provenance(run))
        return out

    def pair(self, part: Callable[[ReportedRun, int], str]) -> str:
        """A part of every run; two beside each other where there is room."""
        if len(self.runs) == 1:
            return part(self.runs[0], 0)
        inner = "".join(f"<div>{heading(3, run.folder.name)}{part(run, i)}</div>" for i, run in enumerate(self.runs))
        return f'<div class="pair">{inner}</div>'

    def charts(self, made: Callable[[ReportedRun], list[Chart]], without: str = "") -> str:
        """The charts of every run; where there are two, the same ones beside each other within the same limits."""
        each = [made(run) for run in self.runs]
        if len(self.runs) == 1:
            return (
                f'<div class="charts">{"".join(self.figure(c, 0) for c in each[0])}</div>' if each[0] else _p(without)
            )
        names = dict.fromkeys(c.name for charts in each for c in charts)
        rows = []
        for name in names:
            found = [next((c for c in charts if c.name == name), None) for charts in each]
            limits = limits_of([c for c in found if c is not None])
            cells = (
                self.figure(c, i, limits) if c is not None else _p("not recorded or not measured in this run")
                for i, c in enumerate(found)
            )
            rows.append('<div class="pair">' + "".join(f"<div>{cell}</div>" for cell in cells) + "</div>")
        return "".join(rows) or _p(without)

    def figure(self, chart: Chart, run: int, limits: Limits | None = None) -> str:
        """A chart with its title, and its table behind it."""
        prefix = _prefix(run)
        svg = inline_svg(chart, self.looks, f"{prefix}-{chart.name}", limits)
        name = f" ({self.runs[run].folder.name})" if len(self.runs) > 1 else ""
        return figure(
            chart.title + name, svg.replace("<svg", f'<svg data-run="{prefix}"', 1), chart.summary, chart_table(chart)
        )

    def boxes(self) -> str:
        """A box for every pattern, with its look."""
        shown = {row.pattern for run in self.runs for row in run.report.networks}
        out = []
        for i, (name, look) in enumerate(self.looks.items()):
            if name in shown:
                box = f'<input type="checkbox" name="pattern" value="{escape(name)}" checked>'
                out.append(f"<label>{box}{symbol(look.marker, i)}{escape(name)}</label>")
        return "".join(out)


def _facts(run: ReportedRun, _: int) -> str:
    r = run.report
    known = [n for n in r.networks if math.isfinite(n.metric)]
    best = max(known, key=lambda n: n.metric if r.metric_mode == "max" else -n.metric, default=None)
    dense = next((n for n in r.networks if n.pattern == "dense"), None)
    told = {
        "networks in one bundle": str(len(r.networks)),
        f"dense {r.metric_name}": metric_text(r, dense.metric) if dense is not None else "–",
        f"best {r.metric_name}": "–" if best is None else f"{metric_text(r, best.metric)} ({best.name})",
        "bundle": f"{bytes_text(r.bundle_bytes)}, {r.bundle_bytes / max(r.dense_bytes, 1):.2f} × one dense checkpoint",
        "training time": duration_text(r.seconds),
    }
    return facts(told)


def _provenance(run: ReportedRun) -> str:
    r = run.report
    told = {
        "folder": str(run.folder),
        "model": r.model or "–",
        "preset": r.preset or "–",
        "recipe": str(_of(r.configuration, "training", "recipe", "name") or "–"),
        "seed": str(r.seed),
        **{str(k): str(v) for k, v in r.environment.items()},
        "configuration (SHA-256)": r.fingerprint or "–",
    }
    history = r.history
    if history:
        told |= {
            "optimizer steps": f"{history.get('steps', 0):,}",
            "forward and backward passes": f"{history.get('passes', 0):,}",
        }
        if history.get("to_judge"):
            told["merging judged"] = f"{history['judged']:,} of {history['to_judge']:,} candidate networks"
        if history.get("skipped"):
            told["steps left out (not finite)"] = f"{history['skipped']:,}"
    for profile in run.profiles:
        machine = ", ".join(f"{k} {v}" for k, v in profile.machine.items())
        told[f"measured with {profile.runtime}"] = f"{machine}, threads {profile.threads}, {profile.repeats} repeats"
    rows = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td class="long">{escape(v)}</td></tr>' for k, v in told.items()
    )
    inner = f"<caption>Where the figures are from</caption><tbody>{rows}</tbody>"
    out = f'<div class="scroll"><table class="words">{inner}</table></div>'
    if r.configuration:
        asked = escape(json.dumps(r.configuration, indent=1))
        out += f'<details><summary>Configuration</summary><pre tabindex="0">{asked}</pre></details>'
    return out


def _of(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _bench(run: ReportedRun) -> str:
    return f"<code>cocktail-cli bench {escape(str(run.folder))}</code> measures it; the report then has it."


def _p(text: str) -> str:
    return f'<p class="quiet">{text}</p>' if text else ""


def _id(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def _prefix(run: int) -> str:
    return "ab"[run]


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _colours(looks: dict[str, Look]) -> str:
    def variables(pairs: Iterable[tuple[str, str]]) -> str:
        return "".join(f"--{name}: {value}; " for name, value in pairs)

    light = variables((f"pattern-{i}", look.light) for i, look in enumerate(looks.values()))
    dark = variables((f"pattern-{i}", look.dark) for i, look in enumerate(looks.values()))
    paper = variables([("ink", DARK[INK]), ("grid", DARK[GRID]), ("paper", DARK[PAPER]), ("panel", "#161b22")])
    more = variables([("quiet", "#9198a1"), ("accent", "#79b8ff"), ("heat", "#9fd0ff")])
    return f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {paper}{more}{dark}}} }}\n"
