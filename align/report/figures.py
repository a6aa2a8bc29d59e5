"""Charts as inline SVG: text stays text, colours are the page's, and matplotlib's global state stays as it was.

Each chart is as wide as a phone; a page lays them out side by side where there is room.
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

from align.report.quantities import NATS, PLAIN, RATE

WIDTH, HEIGHT = 3.8, 2.3  # inches of 72 units
ROW_HEIGHT = 0.32  # of a policy in a chart of scores
MOST_POINTS = 600  # of a line; more than that and each point is the mean of as many steps
BINS = 20
UNITS = {RATE: "per cent", NATS: "nats a token, less is better", PLAIN: ""}

# Stand-ins that no other colour has, each replaced by what the page calls it, so that dark pages have dark charts.
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
    "text.parse_math": False,  # a name may hold a dollar
}


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int  # of SERIES
    dashed: bool = False
    marked: bool = False  # a few points, each of them shown

    @property
    def look(self) -> str:
        """How the page's legend draws it."""
        return f"c{self.colour + 1}{' dashed' if self.dashed else ''}{' marked' if self.marked else ''}"


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its legend, which the page writes in its own text."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]]  # label, look
    note: str = ""


def curves(title: str, lines: Sequence[Line], *, name: str) -> Chart:
    """Values over optimizer steps."""
    longest = max(len(line.points) for line in lines)
    with rc_context(STYLE):
        figure, axes = _figure(HEIGHT)
        for line in lines:
            xs, ys = zip(*thinned(line.points), strict=True)
            marker = "o" if line.marked or len(xs) == 1 else ""
            look = "--" if line.dashed else "-"
            width = 1.0 if line.marked else 1.4
            axes.plot(xs, ys, look, color=SERIES[line.colour], linewidth=width, marker=marker, markersize=4)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=True, axis="y")
        svg = _svg(figure, name, title)
    note = f"each point is the mean of {_block(longest)} steps" if _block(longest) > 1 else ""
    return Chart(
        title, svg, list({line.label: (line.label, line.look) for line in reversed(lines)}.values())[::-1], note
    )


def score_dots(
    title: str, rows: Sequence[str], runs: Sequence[tuple[str, Mapping[str, Any]]], *, unit: str, name: str
) -> Chart:
    """Value and interval of each policy on one task; `runs` are (label, {policy: score})."""
    scale = 100 if unit == RATE else 1
    with rc_context(STYLE):
        figure, axes = _figure(0.6 + ROW_HEIGHT * len(rows) * (1 if len(runs) == 1 else 1.4))
        for number, (_, scores) in enumerate(runs):
            for place, row in enumerate(rows):
                if row in scores:
                    _dot(axes, scores[row], place + 0.22 * number, colour=SERIES[number], scale=scale)
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
    """Shares of responses by reward, with the mean of each run as a vertical line; bins lie over `span`."""
    low, high = span if span[0] < span[1] else (span[0] - 0.5, span[1] + 0.5)
    with rc_context(STYLE):
        figure, axes = _figure(HEIGHT)
        for number, (_, rewards) in enumerate(runs):
            colour = SERIES[number]
            kind: Any = "step" if number else "stepfilled"
            shares = [100 / len(rewards)] * len(rewards)
            look: dict[str, Any] = {"color": colour, "alpha": None if number else 0.55}
            axes.hist(rewards, bins=BINS, range=(low, high), weights=shares, histtype=kind, **look)
            axes.axvline(math.fsum(rewards) / len(rewards), color=colour, linewidth=1.4, linestyle="--")
        axes.set_xlabel("reward")
        axes.set_ylabel("% of responses")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=True, axis="y")
        svg = _svg(figure, name, title)
    return Chart(title, svg, [(f"{label}, mean dashed", f"c{n + 1}") for n, (label, _) in enumerate(runs)])


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, or means of blocks of them where they are many; what is not finite leaves a gap."""
    block = _block(len(points))
    cut = [points[start : start + block] for start in range(0, len(points), block)]
    means = [tuple(math.fsum(part) / len(of) for part in zip(*of, strict=True)) for of in map(_finite, cut)]
    return [(x, y) for x, y in means]


def _block(num_points: int) -> int:
    return max(1, math.ceil(num_points / MOST_POINTS))


def _finite(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Points whose sum can be formed: an infinity counts as what is not a number."""
    return [(x, y if math.isfinite(y) else math.nan) for x, y in points]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=0)
    return figure, axes


def _dot(axes: Axes, score: Mapping[str, Any], place: float, *, colour: str, scale: int) -> None:
    value, low, high = (scale * (score.get(part) or 0) for part in ("value", "low", "high"))
    if score.get("low") is not None and score.get("high") is not None:
        axes.plot((low, high), (place, place), color=colour, linewidth=1.6)
    axes.plot((value,), (place,), color=colour, marker="o", markersize=5)


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an element of a page: ids of its own, the page's colours and letters, no address of anything."""
    with rc_context({"svg.hashsalt": name}):
        stream = io.StringIO()
        nothing: Any = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)  # savefig would lay it out twice
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
