"""Draw metrics over optimizer steps: averaged, smoothed, on a log scale where that helps, with tooltips."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from align.report.figures import HEIGHT, STYLE, Chart, new_figure
from align.report.formatting import plain, scaled
from align.report.svg import SERIES, Hover, svg_element

MAX_POINTS = 600  # of a curve; longer ones are drawn as means of equal blocks of steps
SMOOTH_FROM = 60  # points; shorter curves are drawn as they are
SMOOTH_SHARE = 30  # a smoothed point is the mean over this fraction of the curve (1/30)
LOG_RATIO = 30  # a positive metric whose largest value is this many times its smallest is drawn on a log scale
STEPS = "optimizer step"  # what the horizontal axis shows
MAX_HOVERS = 30  # parts of a curve with a tooltip

Points = Sequence[tuple[float, float]]  # (optimizer step, value)


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart."""

    label: str
    points: Points
    colour: int  # index into SERIES
    dashed: bool = False
    marked: bool = False  # draw each point with a marker
    run: str = ""  # in tooltips

    @property
    def style(self) -> str:
        """Return the CSS classes of its legend entry."""
        return f"c{self.colour + 1}{' dashed' if self.dashed else ''}{' marked' if self.marked else ''}"


def curves(title: str, lines: Sequence[Line], *, name: str, allow_log: bool = False, axis: str = STEPS) -> Chart:
    """Draw metrics over optimizer steps, or over what `axis` says; long ones are smoothed, their values faint behind.

    With `allow_log` the axis is logarithmic where the values are positive and span more than a factor of LOG_RATIO.
    """
    drawn = [(line, thinned(line.points)) for line in lines]
    is_log = allow_log and _is_wide([y for _, points in drawn for _, y in points])
    with rc_context(STYLE):
        figure, axes = new_figure(HEIGHT)
        for line, points in drawn:
            _plot(axes, line, points)
        axes.set_xlabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis == STEPS))
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=True, axis="y")
        svg = svg_element(figure, axes, name=name, title=title, hovers=list(_curve_hovers(drawn, axis)))
    # Each label once, in the style of the first run
    legend = {line.label: (line.label, line.style) for line in reversed(lines)}
    return Chart(title, svg, list(legend.values())[::-1], _note(lines, is_log=is_log))


def thinned(points: Points) -> list[tuple[float, float]]:
    """Return at most MAX_POINTS points, as means of equal blocks; a value that is not finite leaves a gap."""
    block = _block(len(points))
    blocks = [_finite(points[start : start + block]) for start in range(0, len(points), block)]
    return [(math.fsum(x for x, _ in each) / len(each), math.fsum(y for _, y in each) / len(each)) for each in blocks]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Return the centred moving mean over 1/SMOOTH_SHARE of the points; a gap stays a gap.

    The window shrinks towards both ends, so that the first and the last point keep their own values.
    """
    half = _half_window(len(points))
    last = len(points) - 1
    found: list[tuple[float, float]] = []
    for place, (x, y) in enumerate(points):
        reach = min(half, place, last - place)
        near = [value for _, value in points[place - reach : place + reach + 1] if math.isfinite(value)]
        found.append((x, math.fsum(near) / len(near) if math.isfinite(y) else math.nan))
    return found


def _half_window(num_points: int) -> int:
    return num_points // SMOOTH_SHARE // 2 if num_points >= SMOOTH_FROM else 0


def _block(num_points: int) -> int:
    return max(1, math.ceil(num_points / MAX_POINTS))


def _finite(points: Points) -> Points:
    """Return the points with infinities replaced by NaN, so that they can be summed."""
    return [(x, y if math.isfinite(y) else math.nan) for x, y in points]


def _is_wide(values: Sequence[float]) -> bool:
    """Return whether all finite values are positive and span more than a factor of LOG_RATIO."""
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) > LOG_RATIO * min(known)


def _plot(axes: Axes, line: Line, points: Points) -> None:
    colour = SERIES[line.colour]
    dashes = "--" if line.dashed else "-"
    if not line.marked and _half_window(len(points)):
        axes.plot(*zip(*points, strict=True), "-", color=colour, linewidth=0.8, alpha=0.3)
        points = smoothed(points)
    marker = "o" if line.marked or len(points) == 1 else ""
    width = 1.0 if line.marked else 1.4
    axes.plot(*zip(*points, strict=True), dashes, color=colour, linewidth=width, marker=marker, markersize=4)


def _note(lines: Sequence[Line], *, is_log: bool) -> str:
    """Return how the curves of a chart were averaged, and the scale where it is logarithmic."""
    longest = max(len(line.points) for line in lines)
    block = _block(longest)
    half = 0 if all(line.marked for line in lines) else _half_window(math.ceil(longest / block))
    parts = [
        f"each point is the mean of {block} steps" if block > 1 else "",
        f"line: moving mean over {(2 * half + 1) * block} steps" if half else "",
        "log scale" if is_log else "",
    ]
    return "; ".join(part for part in parts if part)


def _curve_hovers(drawn: Sequence[tuple[Line, Points]], axis: str) -> Iterator[Hover]:
    """Yield a tooltip for each vertical part of the chart: the step and the value of each line."""
    longest = max((points for _, points in drawn), key=len)
    stride = math.ceil(len(longest) / MAX_HOVERS)
    steps = [x for x, _ in longest[::stride]]
    middles = [(one + two) / 2 for one, two in pairwise(steps)]
    for step, (left, right) in zip(steps, pairwise([-math.inf, *middles, math.inf]), strict=True):
        values: dict[str, str] = {}
        for line, points in drawn:
            inside = [(abs(x - step), y) for x, y in points if left < x <= right]
            if inside:
                label = f"{line.label} ({line.run})" if line.run else line.label
                values[label] = plain(min(inside)[1])
        span = (max(left, steps[0] - 1e9), min(right, steps[-1] + 1e9))
        place = f"step {step:,.0f}" if axis == STEPS else scaled(step)
        yield Hover(f"{place}: " + ", ".join(f"{name} {value}" for name, value in values.items()), x=span)
