"""Show progress: in a terminal log lines, a live table and a progress bar; elsewhere a line every few seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from align.redaction import printable

# States of a step as in `align.pipeline`, whose import would slow down `align --help`
RUNNING, FINISHED = "running", "finished"
SYMBOLS = {"waiting": "·", "interrupted": "…", RUNNING: "▶", FINISHED: "✓"}
MIN_ROWS = 4  # of the table, however small the terminal is
OTHER_LINES = 8  # of the terminal, around the rows of the table
LINE_EVERY_S = 5.0  # without a terminal
MINUTE_S, HOUR_S = 60, 3600
GIB = 2**30
SHOWN_METRICS = {  # metric -> its name and format
    "loss": ("loss", ".4f"),
    "held_out/loss": ("held-out loss", ".4f"),
    "rewards/margins": ("margin", "+.3f"),
    "rewards/accuracies": ("accuracy", ".2f"),
    "lr": ("lr", ".2e"),
    "requests_per_s": ("requests/s", ",.1f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "cost": ("cost", ",.4f"),
}

RESOURCES = {  # metric -> its name, its form, and its unit in those of the metric
    "mfu": ("MFU", "{:.1%}", 1),
    "peak_memory_bytes": ("peak memory", "{:,.2f} GiB", GIB),
    "energy_wh": ("energy", "{:,.4g} Wh", 1),
    "money": ("cost so far", "{:,.4g}", 1),
}
MONEY = ("cost", "money")  # metrics that are amounts of a currency
UNKNOWN = "–"


class TerminalProgress:
    """Implement `align.distributed.progress.Progress` in a terminal, and show the states of a pipeline's steps."""

    def __init__(self, console: Console, currency: str = "") -> None:
        self.console, self.currency = console, currency  # empty if it is unknown
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
        self.latest: dict[str, float] = {}  # metrics of the running step
        self.metrics: dict[str, str] = {}  # the last ones of each step, as text
        self.live = Live(console=console, transient=True, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        """Print one line above the table."""
        _print_line(self.console, text)

    def watch(self, step: str, state: str) -> None:
        """Show the new state of a step."""
        self.states[step] = state
        if state == RUNNING:
            self.started_at[step] = time.monotonic()
            self.latest = {}
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
            self.latest |= metrics  # those on held-out rows are not in every step
            text = "  ".join(_metric_parts(self.latest, self.currency))
            self.bar.update(self.task, metrics=text)
            self.metrics |= {step: text for step, state in self.states.items() if state == RUNNING}

    def _remove_bar(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None

    def _render(self) -> Group:
        """Return the table of the steps and the progress bar."""
        used = Text("  ".join(_resource_parts(self.latest, self.currency)), style="dim")
        if not self.states:
            return Group(self.bar, used)
        table = Table(box=SIMPLE, pad_edge=False)
        for name in ("", "step", "state", "seconds", "last metrics"):
            table.add_column(name, justify="right" if name == "seconds" else "left", no_wrap=True)
        for name in self._visible_steps():
            state = self.states[name]
            seconds = time.monotonic() - self.started_at[name] if state == RUNNING else self.seconds.get(name)
            duration = "" if seconds is None else f"{seconds:,.0f}"
            table.add_row(SYMBOLS[state], name, state, duration, self.metrics.get(name, ""))
        return Group(table, self.bar, used)

    def _visible_steps(self) -> list[str]:
        """Return the steps around the first unfinished one, as many as fit into the terminal."""
        names = list(self.states)
        current = next((index for index, name in enumerate(names) if self.states[name] != FINISHED), len(names))
        num_rows = max(MIN_ROWS, self.console.height - OTHER_LINES)
        first = max(0, min(current - num_rows // 2, len(names) - num_rows))
        return names[first : first + num_rows]


class LineProgress:
    """Implement `align.distributed.progress.Progress` without a terminal: a line every few seconds."""

    def __init__(self, console: Console, every_s: float = LINE_EVERY_S, currency: str = "") -> None:
        self.console, self.every_s, self.currency = console, every_s, currency
        self.step, self.name = "", ""  # running step of the pipeline, and its phase
        self.total, self.done, self.done_before = 0, 0, 0  # units of the phase; those of earlier calls
        self.began_s, self.printed_s, self.step_began_s = 0.0, 0.0, 0.0  # on the monotonic clock
        self.metrics: dict[str, float] = {}  # the last ones of the step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def note(self, text: str) -> None:
        """Print one line."""
        _print_line(self.console, text)

    def watch(self, step: str, state: str) -> None:
        """Remember which step runs; print a line when it is finished."""
        if state == RUNNING:
            self.step = step
            self.name = ""
            self.metrics = {}
            self.step_began_s = time.monotonic()
        elif state == FINISHED and step == self.step:
            duration = f"finished in {duration_text(time.monotonic() - self.step_began_s)}"
            self.note(f"{step}: {', '.join([duration, *self._shown()])}")
            self.step = ""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Start to count the units of a phase; a `total` of 0 means unknown."""
        self.name, self.total, self.done, self.done_before = name, total, done, done
        self.began_s = time.monotonic()
        self.printed_s = -math.inf

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Count finished units; print a line for the first and the last, and every few seconds."""
        self.done += units
        self.metrics |= metrics or {}
        now = time.monotonic()
        if now - self.printed_s < self.every_s and self.done != self.total:
            return
        self.printed_s = now
        place = f"{self.name} {self.done}{f'/{self.total}' if self.total else ''}"
        parts = [place, *(self._shown() if metrics else []), *self._remaining(now)]
        self.note(f"{f'{self.step}: ' if self.step else ''}{', '.join(parts)}")

    def _shown(self) -> list[str]:
        """Return the latest metrics and resources as text."""
        return [*_metric_parts(self.metrics, self.currency), *_resource_parts(self.metrics, self.currency)]

    def _remaining(self, now: float) -> list[str]:
        """Return the estimated time to the end of the phase, from the mean time of the units of this call."""
        if self.done >= self.total:
            return []
        seconds = (now - self.began_s) / max(1, self.done - self.done_before)
        return [f"ETA {duration_text(seconds * (self.total - self.done))}"]


def _print_line(console: Console, text: str) -> None:
    """Print text that may hold names and messages from elsewhere, without secrets and terminal escapes."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def duration_text(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> [duration_text(seconds) for seconds in (4.2, 61, 3600 * 30)]
    ['4 s', '1 min 1 s', '30 h 0 min']
    """
    total = round(seconds)
    if total < MINUTE_S:
        return f"{total} s"
    if total < HOUR_S:
        return f"{total // MINUTE_S} min {total % MINUTE_S} s"
    return f"{total // HOUR_S} h {total % HOUR_S // MINUTE_S} min"


def _metric_parts(metrics: Mapping[str, float], currency: str) -> list[str]:
    """Return loss, margin and accuracy, learning rate and speed of an optimizer step, as far as they are known."""
    parts = [
        f"{text} {metrics[name]:{form}}{_currency(name, currency)}"
        for name, (text, form) in SHOWN_METRICS.items()
        if name in metrics
    ]
    if "tokens_computed" in metrics and metrics["seconds"]:
        parts.append(f"{metrics['tokens_computed'] / metrics['seconds']:,.0f} tokens/s")
    return parts


def _resource_parts(metrics: Mapping[str, float], currency: str) -> list[str]:
    """Return the resources as text, with a dash for an unknown one; nothing where none is known."""
    if RESOURCES.keys().isdisjoint(metrics):
        return []
    return [
        f"{label} {form.format(metrics[name] / unit) + _currency(name, currency) if name in metrics else UNKNOWN}"
        for name, (label, form, unit) in RESOURCES.items()
    ]


def _currency(metric: str, currency: str) -> str:
    """Return what follows the value of a metric."""
    return f" {currency}" if metric in MONEY and currency else ""
