"""The progress protocol: notes, phases and metrics that a run reports while it works."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None:
        """One thing worth saying."""
        ...

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A new stretch of work of `total` units begins."""
        ...

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Units of the current stretch are done."""
        ...


class SilentProgress:
    """A reporter that says nothing: for library use and tests."""

    def note(self, text: str) -> None:
        """Nothing."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Nothing."""

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Nothing."""
