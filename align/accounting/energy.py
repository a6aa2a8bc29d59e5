"""A meter of electricity: the counters of the GPUs, or codecarbon's figure for the machine. No network, no files."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple, Protocol, Self

from align.accounting.settings import AccountingSettings
from align.errors import InputError

MILLIJOULES_PER_KWH = 3.6e9
SAMPLE_S = 15  # between codecarbon's own readings; a RAPL counter wraps within the hour, and only once between two


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReading:
    """Electricity used since the meter was started, and where the figure is from, in words."""

    kwh: float | None
    co2_kg: float | None
    source: str
    measured: bool  # by a counter in the hardware, not estimated

    def __sub__(self, earlier: EnergyReading) -> EnergyReading:
        """What was used between two readings of one meter; not known where either is not."""
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
    """Runs for the length of a `with` block; `reading` tells what was used from its start until now, or until its end.

    What a step of a run used is the difference of two readings. With the UUIDs of GPUs it reads their counters;
    without, it takes the whole machine, so that of several processes on a machine one must hold the meter.
    """

    def __init__(self, settings: AccountingSettings, gpus: Sequence[str] = ()) -> None:
        self._settings = settings
        self._gpus = tuple(gpus)
        self._counter: _Counter | None = None
        self._last: EnergyReading | None = None

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            opened.enter_context(_codecarbon_silent())
            self._grid = _grid(self._settings)
            self._counter = _gpu_counter(self._gpus) if self._gpus else _machine_counter()
            opened.callback(self._counter.close)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._last = self.reading
        self._counter = None
        self._opened.close()

    @property
    def reading(self) -> EnergyReading:
        """What has been used so far."""
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


class _Grid(NamedTuple):
    """How much CO2 a kWh stands for, and who says so."""

    kg_per_kwh: float | None
    source: str


def _grid(settings: AccountingSettings) -> _Grid:
    if settings.grid_g_per_kwh is not None:
        return _Grid(settings.grid_g_per_kwh / 1000, f"CO2 at {settings.grid_g_per_kwh:g} g/kWh, as set")
    if settings.country is None:
        return _Grid(None, "CO2 not known: neither a country nor grid_g_per_kwh is set")
    if importlib.util.find_spec("codecarbon") is None:
        return _Grid(None, "CO2 not known: codecarbon, which knows the countries' grids, is not installed")
    from codecarbon.core.emissions import Emissions  # noqa: PLC0415 - optional
    from codecarbon.core.units import Energy  # noqa: PLC0415 - optional
    from codecarbon.external.geography import GeoMetadata  # noqa: PLC0415 - optional
    from codecarbon.input import DataSource  # noqa: PLC0415 - optional

    grids = DataSource()
    if settings.country not in grids.get_global_energy_mix_data():
        raise InputError(
            f"accounting.country: no grid is known for {settings.country!r}; "
            "give the three letters of ISO 3166, as in FRA, or grid_g_per_kwh"
        )
    place = GeoMetadata(country_iso_code=settings.country)
    kg_per_kwh = Emissions(grids).get_country_emissions(Energy.from_energy(kWh=1), place)
    return _Grid(kg_per_kwh, f"CO2 at {1000 * kg_per_kwh:.0f} g/kWh, codecarbon's mean of {settings.country}")


class _Counter(Protocol):
    """Something that counts kWh."""

    source: str  # or why it counts nothing
    measured: bool

    def kwh(self) -> float | None:
        """Electricity used since the counter was made."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class _Nothing:
    """A counter that has nothing to count with, and says why."""

    measured = False

    def __init__(self, reason: str) -> None:
        self.source = reason

    def kwh(self) -> None:
        """Not known."""

    def close(self) -> None:
        """Nothing is held."""


def _gpu_counter(uuids: Sequence[str]) -> _Counter:
    try:
        import pynvml  # noqa: PLC0415 - optional
    except ImportError:
        return _Nothing("the GPUs' counters are read by nvidia-ml-py, which is not installed")
    try:
        return _Gpus(pynvml, uuids)
    except pynvml.NVMLError as error:
        return _Nothing(f"NVML has no energy counter of {', '.join(uuids)}: {error}")


