import math
import re
import sys

import matplotlib
import pytest

from align.report.curves import LOG_RATIO, MAX_HOVERS, MAX_POINTS, SMOOTH_FROM, Line, curves, smoothed, thinned
from align.report.figures import BINS, histogram, score_dots
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


def test_each_histogram_has_its_own_axis_and_shows_percentages():
    charts = [histogram("a", [("all", rewards)], name="x").svg for rewards in ([0.0, 1.0], [30.0, 40.0, 40.0])]
    ticks = [[float(text) for text in re.findall(r"<text[^>]*>([\d.]+)</text>", svg)] for svg in charts]
    assert max(ticks[0][:6]) <= 1.0 and min(ticks[1][:5]) >= 30.0  # the rewards, from left to right
    assert 40 < max(ticks[0]) <= 50  # the highest tick below 1 of 2, in percent
    assert 40 < max(ticks[1][-4:]) <= 67  # and below 2 of 3
    assert BINS == 20
    assert "<svg" in histogram("one value", [("A", [1.0]), ("B", [1.0, 1.0])], name="x").svg


def tooltips(svg):
    return re.findall(r"<title>([^<]*)</title>", svg)


def test_a_histogram_shows_the_share_of_each_bin_under_the_mouse():
    found = tooltips(histogram("a", [("all", [0.0] * 3 + [20.0])], name="x").svg)
    assert len(found) == BINS
    assert (found[0], found[-1]) == ("0 to 1: all 75.0%", "19 to 20: all 25.0%")


def test_a_curve_shows_its_values_under_the_mouse():
    points = [(float(step), step / 10) for step in range(1, 11)]
    held_out = [(0.0, 3.0), (10.0, 2.0)]
    lines = [Line("training", points, 0), Line("held out", held_out, 1, marked=True)]
    found = tooltips(curves("Loss", lines, name="x").svg)
    assert found[1] == "step 2: training 0.2"
    assert found[-1] == "step 10: training 1, held out 2"
    assert len(found) == 10


def test_tooltips_of_a_long_curve_cover_its_whole_width():
    points = [(float(step), 1.0) for step in range(1, 501)]
    svg = curves("Loss", [Line("training", points, 0)], name="x").svg
    areas = [
        tuple(map(float, area))
        for area in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="[\d.]+"><', svg)
    ]
    assert len(areas) == len(tooltips(svg)) <= MAX_HOVERS
    for (left, width), (following, _) in zip(areas, areas[1:], strict=False):
        assert left + width == pytest.approx(following, abs=0.11)
    assert sum(width for _, width in areas) > 200  # of 274 units, the rest is the axis


def test_a_score_shows_its_interval_under_the_mouse():
    scores = {"dpo": {"value": 0.5, "low": 0.4, "high": 0.6}, "base": {"value": 0.1, "low": None, "high": None}}
    found = tooltips(score_dots("task", ["base", "dpo"], [("", scores)], unit="rate", name="x").svg)
    assert found == ["base: 10.0%", "dpo: 50.0% (40.0 to 60.0)"]


def test_a_smoothed_curve_keeps_a_straight_line_and_its_ends_and_averages_noise():
    straight = [(float(step), 2.0 * step) for step in range(SMOOTH_FROM)]
    assert [y for _, y in smoothed(straight)] == pytest.approx([y for _, y in straight])
    noisy = [(float(step), 5.0 + (-1) ** step) for step in range(20 * SMOOTH_FROM)]
    found = [value for _, value in smoothed(noisy)]
    assert found[0] == noisy[0][1] and max(abs(value - 5) for value in found[50:-50]) < 0.05
    gap = [*noisy[:600], (600.0, math.nan), *noisy[601:]]
    assert [place for place, (_, value) in enumerate(smoothed(gap)) if math.isnan(value)] == [600]


def test_a_long_noisy_curve_is_drawn_twice_and_a_short_one_once():
    points = [(float(step), float(step % 7)) for step in range(1, SMOOTH_FROM + 1)]
    chart = curves("Loss", [Line("training", points, 0)], name="x")
    assert len(paths(chart.svg)) == 2 and chart.note == "line: moving mean over 3 steps"
    chart = curves("Loss", [Line("training", points[:-1], 0)], name="x")
    assert len(paths(chart.svg)) == 1 and chart.note == ""


def test_a_metric_that_spans_orders_of_magnitude_is_drawn_on_a_log_scale():
    points = [(1.0, 1.0), (2.0, 10.0), (3.0, 100.0)]
    chart = curves("Loss", [Line("a", points, 0)], name="x", allow_log=True)
    (drawn,) = paths(chart.svg)
    assert re.findall(r"<text[^>]*>(1|10|100)</text>", chart.svg.partition("optimizer step")[2]) == ["1", "10", "100"]
    (_, low), (_, middle), (_, high) = drawn
    assert middle - high == pytest.approx(low - middle, abs=1e-2)  # equal factors are equal distances
    for values in ([0.0, 100.0], [1.0, LOG_RATIO], [-1.0, 100.0]):
        chart = curves("Loss", [Line("a", list(enumerate(values)), 0)], name="x", allow_log=True)
        assert "log" not in chart.note
    assert "log" not in curves("Loss", [Line("a", points, 0)], name="x").note


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
