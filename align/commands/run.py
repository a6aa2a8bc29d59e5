"""`align run` and `align train`, and how commands show progress and results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from align.commands.progress import LineProgress, TerminalProgress
from align.workflow.launcher import Command
from align.workflow.recipe.inputs import check_inputs
from align.workflow.search.calls import assumed, calls

FILE_WIDTH = 160  # columns of a table that goes to a file


def run(recipe: Path, overrides: Sequence[str], *, until: str | None, rerun_from: str | None, dry_run: bool) -> None:
    """Run a recipe and print its tables; with `dry_run` print what would run."""
    command = Command(recipe, tuple(overrides))
    console = _wide_console()
    loaded = command.loaded
    check_inputs(loaded, recipe, overrides, until=until)
    # These import torch; errors in the recipe come first
    from align.workflow.estimate import ModelPlans, check_templates, disk_need, estimate  # noqa: PLC0415
    from align.workflow.results.tables import plan_table, run_tables  # noqa: PLC0415
    from align.workflow.runner import planned, run_recipe  # noqa: PLC0415

    plan, notes = assumed(command)
    if dry_run:
        with command.located():
            estimates = list(estimate(plan.loaded))
        show(console, plan_table(planned(plan.loaded, until, rerun_from), estimates))
        for note in notes:
            console.print(note, highlight=False, soft_wrap=True)
        return
    with command.located():
        plans = ModelPlans(plan.loaded)
        check_templates(plans, until=until)
        disk = disk_need(plans)
    manifests: dict[str, dict[str, Any]] = {}
    with shown_progress(loaded.accounting.currency) as progress, command.located():
        for call in calls(command, until=until, rerun_from=rerun_from):
            manifests = run_recipe(call.command, progress, disk=disk, until=call.until, rerun_from=call.rerun_from)
    show(console, run_tables(manifests, loaded.root))
    console.print(f"Written to {loaded.root}; report in {loaded.root / 'report.html'}", highlight=False, soft_wrap=True)


def train(recipe: Path, step: str, overrides: Sequence[str]) -> None:
    """Run one step of a recipe."""
    command = Command(recipe, tuple(overrides))
    currency = command.loaded.accounting.currency  # errors in the recipe come first
    from align.workflow.runner import run_step  # noqa: PLC0415 - imports torch

    with shown_progress(currency) as progress, command.located():
        run_step(command, step, progress)


def shown_progress(currency: str = "") -> TerminalProgress | LineProgress:
    """Return a progress display, to be entered; of several processes, only the first shows it.

    `currency` is that of the costs, where it is known.
    """
    console = Console(stderr=True, quiet=not _is_first())
    return TerminalProgress(console, currency) if console.is_terminal else LineProgress(console, currency=currency)


def conclude(tables: Iterable[Table], summary: object) -> None:
    """Print the tables on stderr, and the summary as a line of JSON on stdout; only on the first process."""
    if _is_first():
        show(Console(stderr=True), tables)
        print(json.dumps(summary))


def show(console: Console, tables: Iterable[Table]) -> None:
    """Print the tables that have rows."""
    for table in tables:
        if table.row_count:
            console.print(table)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _wide_console() -> Console:
    """Return a console as wide as the terminal, or wide enough for every table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)
