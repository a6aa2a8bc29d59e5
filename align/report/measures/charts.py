"""Charts of made data: rewards by family, and a map of embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import MaxNLocator

from align.report.figures import STYLE, Chart, new_figure
from align.report.formatting import plain
from align.report.run_folder import Facts
from align.report.svg import INK, SERIES, Hover, svg_element

RIDGE, HIGHEST = 0.42, 0.9  # inches for each family, and height of the highest bar in rows
MAP_HEIGHT = 2.9  # inches
MARKERS = {"o": "marked", "s": "square", "^": "triangle"}  # matplotlib's marker -> CSS class of the legend
MAX_LABEL = 18  # characters of a family's name beside the chart
AREA = 0.01  # half the side of a point's tooltip, as a share of the axis

Point = tuple[str, float, float, str]  # family, x, y, text


def reward_ridges(title: str, rewards: Facts, families: Mapping[str, Facts], *, name: str) -> Chart:
    """Draw the distribution of each family's rewards above its own line, with its mean as a dashed line.

    `rewards` has the `edges` of the bins and the `counts` of each family; bars are shares of the family's rows.
    """
    edges = np.array(rewards["edges"])
    shown = list(rewards["counts"])
    shares = {family: np.array(counts) / sum(counts) for family, counts in rewards["counts"].items()}
    scale = HIGHEST / max(share.max() for share in shares.values())
    with rc_context(STYLE):
        figure, axes = new_figure(0.7 + RIDGE * len(shown))
        for row, family in enumerate(shown):
            base = len(shown) - 1 - row
            colour = _colour(list(families).index(family))
            heights = np.append(shares[family], 0) * scale
            axes.fill_between(edges, base, base + heights, step="post", color=colour, alpha=0.55, linewidth=0)
            axes.plot(edges, base + heights, drawstyle="steps-post", color=colour, linewidth=1)
            mean = families[family]["reward_mean"]
            axes.plot((mean, mean), (base, base + HIGHEST), color=INK, linewidth=1.2, linestyle="--")
        axes.set_yticks(range(len(shown)), [_short(family) for family in reversed(shown)])
        axes.set_ylim(-0.1, len(shown))
        axes.set_xlabel("reward")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=True, axis="x")
        hovers = [
            Hover(_reward_text(family, families[family]), y=(len(shown) - 1 - row, len(shown) - row))
            for row, family in enumerate(shown)
        ]
        svg = svg_element(figure, axes, name=name, title=title, hovers=hovers)
    return Chart(title, svg, [], "share of the family's rows in each of 20 bins; dashed: mean")


def _short(family: str) -> str:
    return family if len(family) <= MAX_LABEL else f"{family[: MAX_LABEL - 1]}…"


def _reward_text(family: str, measured: Facts) -> str:
    mean, deviation = plain(measured["reward_mean"]), plain(measured["reward_deviation"])
    return f"{family}: mean {mean}, standard deviation {deviation}, {measured['rewarded']:,} rows"


def embedding_map(title: str, found: Facts, families: Sequence[str], *, name: str) -> Chart:
    """Draw rows as points along the two main axes of their embeddings, in the colour and shape of their family.

    `found` has `points`, each a family, x, y and a text, the shares of variance `explained`, and the number of `rows`.
    """
    points: Sequence[Point] = found["points"]
    with rc_context(STYLE):
        figure, axes = new_figure(MAP_HEIGHT)
        for number, family in enumerate(families):
            inside = [(x, y) for name_, x, y, _ in points if name_ == family]
            if inside:
                axes.plot(
                    *zip(*inside, strict=True),
                    linestyle="",
                    marker=_marker(number),
                    color=_colour(number),
                    markersize=3.2,
                    alpha=0.75,
                    markeredgewidth=0,
                )
        for axis, share, label in zip((axes.xaxis, axes.yaxis), found["explained"], ("first", "second"), strict=True):
            axis.set_label_text(f"{label} axis: {share:.0%} of variance")
            axis.set_major_locator(MaxNLocator(4))
        width, height = (math.fabs(high - low) for low, high in (axes.get_xlim(), axes.get_ylim()))
        hovers = [
            Hover(
                f"{family}: {text}",
                x=(x - AREA * width, x + AREA * width),
                y=(y - AREA * height, y + AREA * height),
            )
            for family, x, y, text in points
        ]
        svg = svg_element(figure, axes, name=name, title=title, hovers=hovers)
    present = {family for family, *_ in points}
    legend = [
        (family, f"{MARKERS[_marker(number)]} c{number % len(SERIES) + 1}")
        for number, family in enumerate(families)
        if family in present
    ]
    note = f"{len(points):,} of {found['rows']:,} rows" if len(points) < found["rows"] else ""
    return Chart(title, svg, legend, note)


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _marker(number: int) -> str:
    return list(MARKERS)[number // len(SERIES) % len(MARKERS)]
