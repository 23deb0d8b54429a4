"""The report's page in a browser without a screen: no errors, no requests, its data, filters and keys, on any paper."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_runs import REPORT, profile

from cocktailsdk.report.page import ReportedRun, report_page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="there is no chromium with its chromedriver"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # Chromium has no sandbox for root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(300)
    driver.set_script_timeout(300)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report_page([ReportedRun(REPORT, Path("run"), (profile(),))]), encoding="utf-8")
    return file


def shown(browser: Any, width: int, scheme: str, file: Path) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(file.as_uri())


def test_it_opens_without_errors_or_requests_and_fits(browser: Any, page: Path) -> None:
    papers = set()
    for width, scheme in ((1280, "light"), (360, "dark")):
        browser.get_log("performance")
        shown(browser, width, scheme, page)
        assert browser.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        assert {u for u in asked if not u.startswith("data:")} == {page.as_uri()}
        found = browser.execute_script("""
            const root = document.documentElement;
            const text = document.querySelector("figure > svg text");
            return {over: root.scrollWidth - root.clientWidth, paper: getComputedStyle(document.body).backgroundColor,
                    ink: getComputedStyle(text).fill, size: text.getBoundingClientRect().height};""")
        assert found["over"] == 0  # what is wider scrolls by itself
        assert found["size"] > 9  # pixels: read without magnifying
        papers.add((found["paper"], found["ink"]))
    assert papers == {("rgb(255, 255, 255)", "rgb(31, 35, 40)"), ("rgb(13, 17, 23)", "rgb(230, 237, 243)")}


def test_filters_take_away_marks_rows_and_columns(browser: Any, page: Path) -> None:
    shown(browser, 1280, "light", page)
    count = """
        const left = (s) => document.querySelectorAll(s + ":not(.off)").length;
        return [left(".mark[data-pattern=channel]"), left("tr[data-row]"), left(".mark[data-network='2:4']"),
                document.getElementById("shown").textContent];"""
    channels, rows, runs, said = browser.execute_script(count)
    assert channels > 8
    assert rows == len(REPORT.networks)
    assert said == "6 of 6 networks shown"
    browser.execute_script("document.querySelector('input[value=channel]').click()")
    assert browser.execute_script(count) == [0, rows - 2, runs, "4 of 6 networks shown"]
    browser.execute_script("""
        const search = document.getElementById("search");
        search.value = "2:4";
        search.dispatchEvent(new Event("input"));""")
    assert browser.execute_script(count) == [0, 1, runs, "1 of 6 networks shown"]


def test_keys_go_from_mark_to_mark_and_to_the_row(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    shown(browser, 1280, "light", page)
    stops = browser.execute_script("""
        return [...document.querySelectorAll("figure > svg")].map(
            (svg) => svg.querySelectorAll(".mark[tabindex='0']").length);""")
    assert set(stops) == {1}
    browser.execute_script("document.querySelector('.mark[tabindex=\"0\"]').focus()")
    names = []
    for _ in range(2):
        browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        mark = browser.switch_to.active_element
        names.append(mark.get_attribute("data-network"))
        tip = browser.execute_script("const t = document.getElementById('tip'); return t.hidden ? '' : t.textContent;")
        assert f"cocktail-cli export run {names[-1]} " in tip
    assert names == ["unstructured@0.2", "unstructured@0.5"]
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.querySelector(':target').dataset.row") == "unstructured@0.5"
    assert browser.get_log("browser") == []


def test_tables_are_sorted_by_their_headings(browser: Any, page: Path) -> None:
    shown(browser, 1280, "light", page)
    sort = """
        const button = [...document.querySelectorAll("th button")].find((b) => b.textContent === "FLOPs");
        button.click();
        return [button.closest("th").getAttribute("aria-sort"),
                button.closest("table").tBodies[0].rows[0].dataset.row];"""
    assert browser.execute_script(sort) == ["ascending", "channel@0.5"]
    assert browser.execute_script(sort)[0] == "descending"


def test_two_runs_fit_a_phone(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "both.html"
    runs = [ReportedRun(REPORT, Path("a")), ReportedRun(replace(REPORT, seed=4), Path("b"), (profile(),))]
    file.write_text(report_page(runs), encoding="utf-8")
    shown(browser, 360, "light", file)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    assert browser.execute_script("return document.querySelectorAll('.pair figure > svg').length") > 12
