"""Draw scores and distributions with matplotlib as inline SVG.

Text stays text, colours are CSS variables of the page, and matplotlib's global settings are left unchanged. Each chart
is as wide as a phone screen; on wider screens the page puts them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from align.report.formatting import NATS, PLAIN, RATE, interval_text, plain, score_text
from align.report.svg import DPI, FAINT, INK, SERIES, Hover, svg_element

WIDTH, HEIGHT = 3.8, 2.3  # inches
ROW_HEIGHT = 0.66  # inches for each policy in a chart of scores; about the height of a row of the table beside it
BINS = 20
UNITS = {RATE: "%", NATS: "nats per token (lower is better)", PLAIN: ""}

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
class Chart:
    """A chart and its legend, which the page renders as text."""

    title: str
    svg: Markup
    legend: Sequence[tuple[str, str]]  # label, CSS classes
    note: str = ""


def score_dots(
    title: str, rows: Sequence[str], runs: Sequence[tuple[str, Mapping[str, Any]]], *, unit: str, name: str
) -> Chart:
    """Draw the score and interval of each policy on one task; `runs` are (label, {policy: score})."""
    scale = 100 if unit == RATE else 1
    with rc_context(STYLE):
        figure, axes = new_figure(0.6 + ROW_HEIGHT * len(rows) * (1 + 0.4 * (len(runs) - 1)))
        offset = min(0.22, 0.7 / max(1, len(runs) - 1))
        for number, (_, scores) in enumerate(runs):
            for position, row in enumerate(rows):
                if row in scores:
                    _dot(axes, scores[row], position + offset * number, colour=SERIES[number], scale=scale)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(UNITS[unit])
        axes.grid(visible=True, axis="x")
        svg = svg_element(figure, axes, name=name, title=title, hovers=list(_score_hovers(rows, runs, unit)))
    legend = [(label, f"c{number + 1} marked") for number, (label, _) in enumerate(runs)]
    return Chart(title, svg, legend if len(runs) > 1 else [])


def histogram(title: str, runs: Sequence[tuple[str, Sequence[float]]], *, name: str) -> Chart:
    """Draw the distribution of rewards, in percent of responses, with each run's mean as a dashed line."""
    everything = [reward for _, rewards in runs for reward in rewards]
    low, high = min(everything), max(everything)
    if low == high:
        low, high = low - 0.5, high + 0.5
    heights: list[Any] = []
    edges: Any = ()
    with rc_context(STYLE):
        figure, axes = new_figure(HEIGHT)
        for number, (_, rewards) in enumerate(runs):
            colour = SERIES[number]
            kind: Any = "step" if number else "stepfilled"
            weights = [100 / len(rewards)] * len(rewards)
            alpha = None if number else 0.55
            height, edges, _ = axes.hist(
                rewards, BINS, range=(low, high), weights=weights, histtype=kind, color=colour, alpha=alpha
            )
            heights.append(height)
            axes.axvline(math.fsum(rewards) / len(rewards), color=colour, linewidth=1.4, linestyle="--")
        axes.set_xlabel("reward")
        axes.set_ylabel("% of responses")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=True, axis="y")
        labels = [label for label, _ in runs]
        hovers = [
            Hover(
                f"{plain(left)} to {plain(right)}: "
                + ", ".join(f"{label} {height[number]:.1f}%" for label, height in zip(labels, heights, strict=True)),
                x=(left, right),
            )
            for number, (left, right) in enumerate(pairwise(map(float, edges)))
        ]
        svg = svg_element(figure, axes, name=name, title=title, hovers=hovers)
    return Chart(title, svg, [(f"{label} (dashed: mean)", f"c{n + 1}") for n, (label, _) in enumerate(runs)])


def _score_hovers(rows: Sequence[str], runs: Sequence[tuple[str, Mapping[str, Any]]], unit: str) -> Iterator[Hover]:
    """Yield a tooltip for each policy of a chart of scores."""
    rate = unit == RATE
    for position, row in enumerate(rows):
        known = [(label, scores[row]) for label, scores in runs if row in scores]
        texts = [
            " ".join(filter(None, [label, score_text(each["value"], rate=rate), _bracketed(each, rate=rate)]))
            for label, each in known
        ]
        yield Hover(f"{row}: " + ", ".join(texts), y=(position - 0.5, position + 0.5))


def _bracketed(score: Mapping[str, Any], *, rate: bool) -> str:
    interval = interval_text(score, rate=rate)
    return f"({interval})" if interval else ""


def new_figure(height: float) -> tuple[Figure, Axes]:
    """Return an empty transparent figure of this height in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
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
