"""Turn a matplotlib figure into an SVG element of the page, with values that appear under the mouse."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

DPI = 72  # SVG units per inch, so that a position on the canvas is a position in the SVG

# Placeholder colours, replaced by CSS variables of the page, so that charts follow its light and dark themes.
INK, FAINT = "#010203", "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06", "#0a0b07", "#0a0b08")
VARIABLES = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CSS = {INK: "var(--ink)", FAINT: "var(--line)"} | {
    colour: f"var(--{name})" for colour, name in zip(SERIES, VARIABLES, strict=True)
}


@dataclass(frozen=True, slots=True)
class Hover:
    """A tooltip of a part of a chart, in data coordinates; None means the full width or height."""

    text: str
    x: tuple[float, float] | None = None
    y: tuple[float, float] | None = None


def svg_element(figure: Figure, axes: Axes, *, name: str, title: str, hovers: Sequence[Hover] = ()) -> Markup:
    """Return the figure as an SVG element with unique ids, CSS colours and fonts, and no external references.

    `name` makes the ids unique on the page. A browser shows the texts of `hovers` as tooltips; no script is needed.
    """
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
    body = text[text.index(">") + 1 : text.rindex("</svg>")]
    areas = "".join(_area(axes, hover) for hover in hovers)
    opening = Markup('<svg class="chart" role="img" aria-label="{}" {}>').format(title, Markup(box[0]))
    return opening + Markup(f'{body}<g class="hover">{areas}</g></svg>' if areas else f"{body}</svg>")


def _area(axes: Axes, hover: Hover) -> str:
    """Return a transparent rectangle with a tooltip, in SVG units from the upper left corner."""
    frame = axes.get_window_extent()
    height = axes.figure.bbox.height
    (left, _), (right, _) = (axes.transData.transform((x, 0)) for x in hover.x) if hover.x else (frame.p0, frame.p1)
    (_, low), (_, high) = (axes.transData.transform((0, y)) for y in hover.y) if hover.y else (frame.p0, frame.p1)
    left, right = max(min(left, right), frame.x0), min(max(left, right), frame.x1)
    low, high = max(min(low, high), frame.y0), min(max(low, high), frame.y1)
    place = f'x="{left:.1f}" y="{height - high:.1f}" width="{right - left:.1f}" height="{high - low:.1f}"'
    return f"<rect {place}><title>{escape(hover.text)}</title></rect>"
