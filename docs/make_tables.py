"""Writes the measured tables and pictures of README.md and docs/ from benchmarks/results/.

    python docs/make_tables.py                               rewrite them
    python docs/make_tables.py --check                       fail where they are not what the results say
    python docs/make_tables.py runs/digits/report.json …     first take these reports into benchmarks/results/

No number in these tables is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

from bundle_tables import bundle_block
from deploy_tables import deploy_block
from detection_tables import detection_block
from home_picture import home_picture
from home_tables import home_block
from one_shot_tables import one_shot_block
from paper_tables import paper_blocks
from scaling_tables import scaling_block
from serving_tables import serving_block
from switching_tables import switching_block
from trained_tables import trained_block
from versions_tables import versions_block

from cocktailsdk.report.figure import write_figure
from cocktailsdk.report.numbers import bytes_text, count_text, duration_text, flops_text
from cocktailsdk.report.run import NetworkRow, RunReport, read_report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
TEXT_RUNS = ("language_model", "intent_classifier")  # of examples/, kept together in text.json
BEGIN, END = "<!-- results: begin (docs/make_tables.py writes this) -->", "<!-- results: end -->"


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path, help="report.json files of finished runs")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something would change")
    options = parser.parse_args()
    for report in options.reports:
        read = read_report(report)
        if read is None:
            parser.error(f"{report} is no report")
        RESULTS.mkdir(parents=True, exist_ok=True)
        if read.preset in TEXT_RUNS:
            _keep_text_run(read)
        else:
            shutil.copyfile(report, RESULTS / f"{read.preset}.json")
    stale = False
    for page, block in {**PAGES, **PICTURES}.items():
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        new = block() if page in PICTURES else replaced(text, block())
        stale |= new != text
        if new != text and not options.check:
            page.write_text(new, encoding="utf-8")
    if options.check:
        if stale:
            print("the tables are not what benchmarks/results/ says: run python docs/make_tables.py")
        return int(stale)
    ASSETS.mkdir(parents=True, exist_ok=True)
    for report in reports():
        write_figure(report, ASSETS / f"{report.preset}.png")
    return 0


def reports() -> list[RunReport]:
    """Reports of training runs among the results."""
    paths = sorted(RESULTS.glob("*.json"), key=lambda p: (p.stem != "digits", p.stem))
    return [report for path in paths if _is_run(path) and (report := read_report(path)) is not None]


def _is_run(path: Path) -> bool:
    """Whether a file of results is the report of a training run; other benchmarks keep theirs in the same folder."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(data, dict) and "networks" in data


def kill_block() -> str:
    """Every moment at which a run was killed, and what became of it."""
    path = RESULTS / "kill_test.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows, alike = found["moments"], sum(row["differs"] == [] for row in found["moments"])
    out = [
        f"`python benchmarks/kill_test.py`: {alike} of {len(rows)} ended with the same bytes (torch {found['torch']}, "
        f"{found['machine']}).",
        "",
        "| | recipe | killed while | drawn | bundle |",
        "| --: | --- | --- | --- | --- |",
    ]
    for row in rows:
        drawn = "at random" if row["told"][0].startswith("after") else "within"
        result = f"differs: {', '.join(row['differs'])}" if row["differs"] else "same bytes"
        out.append(
            f"| {row['number'] + 1} | `{row['recipe']}` | {', then '.join(row['phases'])} | {drawn} | {result} |"
        )
    return "\n".join(out) + "\n"


def replaced(text: str, blocks: str | Sequence[str]) -> str:
    """A page with what stands between its marks replaced, pair of marks by pair."""
    done = ""
    for block in [blocks] if isinstance(blocks, str) else blocks:
        before, found, rest = text.partition(BEGIN)
        _, closed, text = rest.partition(END)
        if not found or not closed:
            raise SystemExit(f"a page lacks the marks {BEGIN!r} and {END!r}")
        done += f"{before}{BEGIN}\n\n{block}\n{END}"
    if BEGIN in text:
        raise SystemExit(f"a page has more marks {BEGIN!r} than there are tables")
    return done + text


def results_block() -> str:
    """A table for each run, and a line on its bytes, time and machine."""
    return "\n".join(_run_block(r) for r in reports())


