"""The report's page as text, its figures as files, and the command that writes both."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_runs import NAMES, OLD, REPORT, TRAINED, profile
from typer.testing import CliRunner, Result

from cocktailsdk.cli.main import app
from cocktailsdk.report.costs_charts import command_for, cost_charts, front, metric_text, safe_name, scale_of
from cocktailsdk.report.drawing import inline_svg, write_chart
from cocktailsdk.report.figures import write_figures
from cocktailsdk.report.looks import DARK, PAPER, looks_of
from cocktailsdk.report.page import ReportedRun, report_page
from cocktailsdk.report.page_masks import sparsity_maps
from cocktailsdk.report.page_tables import differences
from cocktailsdk.report.run import NetworkRow, read_report
from cocktailsdk.report.training_charts import merge_charts, rounds_of, training_charts

RUN = Path("runs") / "digits"


def run(*arguments: str, columns: int = 80) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})


class Page(HTMLParser):
    """Elements, and what is wrong with their nesting and ids."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")


@pytest.fixture(scope="module")
def page() -> str:
    return report_page([ReportedRun(REPORT, RUN, (profile(),))])


def test_the_page_asks_nothing_of_any_other_place(page: str) -> None:
    parsed = Page(page)
    assert parsed.wrong == []
    assert "default-src 'none'" in page
    for tag, attributes in parsed.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(key) or "#"
            assert value.startswith("#") or (tag, value) == ("link", "data:,"), (tag, value)
    assert not re.search(r"url\((?!#)|@import|https?://", re.sub(r'xmlns[:\w]*="[^"]*"', "", page))


def test_every_id_is_there_once_and_links_lead_to_ids(page: str) -> None:
    both = report_page([ReportedRun(REPORT, RUN, (profile(),)), ReportedRun(OLD, Path("runs") / "old")])
    for text in (page, both):
        elements = Page(text).elements
        ids = [i for _, a in elements if (i := a.get("id"))]
        assert len(ids) == len(set(ids))
        for _, attributes in elements:
            if (target := attributes.get("href") or "").startswith("#"):
                assert target[1:] in ids


def test_the_score_is_among_the_provenance_and_in_no_report_without_one(page: str, tmp_path: Path) -> None:
    assert "masks ranked by" not in page and "score" not in REPORT.to_dict()
    record = {"patterns": {"n:m": "wanda"}, "calibration": {"examples": 8, "fingerprint": "ab12"}}
    scored = replace(REPORT, score=record)
    text = report_page([ReportedRun(scored, RUN, (profile(),))])
    assert "masks ranked by" in text and "wanda; calibrated on 8 examples (ab12)" in text
    scored.write(tmp_path)
    assert read_report(tmp_path) == replace(scored, metric_name=scored.metric_name)


def test_every_network_is_a_mark_with_its_command_and_a_row(page: str) -> None:
    marks = [a for _, a in Page(page).elements if a.get("class") == "mark"]
    for row in REPORT.networks:
        told = [str(a["aria-label"]) for a in marks if a.get("data-network") == row.name]
        command = f"cocktail-cli export {RUN} {row.name} "
        assert sum(command in t for t in told) == 4  # FLOPs, bytes, two batch sizes
        assert f'data-row="{row.name}"' in page
    assert all(a["role"] == "img" and a["tabindex"] in ("0", "-1") for a in marks)
    assert "a processor" in page


