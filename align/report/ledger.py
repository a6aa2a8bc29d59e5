"""The table of compute, time, energy and cost, per step and in total."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from align.report.charts import all_steps
from align.report.formatting import UNKNOWN, duration, percent, plain, scaled, size
from align.report.run_folder import Facts, Run
from align.report.tables import Cell, Table, row_name, stage_of

SOURCES = {"flops_source": "Compute", "energy_source": "Energy"}


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    key: str
    format: Callable[[Any], str]
    is_sum: bool = True  # the total is the sum; otherwise the maximum
    is_ratio: bool = False  # the total can only come from the ledger itself


COLUMNS = (
    _Column("tokens trained", "tokens_trained", scaled),
    _Column("tokens computed", "tokens_computed", scaled),
    _Column("compute", "flops", partial(scaled, unit="FLOP")),
    _Column("time", "seconds", duration),
    _Column("MFU", "mfu", percent, is_sum=False, is_ratio=True),
    _Column("peak memory", "peak_memory_bytes", size, is_sum=False),
    _Column("energy (kWh)", "energy_kwh", plain),
    _Column("CO2 (kg)", "co2_kg", plain),
    _Column("cost", "cost", plain),
    _Column("sent per device", "wire_bytes", size),
    _Column("parameters", "weights", scaled, is_sum=False),
    _Column("cost per parameter", "cost_per_weight", plain, is_sum=False, is_ratio=True),
    _Column("devices", "devices", str, is_sum=False),
)


def ledger_table(runs: Mapping[str, Run]) -> Table | None:
    """Return a row for each step and the total of each run; values that were not measured are "unknown"."""
    ledgers = [ledger for run in runs.values() for ledger in run.ledgers.values()]
    columns = [column for column in COLUMNS if any(ledger.get(column.key) is not None for ledger in ledgers)]
    if not columns:
        return None
    rows = [
        [row_name(step.name, label, *stage_of(step)), *(_value(run.ledgers[name], column) for column in columns)]
        for name in all_steps(runs.values())
        for label, run in runs.items()
        if (step := run.step(name)) is not None and name in run.ledgers
    ]
    rows += [
        [row_name("total", label), *(_total(run, column) for column in columns)]
        for label, run in runs.items()
        if run.ledgers
    ]
    return Table("ledger", ["step", *(column.title for column in columns)], rows)


def sources(runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """Return how the values were measured and which are missing everywhere, as (title, text)."""
    ledgers = [ledger for run in runs.values() for ledger in run.ledgers.values()]
    known = [(title, str(ledger[key])) for ledger in ledgers for key, title in SOURCES.items() if ledger.get(key)]
    missing = [column.title for column in COLUMNS if all(ledger.get(column.key) is None for ledger in ledgers)]
    return list(dict.fromkeys(known)) + ([("Not available", ", ".join(missing))] if missing else [])


def _value(ledger: Facts, column: _Column) -> Cell:
    value = ledger.get(column.key)
    if value is None:
        return Cell(UNKNOWN, "quiet")
    is_measured = ledger.get("energy_measured") if column.key == "energy_kwh" else None
    below = [] if is_measured is None else [("measured" if is_measured else "estimated", "")]
    return Cell(f"{column.format(value)}{_currency(ledger, column)}", below=below)


def _total(run: Run, column: _Column) -> Cell:
    """Return the total of the run's ledger, else the sum or maximum of the known values."""
    known = [ledger[column.key] for ledger in run.ledgers.values() if ledger.get(column.key) is not None]
    num_unknown = len(run.ledgers) - len(known)
    value = run.total.get(column.key)
    if value is None and column.is_ratio:
        return Cell()
    if value is None and known:
        value = sum(known) if column.is_sum else max(known)
    if not known or value is None:
        return Cell(UNKNOWN, "quiet")
    at_least = "≥ " if num_unknown and column.is_sum else ""
    currency = next((text for ledger in run.ledgers.values() if (text := _currency(ledger, column))), "")
    text = f"{at_least}{column.format(value)}{currency}"
    return Cell(text, below=[(f"{num_unknown} of {len(run.ledgers)} steps unknown", "")] if num_unknown else ())


def _currency(ledger: Facts, column: _Column) -> str:
    return f" {ledger['currency']}" if column.key in ("cost", "cost_per_weight") and ledger.get("currency") else ""