def _run_block(report: RunReport) -> str:
    dense = next(r for r in report.networks if r.pattern == "dense")
    patterns = list(dict.fromkeys(r.pattern for r in report.networks))
    lines = [
        f"**{report.model} on {report.preset}**, test {report.metric_name} in %, seed {report.seed}:",
        "",
        "| | networks | mean | lowest | highest | parameters kept | FLOPs |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for pattern in patterns:
        rows = [r for r in report.networks if r.pattern == pattern]
        metrics = [100 * r.metric for r in rows]
        lines.append(
            f"| {pattern} | {len(rows)} | {mean(metrics):.2f} | {min(metrics):.2f} | {max(metrics):.2f} "
            f"| {_range([r.params for r in rows], dense.params)} | {_range([r.flops for r in rows], dense.flops)} |"
        )
    environment = report.environment
    lines += [
        "",
        f"The bundle of {len(report.networks)} networks has {bytes_text(report.bundle_bytes)}, "
        f"{report.bundle_bytes / report.dense_bytes:.2f} times one dense checkpoint ({bytes_text(report.dense_bytes)}; "
        f"{len(report.networks)} of them: {bytes_text(len(report.networks) * report.dense_bytes)}). Trained in "
        f"{duration_text(report.seconds)} minutes on {environment.get('machine', '?')} (threads: "
        f"{environment.get('threads', '?')}), torch {environment.get('torch', '?')}. The dense network has "
        f"{count_text(dense.params)} parameters and {flops_text(dense.flops)}.",
        "",
    ]
    return "\n".join(lines)


def _text_runs() -> list[RunReport]:
    path = RESULTS / "text.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []
    return [
        RunReport(
            **{**run, "networks": tuple(NetworkRow(**n) for n in run["networks"]), "alphas": tuple(run["alphas"])}
        )
        for run in runs
    ]


def _keep_text_run(report: RunReport) -> None:
    """Put a run of an example on text in the place of an earlier one; its table needs no history or masks."""
    report = replace(report, configuration={}, history={}, masks={}, kept=())
    runs = {run.preset: run for run in (*_text_runs(), report)}
    text = json.dumps({"runs": [runs[name].to_dict() for name in TEXT_RUNS if name in runs]}, indent=1)
    (RESULTS / "text.json").write_text(text + "\n", encoding="utf-8")


def text_block() -> str:
    """A table of all networks for each run of the examples on text."""
    return "\n".join(_text_run_block(run) for run in _text_runs())


def _text_run_block(run: RunReport) -> str:
    dense, environment = run.networks[0], run.environment
    given, share = float(environment["dense as given"]), run.metric_name == "accuracy"

    def number(metric: float) -> str:
        return f"{100 * metric:.1f} %" if share else f"{metric:.2f}"

    lines = [
        f"**{run.model}** (`{environment['command']}`), {run.metric_name} on test data, seed {run.seed}; the dense "
        f"network as it was given has {number(given)}:",
        "",
        f"| network | sparsity | {run.metric_name} | parameters kept | FLOPs |",
        "| --- | --: | --: | --: | --: |",
    ]
    lines += [
        f"| `{row.name}` | {row.sparsity_exact:.3f} | {number(row.metric)} | {count_text(row.params)} "
        f"| {100 * row.flops / dense.flops:.0f} % |"
        for row in run.networks
    ]
    lines += [
        "",
        f"The bundle has {bytes_text(run.bundle_bytes)}, {run.bundle_bytes / run.dense_bytes:.2f} times one dense "
        f"checkpoint. Co-trained in {duration_text(run.seconds)} minutes on {environment.get('machine', '?')} "
        f"(threads: {environment.get('threads', '?')}), torch {environment.get('torch', '?')}, cocktailsdk "
        f"{environment.get('cocktailsdk', '?')}.",
        "",
    ]
    return "\n".join(lines)


def _range(values: list[int], whole: int) -> str:
    low, high = (100 * v / whole for v in (min(values), max(values)))
    return f"{low:.0f} %" if round(low) == round(high) else f"{low:.0f} to {high:.0f} %"


def zoo_block() -> str:
    """What channel pruning of many models comes to, and a row for each."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "zoo"))
    from rows import OURS, THEIRS, read, summary, told

    rows = read(RESULTS / "zoo.jsonl")
    models = list(dict.fromkeys(model for _, model in rows))
    lines = [f"- {line.strip()}" for line in summary(rows, models).lines()]
    lines += [
        "",
        "| model | cocktailsdk: error, FLOPs kept | group s | slim s | Torch-Pruning: error, FLOPs kept | graph s |",
        "| --- | --- | --: | --: | --- | --: |",
    ]
    for model in models:
        ours, theirs = rows.get((OURS, model), {}), rows.get((THEIRS, model), {})
        cells = [told(ours or None), ours.get("group_s", ""), ours.get("slim_s", "")]
        cells += [told(theirs or None).replace("|", "/"), theirs.get("group_s", "")]
        lines.append(f"| {model} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def quality_block() -> str:
    """Every method's line, by task, and the main ones' accuracy by network."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from quality_rows import KINDS, lines, methods, network_means, read
    from quality_tasks import TASKS

    rows, known, out = read(RESULTS / "quality.json"), methods(), []
    for task, title in ((t.name, t.title) for t in TASKS.values()):
        mine = [row for row in rows if row["task"] == task]
        if not mine:
            continue
        out += [
            f"**{title}**: test accuracy in %, {max(r['budget'] for r in mine)} steps for a method's whole run.",
            "",
            f"| method | runs | seeds | dense | {' | '.join(KINDS)} | all sparse | ± | stored | minutes |",
            "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        ]
        for x in lines(mine):
            numbers = [x.dense, *(x.means[k] for k in KINDS), x.sparse, x.spread]
            cells = [f"`{x.method}`", len(known[x.method].runs) if x.method in known else 1, x.seeds]
            cells += ["" if v is None else f"{v:.2f}" for v in numbers]
            cells += [f"{x.stored:.0f} x", f"{x.seconds / 60:.0f}"]
            out.append("| " + " | ".join(map(str, cells)) + " |")
        shown = {x.method: network_means(mine, x.method) for x in lines(mine)}
        shown = {m: shown[m] for m in SHOWN if m in shown}
        out += ["", f"| network | {' | '.join(f'`{m}`' for m in shown)} |", "| --- |" + " --: |" * len(shown)]
        for name in dict.fromkeys(name for means in shown.values() for name in means):
            cells = [f"{100 * means[name]:.1f}" if name in means else "" for means in shown.values()]
            out.append(f"| `{name}` | " + " | ".join(cells) + " |")
        machines = sorted({row["machine"] for row in mine})
        out += [
            "",
            f"Commands: `{mine[0]['command'].partition(' --method')[0]}`, with `--method` for some. {machines[0]}.",
            "",
        ]
    return "\n".join(out) + "\n"


def merging_block() -> str:
    """What merging costs with each exact device."""
    path = RESULTS / "merging.json"
    if not path.is_file():
        return ""
    row = json.loads(path.read_text(encoding="utf-8"))
    whole = row["devices"]["full search"]["seconds"]
    out = [
        f"**Merging, {row['title']}** (`{row['command']}`), {row['machine']}; all choose the same shares:",
        "",
        "| with | networks judged | seconds | of the full search |",
        "| --- | --: | --: | --: |",
    ]
    for name, found in row["devices"].items():
        judged, seconds = f"{found['judged']} of {found['to_judge']}", found["seconds"]
        out.append(f"| {name} | {judged} | {seconds:.1f} | {seconds / whole:.2f} |")
    return "\n".join(out) + "\n"


SHOWN = ("cocktail", "paper", "imp", "us-net", "refilling", "ast")
"""Methods of which every network's accuracy is shown."""

PAGES: dict[Path, Callable[[], str | Sequence[str]]] = {
    ROOT / "README.md": lambda: (home_block("docs/"), results_block()),
    ROOT / "docs" / "index.md": home_block,
    ROOT / "docs" / "reproducing.md": paper_blocks,
    ROOT / "docs" / "results.md": results_block,
    ROOT / "docs" / "install.md": versions_block,
    ROOT / "docs" / "resuming.md": kill_block,
    ROOT / "docs" / "text.md": text_block,
    ROOT / "docs" / "trained.md": trained_block,
    ROOT / "docs" / "scores.md": one_shot_block,
    ROOT / "docs" / "zoo.md": zoo_block,
    ROOT / "docs" / "scaling.md": scaling_block,
    ROOT / "docs" / "serving.md": serving_block,
    ROOT / "docs" / "switching.md": switching_block,
    ROOT / "docs" / "bundle-format.md": bundle_block,
    ROOT / "docs" / "exporting.md": deploy_block,
    ROOT / "docs" / "detection.md": detection_block,
    ROOT / "docs" / "quality.md": lambda: quality_block() + "\n" + merging_block(),
}
"""Every page with marks, and what stands between them."""

PICTURES: dict[Path, Callable[[], str]] = {ASSETS / "cocktail.svg": lambda: home_picture(reports()[0])}
"""Drawings that are made of results, and are checked as pages are; the others are for people to compare."""


if __name__ == "__main__":
    sys.exit(main())
