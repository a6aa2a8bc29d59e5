import math
import re
import sys

import matplotlib
import pytest

from align.report.figures import BINS, MAX_POINTS, Line, curves, histogram, score_dots, thinned
from align.report.formatting import change_text, duration, fixed, interval_text, percent, plain, scaled, size


def paths(svg):
    """Return the points of each path that is drawn in the colour of a series."""
    drawn = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--(?:one|two)\)', svg)
    return [[tuple(map(float, point)) for point in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)] for path in drawn]


def test_a_curve_is_drawn_through_its_points():
    values = [3.0, 1.0, 2.0, 1.5, 1.25]
    points = list(enumerate(values, 1))
    (drawn,) = paths(curves("Loss", [Line("training", points, 0)], name="x").svg)
    assert len(drawn) == len(values)
    (x0, y0), (x1, y1) = drawn[0], drawn[1]
    for (step, value), (x, y) in zip(points, drawn, strict=True):
        assert x == pytest.approx(x0 + (x1 - x0) * (step - 1), abs=1e-2)
        assert y == pytest.approx(y0 + (y1 - y0) * (value - 3) / (1 - 3), abs=1e-2)
    assert y1 > y0  # a smaller value is drawn lower


def test_long_curves_are_averaged_in_blocks_and_gaps_are_kept():
    num = 2 * MAX_POINTS + 1
    points = [(float(step), step * 2.0) for step in range(num)]
    found = thinned(points)
    assert len(found) <= MAX_POINTS and found[0] == (1.0, 2.0)  # of 0, 1 and 2
    assert found[-1][1] == pytest.approx(2 * found[-1][0])
    values = [y for _, y in thinned([(1, 1.0), (2, math.nan), (3, math.inf), (4, 4.0)])]
    assert [math.isfinite(value) for value in values] == [True, False, False, True]


@pytest.mark.parametrize("values", [[math.nan, math.nan], [1.0], [2.0, 2.0], [1e-12, 1e12]])
def test_degenerate_values_are_drawn_without_a_warning(values):
    assert "<svg" in curves("Loss", [Line("a", list(enumerate(values)), 1, dashed=True)], name="x").svg


def test_histograms_share_an_axis_and_show_percentages():
    charts = [histogram("a", [("", rewards)], (0.0, 4.0), name="x").svg for rewards in ([0.0, 1.0], [3.0, 4.0, 4.0])]
    ticks = [re.findall(r"<text[^>]*>([\d.]+)</text>", svg)[:5] for svg in charts]
    assert ticks[0] == ticks[1]
    top = [max(float(text) for text in re.findall(r"<text[^>]*>([\d.]+)</text>", svg)[5:]) for svg in charts]
    assert 40 < top[0] <= 50 < top[1] <= 67  # the highest ticks below 1 of 2 and 2 of 3, in percent
    assert BINS == 20
    assert "<svg" in histogram("one value", [("A", [1.0]), ("B", [1.0, 1.0])], (1.0, 1.0), name="x").svg


def test_names_are_drawn_literally():
    rows = ["$a_b$", "<b>&"]
    scores = {name: {"value": 0.5, "low": None, "high": None} for name in rows}
    svg = score_dots("task", rows, [("", scores)], unit="rate", name="x").svg
    assert "$a_b$" in svg and "&lt;b&gt;&amp;" in svg and "<b>" not in svg


def test_drawing_does_not_change_matplotlib_settings():
    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    curves("Loss", [Line("a", [(1, 1.0), (2, 2.0)], 0)], name="x")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (scaled(999), "999"),
        (scaled(1_234_567), "1.23 M"),
        (scaled(999_700), "1 M"),
        (scaled(3.21e15, "FLOP"), "3.21 PFLOP"),
        (scaled(12, "FLOP"), "12 FLOP"),
        (scaled(None), "unknown"),
        (percent(0.412), "41.2%"),
        (percent(0.0000288), "0.0029%"),
        (percent(0.0), "0.0%"),
        (size(3 * 2**30), "3 GiB"),
        (size(0), "0 B"),
        (duration(59.96), "60 s"),
        (duration(3600), "1 h"),
        (duration(90061), "1 d 1 h"),
        (duration(3661), "1 h 1 min"),
        (plain(12345), "12,345"),
        (plain(0.000123456), "0.0001235"),
        (fixed(0.0), "0.000"),
        (fixed(0.00012), "0.00012"),
        (fixed(-1.23456), "-1.235"),
        (change_text(-0.0312, rate=True), "−3.1 pp"),
        (change_text(0.5, rate=False), "+0.500"),
        (interval_text({"low": 0.1, "high": 0.25}, rate=True), "10.0 to 25.0"),
        (interval_text({"low": -0.1, "high": 0.25}, rate=False, signed=True), "−0.100 to +0.250"),
        (interval_text({"low": None, "high": None}, rate=True), ""),
    ],
)
def test_numbers_are_formatted(formatted, expected):
    assert formatted == expected