def test_charts_are_explained_and_stand_before_a_table(page: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 4 + 2 + 2
    for figure in figures:
        assert re.search(r'<svg[^>]*aria-label="[^"]{20,}"', figure)
        assert "<figcaption>" in figure
        assert "<table>" in figure
        assert figure.count('tabindex="0"') == 2  # one stop for the marks, one for the table


def test_sections_say_what_there_is(page: str) -> None:
    text = re.sub(r"<[^>]+>", " ", page)
    for said in (
        "resnet8 on digits",
        "it is the first convolution",
        "unstructured with channel: 50 % on average, 25 % by chance",
        "12 of 15 candidate networks",
        "paper",
        "ab" * 32,
        "round 2, α 0.4, chosen",
    ):
        assert said in text or said in page, said
    assert "at most 94.00 %, given up" in page


def test_an_old_report_is_shown_with_what_it_has() -> None:
    page = report_page([ReportedRun(OLD, RUN)])
    assert Page(page).wrong == []
    assert page.count("made by an earlier release") == 3
    assert "does not merge rounds" in page
    assert "cocktail-cli bench" in page
    assert {c.name for c in cost_charts(OLD, RUN)} == {"flops", "parameters"}
    # its held-out metrics it has
    assert [c.name for c in training_charts(OLD)] == ["held-out"]


def test_a_run_from_trained_weights_shows_passes_need_and_the_dense_network_before_and_after() -> None:
    page = report_page([ReportedRun(TRAINED, RUN)])
    assert Page(page).wrong == []
    assert "97.50 % before, 98.00 % after" in page
    assert ">passes</button>" in page
    assert TRAINED.passes == {"dense": 1200, "unstructured@0.2": 300, "2:4": 450, "channel@0.5": 2100}
    assert re.search(r'<tr id="a-network-channel@0\.5".*>2,100</td>', page)
    assert re.search(r'<tr id="a-network-channel@0\.25".*(\n.*)?>0</td>', page)
    need = next(chart for chart in training_charts(TRAINED) if chart.name == "need")
    assert need.title in page
    assert need.table.columns == ("network", "step 0", "step 2,500", "step 5,000", "passes in all")
    rows = {row[0]: row[1:] for row in need.table.rows}
    assert rows["channel@0.5"] == ("+2", "+0.5", "", "2,100")
    assert {s.network: len(s.marks) for s in need.series} == dict.fromkeys(("dense", *NAMES), 2)
    both = report_page([ReportedRun(TRAINED, Path("a")), ReportedRun(OLD, Path("b"))])
    assert Page(both).wrong == []
    assert (OLD.passes, OLD.dense_before, REPORT.passes) == ({}, None, {})


def test_names_are_text_wherever_they_come_from() -> None:
    evil = "\"><script>alert(1)</script>&'$(rm)"
    rows = (*REPORT.networks[:-1], replace(REPORT.networks[-1], name=evil, pattern=evil))
    said = {"model": evil, "preset": evil, "environment": {evil: evil}, "configuration": {evil: evil}}
    report = replace(REPORT, networks=rows, kept=({"what": evil, "where": evil, "reason": evil},), **said)
    page = report_page([ReportedRun(report, Path(evil))])
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert Page(page).wrong == []


def test_two_runs_are_laid_side_by_side() -> None:
    other = replace(REPORT, seed=4, networks=(*REPORT.networks[:-1], replace(REPORT.networks[-1], metric=0.92)))
    page = report_page([ReportedRun(REPORT, Path("a")), ReportedRun(other, Path("b"))])
    assert Page(page).wrong == []
    assert "+2.00 points" in page
    assert re.search(r"seed</th><td>3</td><td>4<", page)
    ticks = [
        re.findall(r'id="[ab]-flops-text_\d+"', s)
        for s in re.findall(r'<svg data-run="[ab]".*?</svg>', page, re.DOTALL)
    ]
    assert len(ticks[0]) == len(ticks[1])  # within the same limits
    assert "asked to do the same" in report_page([ReportedRun(REPORT, Path("a")), ReportedRun(REPORT, Path("b"))])
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 0}) == [("b.c", "2", "3"), ("d", "–", "0")]


def test_the_front_is_what_nothing_beats() -> None:
    costs = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0}
    assert front(costs, {"a": 0.5, "b": 0.9, "c": 0.8, "d": 0.9}, "max") == {"a", "b"}
    assert front(costs, {"a": 0.5, "b": 0.9, "c": 0.8, "d": 0.1}, "min") == {"a", "d"}
    assert front({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5}, "max") == {"a", "b"}


def test_metrics_that_are_no_shares_are_shown_as_they_are() -> None:
    perplexity = replace(
        REPORT, metric_name="perplexity", metric_mode="min", networks=(NetworkRow("dense", "dense", 0, 0, 4.2, 1, 2),)
    )
    assert scale_of(perplexity) == (1.0, "perplexity")
    assert metric_text(perplexity, 4.2) == "4.2000"
    assert metric_text(REPORT, 0.9972) == "99.72 %"
    assert metric_text(REPORT, None) == "–"


@pytest.mark.parametrize(
    ("name", "safe"), [("2:4", "2-4"), ("channel@0.5+2:4", "channel@0.5+2-4"), ("a/b\\c*?", "a-b-c"), ("::", "network")]
)
def test_files_are_named_safely_on_any_system(name: str, safe: str) -> None:
    assert safe_name(name) == safe
    assert command_for(Path("runs"), name).endswith(f" {safe}.onnx")


def test_networks_stand_in_the_order_they_were_made() -> None:
    assert rounds_of(REPORT) == {
        "unstructured@0.2": 1, "2:4": 1, "channel@0.25": 1, "unstructured@0.5": 2, "channel@0.5": 2
    }  # fmt: skip
    maps = {m.pattern: m for m in sparsity_maps(REPORT)}
    assert list(maps) == ["unstructured", "n:m", "channel"]
    assert maps["channel"].rounds == ["round 1", "round 2"]
    assert maps["unstructured"].values == [[0.0, 0.0], [0.0, 0.25], [0.5, 0.5], [0.1234, 0.1234]]
    names, means = maps["unstructured"].by_block()
    assert names == ["conv1", "layer1.{0,1}.conv1 (2)", "fc"]
    assert means[1] == [0.25, 0.375]


