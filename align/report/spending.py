"""The ledger's table: what each step took, what the whole run took, and what nobody knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from align.report.charts import all_steps
from align.report.quantities import UNKNOWN, duration, plain, scaled, share, size
from align.report.reading import Facts, Run
from align.report.tables import Cell, Table, named, stage_of

SOURCES = {"flops_source": "Compute", "energy_source": "Energy"}


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    key: str
    tell: Any  # value -> text
    adds: bool = True  # whether a total is the sum, not the largest
    ratio: bool = False  # which no total can be made of but by the ledger


LEDGER = (
    _Column("tokens trained", "tokens_trained", scaled),
    _Column("tokens computed", "tokens_computed", scaled),
    _Column("compute", "flops", partial(scaled, unit="FLOP")),
    _Column("time", "seconds", duration),
    _Column("MFU", "mfu", share, adds=False, ratio=True),
    _Column("peak memory", "peak_memory_bytes", size, adds=False),
    _Column("energy, kWh", "energy_kwh", plain),
    _Column("CO2, kg", "co2_kg", plain),
    _Column("cost", "cost", plain),
    _Column("on the wire", "wire_bytes", size),
    _Column("weights", "weights", scaled, adds=False),
    _Column("cost a weight", "cost_per_weight", plain, adds=False, ratio=True),
    _Column("devices", "devices", str, adds=False),
)


def ledger(runs: Mapping[str, Run]) -> Table | None:
    """What each step took, and the run; what nobody measured says so."""
    every = [of for run in runs.values() for of in run.ledgers.values()]
    columns = [column for column in LEDGER if any(of.get(column.key) is not None for of in every)]
    if not columns:
        return None
    rows = [
        [named(step.name, label, *stage_of(step)), *(_spent(run.ledgers[step.name], column) for column in columns)]
        for step_name in all_steps(runs.values())
        for label, run in runs.items()
        if (step := run.step(step_name)) is not None and step_name in run.ledgers
    ]
    rows += [
        [named("whole run", label), *(_total(run, column) for column in columns)]
        for label, run in runs.items()
        if run.ledgers
    ]
    return Table("ledger", ["step", *(column.title for column in columns)], rows)


def sources(runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """How figures of the ledger were come by, and which there are none of, as (which, how), each said once."""
    told = [
        (title, str(of[key]))
        for run in runs.values()
        for of in run.ledgers.values()
        for key, title in SOURCES.items()
        if of.get(key)
    ]
    every = [of for run in runs.values() for of in run.ledgers.values()]
    missing = [column.title for column in LEDGER if all(of.get(column.key) is None for of in every)]
    return list(dict.fromkeys(told)) + ([("Known of no step", ", ".join(missing))] if missing else [])


def _spent(of: Facts, column: _Column) -> Cell:
    value = of.get(column.key)
    if value is None:
        return Cell(UNKNOWN, "quiet")
    metered = of.get("energy_measured") if column.key == "energy_kwh" else None
    how = [] if metered is None else [("measured" if metered else "estimated", "")]
    return Cell(f"{column.tell(value)}{_currency(of, column)}", under=how)


def _total(run: Run, column: _Column) -> Cell:
    """The run's own total where the ledger has one, else the sum or the largest of what is known."""
    known = [of[column.key] for of in run.ledgers.values() if of.get(column.key) is not None]
    unknown = len(run.ledgers) - len(known)
    value = run.total.get(column.key)
    if value is None and column.ratio:
        return Cell()
    if value is None and known:
        value = sum(known) if column.adds else max(known)
    if not known or value is None:
        return Cell(UNKNOWN, "quiet")
    at_least = "≥ " if unknown and column.adds else ""
    currency = next((text for of in run.ledgers.values() if (text := _currency(of, column))), "")
    text = f"{at_least}{column.tell(value)}{currency}"
    return Cell(text, under=[(f"{unknown} of {len(run.ledgers)} steps unknown", "")] if unknown else ())


def _currency(of: Facts, column: _Column) -> str:
    return f" {of['currency']}" if column.key in ("cost", "cost_per_weight") and of.get("currency") else ""
