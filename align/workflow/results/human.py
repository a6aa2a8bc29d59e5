"""Tables of `align human import`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.table import Table


def human_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables: wins against the baseline, perceived lengths, and agreement. Shares have 95 % intervals."""
    wins = _table(f"Against {summary['against']}, in %", "model", "by", "win", "tie", "loss", "win - loss", "ratings")
    for model, found in summary["models"].items():
        scales = {name: each for name, each in found.items() if name != "by_category"}
        for name, each in {**scales, **found["by_category"]}.items():
            cells = [_percent(each[outcome]) for outcome in ("win", "tie", "loss", "net")]
            wins.add_row(model, name or "no category", *cells, str(each["ratings"]))
    yield wins
    lengths = _table("Perceived length and complete failures, in %", "model", *_lengths(summary), "complete failure")
    for model, shares in summary["length"].items():
        cells = [_percent(shares[name]) if shares else "" for name in _lengths(summary)]
        lengths.add_row(model, *cells, _percent(summary["complete_failure"][model]))
    yield lengths
    agreement = _table("Agreement of annotators: Krippendorff's alpha, ordinal", "question", "alpha")
    for name, value in summary["agreement"].items():
        agreement.add_row(name, "not defined" if value is None else f"{value:.3f}")
    yield agreement


def _lengths(summary: Mapping[str, Any]) -> list[str]:
    return next((list(shares) for shares in summary["length"].values() if shares), [])


def _percent(found: Mapping[str, float]) -> str:
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table
