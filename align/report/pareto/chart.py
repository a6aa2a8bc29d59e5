"""Draw quality against cost, with the front as a staircase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from align.report.figures import STYLE, UNITS, Chart, new_figure
from align.report.formatting import NATS, RATE, interval_text, score_text
from align.report.pareto.costs import Resource
from align.report.pareto.front import DOMINATED, FRONT, Point, Verdict, pareto_front
from align.report.run_folder import Facts
from align.report.svg import SERIES, Hover, svg_element

HEIGHT = 2.9  # inches
LOG_FROM = 5  # costs whose largest is so many times the smallest have a logarithmic axis
MARGIN = 0.12  # beside the points, as a share of the axis
FAINT_ALPHA = 0.35  # of dominated policies
AREA = 0.035  # half the width of a point's tooltip, as a share of the axis
CLOSE_X, CLOSE_Y = 0.3, 0.09  # policies closer than this share a label, as shares of the axes
LEFT = 0.3  # share of the axis where labels are on the right of their points
MAX_LABEL = 16  # characters of a policy's name in the chart
UNKNOWN_COST = "Not drawn, as the cost is unknown: "


@dataclass(frozen=True, slots=True)
class Series:
    """The policies of one run on one task."""

    label: str  # of the run; empty if there is one
    points: Sequence[Point]
    scores: Mapping[str, Facts]  # policy -> {value, low, high}
    verdicts: Mapping[str, Verdict]
    is_loss: bool  # lower scores are better

    @property
    def drawn(self) -> dict[str, float]:
        """Return the known costs of policies."""
        return {point.name: point.cost for point in self.points if point.cost is not None}


def pareto_chart(title: str, runs: Sequence[Series], *, resource: Resource, unit: str, name: str) -> Chart:
    """Draw the score and interval of each policy over its cost, and the front of each run.

    Policies of unknown cost are named below the chart. Better is up also where lower scores are better.
    """
    scale = 100 if unit == RATE else 1
    with rc_context(STYLE):
        figure, axes = new_figure(HEIGHT)
        _set_costs(axes, [cost for series in runs for cost in series.drawn.values()], resource)
        for number, series in enumerate(runs):
            _draw(axes, series, colour=SERIES[number], scale=scale)
        axes.margins(y=0.16)
        bottom, top = axes.get_ylim()  # fixed from here on, as labels are placed by it
        is_loss = any(series.is_loss for series in runs)
        axes.set_ylim(*((top, bottom) if is_loss else (bottom, top)))
        if len(runs) == 1:
            _label(axes, runs[0], scale=scale)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(resource.title)
        label = UNITS[unit] if unit == NATS or not is_loss else f"{UNITS[unit]} (lower is better)"
        axes.set_ylabel(label.strip().replace(" (", "\n("))
        axes.grid(visible=True)
        hovers = [hover for series in runs for hover in _hovers(axes, series, resource, unit)]
        svg = svg_element(figure, axes, name=name, title=f"{title} against {resource.title}", hovers=hovers)
    legend = [(series.label, f"c{number + 1} marked") for number, series in enumerate(runs)]
    return Chart(f"{title} against {resource.title}", svg, legend if len(runs) > 1 else [], _note(runs))


def _note(runs: Sequence[Series]) -> str:
    """Return the policies without a known cost."""
    missing = [
        f"{point.name} of {series.label}" if series.label else point.name
        for series in runs
        for point in series.points
        if point.cost is None
    ]
    return UNKNOWN_COST + ", ".join(missing) if missing else ""


def _set_costs(axes: Axes, costs: Sequence[float], resource: Resource) -> None:
    """Set scale, limits and ticks of the cost axis: logarithmic for a wide range, with a place for free policies."""
    positive = [cost for cost in costs if cost > 0]
    is_log = max(positive) >= LOG_FROM * min(positive)
    if is_log:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4, base=10)
    scale = axes.xaxis.get_transform()
    low, high = (float(scale.transform([end])[0]) for end in (min(costs), max(costs)))
    margin = MARGIN * ((high - low) or abs(high))
    left, right = (float(end) for end in scale.inverted().transform([low - margin, high + margin]))
    axes.set_xlim(left, right)
    if is_log:
        powers = LogLocator(10, numticks=4).tick_values(min(positive), max(positive))
        inside = [tick for tick in powers if min(positive) <= tick <= right]
        ticks = inside if len(inside) > 1 else [min(positive), max(positive)]
        axes.set_xticks(ticks if min(costs) else [0.0, *ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_minor_locator(NullLocator())

    def tick(cost: float, _: int) -> str:
        return resource.format(cost) if cost else "0"

    axes.xaxis.set_major_formatter(FuncFormatter(tick))


def _draw(axes: Axes, series: Series, *, colour: str, scale: int) -> None:
    """Draw points with intervals, faint where they are dominated and hollow where that is undecided."""
    costs, scores = series.drawn, series.scores
    for name, cost in costs.items():
        score = scores[name]
        status = series.verdicts[name].status
        alpha = FAINT_ALPHA if status == DOMINATED else 1
        if score.get("low") is not None and score.get("high") is not None:
            ends = (scale * score["low"], scale * score["high"])
            axes.plot((cost, cost), ends, color=colour, linewidth=1.4, alpha=alpha)
        fill = "none" if status not in (FRONT, DOMINATED) else colour
        axes.plot(
            (cost,),
            (scale * score["value"],),
            color=colour,
            marker="o",
            markersize=5.5,
            markerfacecolor=fill,
            alpha=alpha,
        )
    front = pareto_front(series.points)
    if front:
        steps = [(costs[point.name], scale * scores[point.name]["value"]) for point in front]
        steps.append((axes.get_xlim()[1], steps[-1][1]))
        xs, ys = zip(*steps, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1, drawstyle="steps-post")


def _label(axes: Axes, series: Series, *, scale: int) -> None:
    """Name the policies that are not dominated, those close together in one label, where the staircase leaves room."""
    to_axes = axes.transData + axes.transAxes.inverted()
    groups: list[list[tuple[str, float, float]]] = []
    named = [name for name in series.drawn if series.verdicts[name].status != DOMINATED]
    for name in sorted(named, key=series.drawn.__getitem__):
        x, y = (float(part) for part in to_axes.transform((series.drawn[name], scale * series.scores[name]["value"])))
        if groups and x - groups[-1][0][1] < CLOSE_X and abs(y - groups[-1][-1][2]) < CLOSE_Y:
            groups[-1].append((name, x, y))
        else:
            groups.append([(name, x, y)])
    for group in groups:
        names = [name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 1]}…" for name, _, _ in group]
        text = ", ".join(names) if len(", ".join(names)) <= 2 * MAX_LABEL else f"{names[0]} … {names[-1]}"
        x = group[0][1]
        y = max(y for _, _, y in group)
        is_left = x < LEFT
        axes.annotate(
            text,
            (x, y),
            xycoords="axes fraction",
            xytext=(4 if is_left else -5, 4),
            textcoords="offset points",
            ha="left" if is_left else "right",
        )


def _hovers(axes: Axes, series: Series, resource: Resource, unit: str) -> Iterator[Hover]:
    """Yield a tooltip for each point."""
    scale = axes.xaxis.get_transform()
    rate = unit == RATE
    low, high = (float(end) for end in scale.transform(list(axes.get_xlim())))
    for name, cost in series.drawn.items():
        score = series.scores[name]
        verdict = series.verdicts[name]
        label = f" of {series.label}" if series.label else ""
        interval = interval_text(score, rate=rate)
        value = score_text(score["value"], rate=rate) + (f" ({interval})" if interval else "")
        at = float(scale.transform([cost])[0])
        left, right = scale.inverted().transform([at - AREA * (high - low), at + AREA * (high - low)])
        text = f"{name}{label}: {value} for {resource.format(cost)}; {verdict.text}"
        yield Hover(text, x=(float(left), float(right)))
