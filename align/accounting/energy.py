"""A meter of electricity and CO2. It uses no network and writes no files."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

from align.accounting.counters import Counter, NoCounter, gpu_counter, machine_counter
from align.accounting.grid import grid_intensity
from align.accounting.settings import AccountingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReading:
    """Electricity and CO2 since the meter was started; None for what is unknown."""

    kwh: float | None
    co2_kg: float | None
    source: str  # where the values are from, in words
    measured: bool  # by hardware counters, not estimated

    def __sub__(self, earlier: EnergyReading) -> EnergyReading:
        """Return what was used between two readings of one meter; unknown if either of them is."""
        kwh = _minus(self.kwh, earlier.kwh)
        return EnergyReading(
            kwh=kwh,
            co2_kg=_minus(self.co2_kg, earlier.co2_kg),
            source=self.source if earlier.kwh is not None else earlier.source,
            measured=self.measured and kwh is not None,
        )


def _minus(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


class EnergyMeter:
    """Measure electricity for the length of a `with` block; `reading` is the use since its start.

    The use of a step is the difference of two readings. With the UUIDs of GPUs the meter reads their counters; without,
    it covers the whole machine, so only one of several processes on a machine should have a meter. `unknown` says why
    nothing can be measured.
    """

    def __init__(self, settings: AccountingSettings, gpus: Sequence[str] = (), *, unknown: str | None = None) -> None:
        self._settings, self._unknown = settings, unknown
        self._gpus = tuple(gpus)
        self._counter: Counter | None = None
        self._last: EnergyReading | None = None

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            opened.enter_context(_codecarbon_silent())
            self._grid = grid_intensity(self._settings)
            if self._unknown is not None:
                self._counter = NoCounter(self._unknown)
            else:
                self._counter = gpu_counter(self._gpus) if self._gpus else machine_counter()
            opened.callback(self._counter.close)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._last = self.reading
        self._counter = None
        self._opened.close()

    @property
    def reading(self) -> EnergyReading:
        """Return the use since the start of the block, or after the block that of the whole block."""
        if self._counter is None:
            assert self._last is not None, "the meter was never started"
            return self._last
        counter, grid = self._counter, self._grid
        kwh = counter.kwh()
        if kwh is None:
            return EnergyReading(kwh=None, co2_kg=None, source=f"not measured: {counter.source}", measured=False)
        co2_kg = None if grid.kg_per_kwh is None else kwh * grid.kg_per_kwh
        source = f"{counter.source}; {grid.source}"
        return EnergyReading(kwh=kwh, co2_kg=co2_kg, source=source, measured=counter.measured)


@contextmanager
def _codecarbon_silent() -> Generator[None]:
    """Disable codecarbon's log, which writes to stderr from its import on."""
    log = logging.getLogger("codecarbon")
    was = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = was
