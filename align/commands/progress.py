"""Progress for people: lines for what is worth saying, a live table of the steps, a bar for what takes long."""

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

MARKS = {"waiting": "·", "interrupted": "…", "running": "▶", "finished": "✓"}  # of a step's state


class TerminalProgress:
    """Everything that a run says while it goes on."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[said]}"),
            console=console,
        )
        self.task: TaskID | None = None
        self.states: dict[str, str] = {}
        self.began: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.said: dict[str, str] = {}
        self.live = Live(console=console, transient=True, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        """One line above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def watch(self, step: str, state: str) -> None:
        """A step of the pipeline has come into another state."""
        self.states[step] = state
        if state == "running":
            self.began[step] = time.monotonic()
        elif step in self.began:
            self.took[step] = time.monotonic() - self.began[step]
            if self.task is not None:
                self.bar.remove_task(self.task)
                self.task = None

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A new bar in place of the last; of an unknown total where it is 0."""
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(name, total=total or None, completed=done, said="")

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Move the bar on."""
        if self.task is None:
            return
        self.bar.update(self.task, advance=units)
        if metrics:
            said = _said(metrics)
            self.bar.update(self.task, said=said)
            self.said |= {step: said for step, state in self.states.items() if state == "running"}

    def _render(self) -> Group:
        """The steps as a table, and the bar of what is being done."""
        if not self.states:
            return Group(self.bar)
        table = Table(box=SIMPLE, pad_edge=False)
        for name in ("", "step", "state", "seconds", "last metrics"):
            table.add_column(name, justify="right" if name == "seconds" else "left", no_wrap=True)
        # As many as a screen holds: those around the one that runs.
        names = list(self.states)
        at = next((place for place, name in enumerate(names) if self.states[name] != "finished"), len(names))
        most = max(4, self.console.height - 8)
        first = max(0, min(at - most // 2, len(names) - most))
        for name in names[first : first + most]:
            state = self.states[name]
            seconds = time.monotonic() - self.began[name] if state == "running" else self.took.get(name)
            told = "" if seconds is None else f"{seconds:,.0f}"
            table.add_row(MARKS[state], name, state, told, self.said.get(name, ""))
        return Group(table, self.bar)


def _said(metrics: Mapping[str, float]) -> str:
    """A training step in a few words."""
    said = [f"loss {metrics['loss']:.4f}"]
    if "rewards/margins" in metrics:
        said += [f"margin {metrics['rewards/margins']:+.3f}", f"accuracy {metrics['rewards/accuracies']:.2f}"]
    return "  ".join([*said, f"{metrics['tokens_computed'] / metrics['seconds']:,.0f} tokens/s"])
