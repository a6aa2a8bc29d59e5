"""The progress protocol: notes, phases and metrics that a run reports while it works."""

from __future__ import annotations

from typing import Protocol

# Metrics of what a run uses: of the optimizer step, of the step, and of the whole run so far; unknown ones are left out
RESOURCES = ("mfu", "peak_memory_bytes", "energy_wh", "money")


class Progress(Protocol):
    """Receives the progress of a run."""

    def note(self, text: str) -> None:
        """Report one line of text."""
        ...

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Start a phase of `total` units, of which `done` are finished already."""
        ...

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Report finished units of the current phase, and the metrics of an optimizer step."""
        ...


class SilentProgress:
    """Discards all progress; for library use and tests."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Do nothing."""
