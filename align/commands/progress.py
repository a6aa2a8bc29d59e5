"""Show progress in a terminal: log lines, a live table of the steps and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

# States of a step as in `align.pipeline`, whose import would slow down `align --help`
RUNNING, FINISHED = "running", "finished"
SYMBOLS = {"waiting": "·", "interrupted": "…", RUNNING: "▶", FINISHED: "✓"}
MIN_ROWS = 4  # of the table, however small the terminal is
OTHER_LINES = 8  # of the terminal, around the rows of the table


class TerminalProgress:
    """Implement `align.distributed.progress.Progress` in a terminal, and show the states of a pipeline's steps."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[metrics]}"),
            console=console,
        )
        self.task: TaskID | None = None
        self.states: dict[str, str] = {}
        self.started_at: dict[str, float] = {}  # by step, on the monotonic clock
        self.seconds: dict[str, float] = {}  # by step that has ended
        self.metrics: dict[str, str] = {}  # the last ones of each step, as text
        self.live = Live(console=console, transient=True, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        """Print one line above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def watch(self, step: str, state: str) -> None:
        """Show the new state of a step."""
        self.states[step] = state
        if state == RUNNING:
            self.started_at[step] = time.monotonic()
        elif step in self.started_at:
            self.seconds[step] = time.monotonic() - self.started_at[step]
            self._remove_bar()

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Show a new progress bar in place of the last one; a `total` of 0 means unknown."""
        self._remove_bar()
        self.task = self.bar.add_task(name, total=total or None, completed=done, metrics="")

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Advance the progress bar, and show the metrics of an optimizer step."""
        if self.task is None:
            return
        self.bar.update(self.task, advance=units)
        if metrics:
            text = _metrics_text(metrics)
            self.bar.update(self.task, metrics=text)
            self.metrics |= {step: text for step, state in self.states.items() if state == RUNNING}

    def _remove_bar(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None

    def _render(self) -> Group:
        """Return the table of the steps and the progress bar."""
        if not self.states:
            return Group(self.bar)
        table = Table(box=SIMPLE, pad_edge=False)
        for name in ("", "step", "state", "seconds", "last metrics"):
            table.add_column(name, justify="right" if name == "seconds" else "left", no_wrap=True)
        for name in self._visible_steps():
            state = self.states[name]
            seconds = time.monotonic() - self.started_at[name] if state == RUNNING else self.seconds.get(name)
            duration = "" if seconds is None else f"{seconds:,.0f}"
            table.add_row(SYMBOLS[state], name, state, duration, self.metrics.get(name, ""))
        return Group(table, self.bar)

    def _visible_steps(self) -> list[str]:
        """Return the steps around the first unfinished one, as many as fit into the terminal."""
        names = list(self.states)
        current = next((index for index, name in enumerate(names) if self.states[name] != FINISHED), len(names))
        num_rows = max(MIN_ROWS, self.console.height - OTHER_LINES)
        first = max(0, min(current - num_rows // 2, len(names) - num_rows))
        return names[first : first + num_rows]


def _metrics_text(metrics: Mapping[str, float]) -> str:
    """Return loss, margin, accuracy and speed of an optimizer step as a short text."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if "rewards/margins" in metrics:
        parts += [f"margin {metrics['rewards/margins']:+.3f}", f"accuracy {metrics['rewards/accuracies']:.2f}"]
    return "  ".join([*parts, f"{metrics['tokens_computed'] / metrics['seconds']:,.0f} tokens/s"])
