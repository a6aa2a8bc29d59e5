"""Test the page in a browser: it fits the screen and runs no generated code."""

import json
import re
from html import escape, unescape

import pytest
from browser import dumped, needs_browser
from run_folders import make_run

from align.report import write_report
from align.synth.measures import write_measures
from align.synth.measures.written import Yields

PHONE, DESKTOP = 360, 1200  # CSS pixels of width
MIN_FONT_SIZE = 8  # CSS pixels, of text in charts
HOSTILE = "<script>document.body.dataset.hacked = 1</script><img src=x onerror='document.body.dataset.hacked = 1'>"
LONG_WORD = "antidisestablishmentarianism" * 20

MEASURE = """
<script>
addEventListener("load", () => {
  const height = document.documentElement.scrollHeight
  document.querySelectorAll("details").forEach(each => each.open = true)
  const wide = [...document.querySelectorAll("body *")].filter(each => !each.closest("table")
    && each.getBoundingClientRect().right > innerWidth + 0.5).map(each => each.tagName + "." + each.className)
  const charts = [...document.querySelectorAll("svg.chart")]
  const letters = charts.flatMap(chart => [...chart.querySelectorAll("text")].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * chart.clientWidth / chart.viewBox.baseVal.width))
  parent.document.documentElement.dataset.measured = JSON.stringify({
    height, inner: innerWidth, scroll: document.documentElement.scrollWidth, wide,
    charts: charts.map(each => [each.clientWidth, each.clientHeight]), letters: Math.min(...letters),
    columns: new Set(charts.map(each => Math.round(each.getBoundingClientRect().left))).size,
    hacked: document.body.dataset.hacked || null, scripts: document.scripts.length,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg.chart text")).fill,
  })
})
</script></body>"""

pytestmark = needs_browser


def measured(page, tmp_path, *, width, flags=()):
    """Return what a script measures in a copy of the page.

    The page is shown in a frame, because a window of this browser is at least 500 pixels wide.
    """
    text = page.read_text("utf-8")
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", text)
    inside = escape(text.replace(policy[0], "").replace("</body>", MEASURE))
    frame = tmp_path / "frame.html"
    style = f"width: {width}px; height: 800px; border: 0"
    page_around = f'<!DOCTYPE html><meta charset="utf-8"><iframe style="{style}" srcdoc="{inside}"></iframe>'
    frame.write_text(page_around, "utf-8")
    return json.loads(unescape(re.search(r'data-measured="([^"]*)"', dumped(frame, tmp_path, flags))[1]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    one = make_run(folder / "one", run="a-name-of-a-run-that-goes-on-and-on", prompt=HOSTILE, response=LONG_WORD)
    two = make_run(folder / "two", run="other", seed=8, response=HOSTILE)
    part = make_run(folder / "part", done=("base", "code_sft"))
    for run in (one, two):
        rows = [
            {"id": f"{family} {number}", "family": family, "text": f"{HOSTILE} {number} {LONG_WORD}", "reward": number}
            for family in ("code", LONG_WORD[:40], HOSTILE)
            for number in range(9)
        ]
        yields = Yields(asked={"code": 20}, dropped={"code": {HOSTILE: 5, LONG_WORD[:80]: 6}})
        write_measures(run / "answers1", rows, yields=yields)
    return {
        "one": write_report(one),
        "both": write_report(one, folder / "both.html", compare=[two]),
        "part": write_report(part),
    }


@pytest.mark.parametrize("name", ["one", "both", "part"])
def test_a_phone_needs_no_horizontal_scrolling(pages, tmp_path, name):
    found = measured(pages[name], tmp_path, width=PHONE)
    assert found["inner"] == PHONE
    assert found["scroll"] == PHONE
    assert found["wide"] == []
    assert found["charts"] and all(width > 250 and height > 80 for width, height in found["charts"])
    assert found["letters"] >= MIN_FONT_SIZE
    assert found["columns"] <= 2  # one on the page, one inside collapsed sections
    assert found["hacked"] is None and found["scripts"] == 1  # the script of this test


def test_a_wide_screen_shows_charts_side_by_side(pages, tmp_path):
    found = measured(pages["one"], tmp_path, width=DESKTOP)
    assert found["inner"] == found["scroll"] == DESKTOP
    assert found["wide"] == []
    assert found["columns"] >= 4
    assert found["letters"] >= MIN_FONT_SIZE


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_comparison_is_at_most_twice_as_long_as_a_run(pages, tmp_path, width):
    one, both = (measured(pages[name], tmp_path, width=width)["height"] for name in ("one", "both"))
    assert one < both <= 2 * one


def test_the_dark_theme_covers_page_and_charts(pages, tmp_path):
    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    dark = measured(pages["part"], tmp_path, width=PHONE, flags=["--blink-settings=preferredColorScheme=0"])
    light = measured(pages["part"], tmp_path, width=PHONE, flags=["--blink-settings=preferredColorScheme=1"])
    assert brightness(dark["paper"]) < 60 and brightness(dark["ink"]) > 180
    assert brightness(light["paper"]) > 240 and brightness(light["ink"]) < 60


def test_the_page_cannot_run_scripts(pages, tmp_path):
    copy = tmp_path / "with_script.html"
    script = "<script>document.documentElement.dataset.measured = 1</script></body>"
    copy.write_text(pages["part"].read_text("utf-8").replace("</body>", script), "utf-8")
    dom = dumped(copy, tmp_path)
    assert "<script>" in dom and "data-measured" not in dom