class _Gpus:
    """The energy counters of some GPUs: NVML, of Volta and later."""

    measured = True

    def __init__(self, nvml: Any, uuids: Sequence[str]) -> None:  # noqa: ANN401 - a module without types
        self._nvml = nvml
        nvml.nvmlInit()  # counted by NVML, so that another user's shutdown does not end ours
        # torch tells a UUID without the prefix that NVML wants
        names = [uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}" for uuid in uuids]
        self._handles = [nvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        self.source = f"NVML energy counters of {len(names)} GPU(s), without the machine around them"
        self._began = self._millijoules()

    def _millijoules(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)

    def kwh(self) -> float | None:
        """Electricity used since the counter was made."""
        try:
            return (self._millijoules() - self._began) / MILLIJOULES_PER_KWH
        except self._nvml.NVMLError as error:
            self.source = f"NVML lost an energy counter: {error}"
            return None

    def close(self) -> None:
        """Let go of NVML."""
        self._nvml.nvmlShutdown()


def _machine_counter() -> _Counter:
    if importlib.util.find_spec("codecarbon") is None:
        return _Nothing("codecarbon is not installed; pip install 'align[energy]'")
    return _Machine()


class _Machine:
    """Codecarbon's tracker: the CPU's RAPL counter where it can be read, elsewhere a guess from load and size."""

    def __init__(self) -> None:
        from codecarbon.core.cpu import is_rapl_available  # noqa: PLC0415 - optional
        from codecarbon.output_methods.base_output import BaseOutput  # noqa: PLC0415 - optional

        class Kept(BaseOutput):
            """An output that keeps what it is given, where others write it to a file or send it away."""

            total: Any = None

            def out(self, total: Any, delta: Any) -> None:  # noqa: ANN401 - a library without types
                self.total = total

        self._kept = Kept()
        self.measured = sys.platform == "linux" and is_rapl_available()  # codecarbon's own rule
        self._tracker = _sealed_tracker(self._kept)
        self._tracker.start()
        self._began = 0.0
        self._began = self.kwh() or 0.0
        kind = getattr(self._kept.total, "cpu_model", "unknown")
        guess = f"an estimate: CPU ({kind}) by load and nominal power, memory by size; no RAPL counter can be read"
        how = "RAPL counters of the CPU, without memory" if self.measured else guess
        self.source = f"codecarbon {metadata.version('codecarbon')} for the whole machine, {how}"

    def kwh(self) -> float | None:
        """Electricity used since the counter was made; codecarbon swallows its own failures, so look for its answer."""
        self._kept.total = None
        self._tracker.flush()
        total = self._kept.total
        if total is None:
            self.source = "codecarbon failed"
            return None
        return total.cpu_energy + (0.0 if self.measured else total.ram_energy) - self._began

    def close(self) -> None:
        """Stop its threads."""
        self._tracker.stop()


def _sealed_tracker(output: Any) -> Any:  # noqa: ANN401 - a library without types
    """Codecarbon's tracker, with no setting left to a user's file or environment, which could use the network."""
    from codecarbon import OfflineEmissionsTracker  # noqa: PLC0415 - optional

    return OfflineEmissionsTracker(
        output_handlers=[output],
        output_methods=[],
        output_dir=".",  # nothing is written there
        api_call_interval=-1,
        emissions_endpoint=None,
        electricitymaps_api_token=None,
        allow_multiple_runs=True,  # the other way is a lock file
        log_level="critical",
        measure_power_secs=SAMPLE_S,
        tracking_mode="machine",
        gpu_ids=[],
        force_carbon_intensity_g_co2e_kwh=0.0,  # CO2 is reckoned here, for GPUs and machines alike
        country_iso_code=None,
        region=None,
        cloud_provider=None,
        cloud_region=None,
        force_cpu_power=None,
        force_ram_power=None,
        force_mode_cpu_load=False,
        rapl_include_dram=False,
        rapl_prefer_psys=False,
        pue=1.0,
        wue=0.0,
    )


@contextmanager
def _codecarbon_silent() -> Generator[None]:
    """A block in which codecarbon does not talk on stderr, which it does from its import on."""
    log = logging.getLogger("codecarbon")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was