def test_colours_stand_out_from_the_paper() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((light(a), light(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    many = replace(REPORT, networks=tuple(replace(REPORT.networks[0], name=p, pattern=p) for p in "abcde"))
    looks = looks_of([REPORT, many])
    assert len({look.marker for look in looks.values()}) == len(looks) == 9
    for look in looks.values():
        assert contrast(look.light, PAPER) >= 3
        assert contrast(look.dark, DARK[PAPER]) >= 3


def test_charts_have_the_data_and_take_the_pages_colours() -> None:
    flops = cost_charts(REPORT, RUN)[0]
    svg = inline_svg(flops, looks_of([REPORT]), "x")
    root = ElementTree.fromstring(svg)
    marks = [g for g in root.iter("g") if g.attrib.get("class") == "mark"]
    assert [g.attrib["data-network"] for g in marks] == [r.name for r in REPORT.networks]
    assert "var(--pattern-1)" in svg
    assert not re.search("#(?:1f2328|0072b2|ffffff)", svg)
    spots = {g.attrib["data-network"]: float(g.find("circle").attrib["cx"]) for g in marks}  # type: ignore[union-attr]
    assert spots["channel@0.5"] < spots["channel@0.25"] < spots["dense"]
    assert {s.network for c in training_charts(REPORT) for s in c.series} == {"dense", *NAMES}
    losses = training_charts(REPORT)[0]
    assert max(x for s in losses.series for x, _ in s.line) == 5
    alphas, curve = merge_charts(REPORT)
    assert [(m.x, m.y) for m in alphas.series[0].marks] == [(2, 0.4)]
    assert [(m.x, round(m.y), m.hollow, m.strong) for m in curve.series[0].marks] == [
        (1.0, 93, False, False), (0.4, 95, False, True), (0.1, 94, True, False)
    ]  # fmt: skip


def test_figures_are_files_that_do_not_depend_on_the_clock(tmp_path: Path) -> None:
    made = write_figures(REPORT, RUN, tmp_path / "figures", formats=(".svg",))
    assert {p.stem for p in made} == {
        "flops", "bytes", "losses", "held-out", "alphas", "interpolation", "overlap",
        "sparsity-unstructured", "sparsity-n-m", "sparsity-channel",
    }  # fmt: skip
    assert all(ElementTree.parse(p).getroot().tag.endswith("svg") for p in made)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(p.name for p in made)
    chart, looks = merge_charts(REPORT)[0], looks_of([REPORT])
    for name in ("a.png", "b.png"):
        write_chart(chart, looks, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_the_page_and_finds_profiles(tmp_path: Path) -> None:
    REPORT.write(tmp_path)
    profile().write(tmp_path / "bundle.profile.json")
    done = run("report", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["html"] == str(tmp_path / "report.html")
    assert told["runs"][0]["profiles"] == 1
    assert told["runs"][0]["report"]["networks"][0]["name"] == "dense"
    assert "Latency, batch 8" in (tmp_path / "report.html").read_text(encoding="utf-8")
    other = tmp_path / "some where"
    other.mkdir()
    OLD.write(other)
    elsewhere = other / "page.html"
    both = run("report", "--compare", str(tmp_path), str(other), "--html", str(elsewhere))
    assert both.exit_code == 0, both.output
    assert both.stdout == f"page: {elsewhere}\n"
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("report",), 2, "one RUN"),
        (("report", ".", "--compare", ".", "."), 2, "one RUN"),
        (("report", "--compare", "."), 2, "2"),
        (("report", "--compare", ".", ".", "--profile", "x"), 2, "profiles"),
        (("report", "not/here"), 1, "not/here"),
        (("report", "."), 1, "report.json"),
        (("report", "run", "--profile", "none.json"), 1, "none.json"),
        (("report", "damaged"), 1, "is no report"),
    ],
)
def test_what_cannot_be_reported_is_said(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "damaged"):
        (tmp_path / name).mkdir()
    REPORT.write(tmp_path / "run")
    (tmp_path / "damaged" / "report.json").write_text('{"format": 1, "networks": [{}]}')
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert not list(tmp_path.rglob("*.html"))


def test_reporting_loads_no_torch(tmp_path: Path) -> None:
    REPORT.write(tmp_path)
    program = (
        "import sys\n"
        "from cocktailsdk.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "report", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_reports_are_read_as_they_were_written(tmp_path: Path) -> None:
    REPORT.write(tmp_path)
    assert read_report(tmp_path) == REPORT
