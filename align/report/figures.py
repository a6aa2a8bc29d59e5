"""Draw charts with matplotlib as inline SVG.

Text stays text, colours are CSS variables of the page, and matplotlib's global settings are left unchanged. Each chart
is as wide as a phone screen; on wider screens the page puts them side by side.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from align.report.formatting import NATS, PLAIN, RATE

WIDTH, HEIGHT = 3.8, 2.3  # inches, at 72 SVG units each
ROW_HEIGHT = 0.32  # inches for each policy in a chart of scores
MAX_POINTS = 600  # of a curve; longer ones are drawn as means of equal blocks of steps
BINS = 20
UNITS = {RATE: "%", NATS: "nats per token (lower is better)", PLAIN: ""}

# Placeholder colours, replaced by CSS variables of the page, so that charts follow its light and dark themes.
INK, FAINT = "#010203", "#040506"
SERIES = ("#0a0b01", "#0a0b02")
CSS = {INK: "var(--ink)", FAINT: "var(--line)", SERIES[0]: "var(--one)", SERIES[1]: "var(--two)"}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,  # names may contain a dollar sign
}


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int  # index into SERIES
    dashed: bool = False
    marked: bool = False  # draw each point with a marker

    @property
    def style(self) -> str:
        """Return the CSS classes of its legend entry."""
        return f"c{self.colour + 1}{' dashed' if self.dashed else ''}{' marked' if self.marked else ''}"


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart and its legend, which the page renders as text."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]]  # label, CSS classes
    note: str = ""


def curves(title: str, lines: Sequence[Line], *, name: str) -> Chart:
    """Draw metrics over optimizer steps."""
    longest = max(len(line.points) for line in lines)
    with rc_context(STYLE):
        figure, axes = _figure(HEIGHT)
        for line in lines:
            xs, ys = zip(*thinned(line.points), strict=True)
            marker = "o" if line.marked or len(xs) == 1 else ""
            dashes = "--" if line.dashed else "-"
            width = 1.0 if line.marked else 1.4
            axes.plot(xs, ys, dashes, color=SERIES[line.colour], linewidth=width, marker=marker, markersize=4)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=True, axis="y")
        svg = _svg(figure, name, title)
    note = f"each point is the mean of {_block(longest)} steps" if _block(longest) > 1 else ""
    # Each label once, in the style of the first run
    legend = {line.label: (line.label, line.style) for line in reversed(lines)}
    return Chart(title, svg, list(legend.values())[::-1], note)


def score_dots(
    title: str, rows: Sequence[str], runs: Sequence[tuple[str, Mapping[str, Any]]], *, unit: str, name: str
) -> Chart:
    """Draw the score and interval of each policy on one task; `runs` are (label, {policy: score})."""
    scale = 100 if unit == RATE else 1
    with rc_context(STYLE):
        figure, axes = _figure(0.6 + ROW_HEIGHT * len(rows) * (1 if len(runs) == 1 else 1.4))
        for number, (_, scores) in enumerate(runs):
            for position, row in enumerate(rows):
                if row in scores:
                    _dot(axes, scores[row], position + 0.22 * number, colour=SERIES[number], scale=scale)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(UNITS[unit])
        axes.grid(visible=True, axis="x")
        svg = _svg(figure, name, title)
    legend = [(label, f"c{number + 1} marked") for number, (label, _) in enumerate(runs)]
    return Chart(title, svg, legend if len(runs) > 1 else [])


def histogram(
    title: str, runs: Sequence[tuple[str, Sequence[float]]], span: tuple[float, float], *, name: str
) -> Chart:
    """Draw the distribution of rewards over `span`, in percent of responses, with each run's mean as a dashed line."""
    low, high = span if span[0] < span[1] else (span[0] - 0.5, span[1] + 0.5)
    with rc_context(STYLE):
        figure, axes = _figure(HEIGHT)
        for number, (_, rewards) in enumerate(runs):
            colour = SERIES[number]
            kind: Any = "step" if number else "stepfilled"
            weights = [100 / len(rewards)] * len(rewards)
            alpha = None if number else 0.55
            axes.hist(rewards, BINS, range=(low, high), weights=weights, histtype=kind, color=colour, alpha=alpha)
            axes.axvline(math.fsum(rewards) / len(rewards), color=colour, linewidth=1.4, linestyle="--")
        axes.set_xlabel("reward")
        axes.set_ylabel("% of responses")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=True, axis="y")
        svg = _svg(figure, name, title)
    return Chart(title, svg, [(f"{label} (dashed: mean)", f"c{n + 1}") for n, (label, _) in enumerate(runs)])


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MAX_POINTS points, as means of equal blocks; a value that is not finite leaves a gap."""
    block = _block(len(points))
    blocks = [_finite(points[start : start + block]) for start in range(0, len(points), block)]
    return [(math.fsum(x for x, _ in each) / len(each), math.fsum(y for _, y in each) / len(each)) for each in blocks]


def _block(num_points: int) -> int:
    return max(1, math.ceil(num_points / MAX_POINTS))


def _finite(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return the points with infinities replaced by NaN, so that they can be summed."""
    return [(x, y if math.isfinite(y) else math.nan) for x, y in points]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=0)
    return figure, axes


def _dot(axes: Axes, score: Mapping[str, Any], y: float, *, colour: str, scale: int) -> None:
    value, low, high = (scale * (score.get(part) or 0) for part in ("value", "low", "high"))
    if score.get("low") is not None and score.get("high") is not None:
        axes.plot((low, high), (y, y), color=colour, linewidth=1.6)
    axes.plot((value,), (y,), color=colour, marker="o", markersize=5)


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """Return the figure as an SVG element with unique ids, CSS colours and fonts, and no external references."""
    with rc_context({"svg.hashsalt": name}):
        stream = io.StringIO()
        no_metadata: Any = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(stream, metadata=no_metadata)  # savefig would compute the layout twice
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in CSS.items():
        text = text.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a viewBox"
    body = text[text.index(">") + 1 :]
    return Markup('<svg class="chart" role="img" aria-label="{}" {}>').format(title, Markup(box[0])) + Markup(body)
