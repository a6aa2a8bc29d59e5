"""Counters of electricity: NVML for GPUs, codecarbon for the whole machine. They use no network and write no files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol

MILLIJOULES_PER_KWH = 3.6e9
SAMPLE_S = 15  # interval of codecarbon's readings; a RAPL counter wraps within the hour, at most once between readings


class Counter(Protocol):
    """A counter of electricity in kWh."""

    source: str  # where the value is from, or why there is none
    measured: bool  # by hardware counters, not estimated

    def kwh(self) -> float | None:
        """Return the electricity used since the counter was created; None if it is unknown."""
        ...

    def close(self) -> None:
        """Release the counter's resources."""
        ...


class NoCounter:
    """A counter without a source of readings; `source` says why."""

    measured = False

    def __init__(self, reason: str) -> None:
        self.source = reason

    def kwh(self) -> None:
        """Return None."""

    def close(self) -> None:
        """Do nothing."""


def gpu_counter(uuids: Sequence[str]) -> Counter:
    """Return the NVML counter of the GPUs with these UUIDs, or one without readings if NVML is unavailable."""
    try:
        import pynvml  # noqa: PLC0415 - optional
    except ImportError:
        return NoCounter("nvidia-ml-py, which reads the GPUs' counters, is not installed")
    try:
        return NvmlCounter(pynvml, uuids)
    except pynvml.NVMLError as error:
        return NoCounter(f"NVML has no energy counter of {', '.join(uuids)}: {error}")


class NvmlCounter:
    """The energy counters of GPUs, which NVML has for Volta and later."""

    measured = True

    def __init__(self, nvml: Any, uuids: Sequence[str]) -> None:  # noqa: ANN401 - an untyped module
        self._nvml = nvml
        nvml.nvmlInit()  # reference-counted, so that another user's shutdown does not affect this one
        # torch returns UUIDs without the prefix that NVML requires
        names = [uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}" for uuid in uuids]
        self._handles = [nvml.nvmlDeviceGetHandleByUUID(name) for name in names]
        self.source = f"NVML energy counters of {len(names)} GPU(s), without the rest of the machine"
        self._start = self._millijoules()

    def _millijoules(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)

    def kwh(self) -> float | None:
        """Return the electricity used since the counter was created; None if NVML fails."""
        try:
            return (self._millijoules() - self._start) / MILLIJOULES_PER_KWH
        except self._nvml.NVMLError as error:
            self.source = f"NVML lost an energy counter: {error}"
            return None

    def close(self) -> None:
        """Release NVML."""
        self._nvml.nvmlShutdown()


def machine_counter() -> Counter:
    """Return codecarbon's counter of the whole machine, or one without readings if it is not installed."""
    if importlib.util.find_spec("codecarbon") is None:
        return NoCounter("codecarbon is not installed: pip install codecarbon")
    return CodecarbonCounter()


class CodecarbonCounter:
    """Codecarbon's tracker: RAPL counters of the CPU if they are readable, otherwise an estimate from load and size."""

    def __init__(self) -> None:
        from codecarbon.core.cpu import is_rapl_available  # noqa: PLC0415 - optional
        from codecarbon.output_methods.base_output import BaseOutput  # noqa: PLC0415 - optional

        class LastTotal(BaseOutput):
            """An output that stores the last total instead of writing or sending it."""

            total: Any = None

            def out(self, total: Any, delta: Any) -> None:  # noqa: ANN401 - an untyped library
                self.total = total

        self._output = LastTotal()
        self.measured = sys.platform == "linux" and is_rapl_available()  # as codecarbon decides
        self._tracker = _isolated_tracker(self._output)
        self._tracker.start()
        self._start = 0.0
        self._start = self.kwh() or 0.0
        cpu = getattr(self._output.total, "cpu_model", "unknown")
        estimate = f"an estimate: CPU ({cpu}) by load and nominal power, memory by size; RAPL counters are not readable"
        how = "RAPL counters of the CPU, without memory" if self.measured else estimate
        self.source = f"codecarbon {metadata.version('codecarbon')} for the whole machine, {how}"

    def kwh(self) -> float | None:
        """Return the electricity used since the counter was created; None if codecarbon fails (silently)."""
        self._output.total = None
        self._tracker.flush()
        total = self._output.total
        if total is None:
            self.source = "codecarbon failed"
            return None
        return total.cpu_energy + (0.0 if self.measured else total.ram_energy) - self._start

    def close(self) -> None:
        """Stop codecarbon's threads."""
        self._tracker.stop()


def _isolated_tracker(output: Any) -> Any:  # noqa: ANN401 - an untyped library
    """Return a tracker with every option set, so that no user file or environment variable makes it use the network."""
    from codecarbon import OfflineEmissionsTracker  # noqa: PLC0415 - optional

    return OfflineEmissionsTracker(
        output_handlers=[output],
        output_methods=[],
        output_dir=".",  # nothing is written there
        api_call_interval=-1,
        emissions_endpoint=None,
        electricitymaps_api_token=None,
        allow_multiple_runs=True,  # otherwise it creates a lock file
        log_level="critical",
        measure_power_secs=SAMPLE_S,
        tracking_mode="machine",
        gpu_ids=[],
        force_carbon_intensity_g_co2e_kwh=0.0,  # CO2 is computed from the grid intensity, also for GPUs
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
