"""Costs of a step over all of its attempts: from the work computed to a ledger."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import PretrainedConfig

from align.accounting.energy import EnergyMeter, EnergyReading
from align.accounting.flops import Decoder, Work, decoder_from_config, forward_flops, training_flops
from align.accounting.ledger import Ledger, Usage, step_ledger
from align.accounting.peak_memory import peak_memory
from align.accounting.settings import AccountingSettings
from align.artifacts import read_json, write_json
from align.distributed.progress import Progress
from align.errors import InputError

NOTHING = Work(0, 0, 0)
SPENT = "spent-{}.json"  # what one attempt of a step has used so far
SAVE_EVERY_S = 10.0  # seconds between two writes of it: what a kill may lose
RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # Linux: reset this process's peak memory
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Side of the square matrices whose product measures the device's rate; a smaller one leaves a large GPU half idle
PRODUCT_SIDE, PRODUCT_SIDE_CUDA = 2048, 4096
SMALLEST_SIDE, SLOW_PRODUCT_S = 256, 0.2  # the side doubles until a product takes this long
PRODUCTS = 4  # timed; the first one is slower


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The work that a step computed."""

    dimensions: Decoder | str | None = None  # of its model, or why they are unknown; None where no model ran
    weights: int | None = None
    frozen: bool = False  # whether only adapters were trained, without gradients of the other weights
    tokens_trained: int = 0
    trained: Work = NOTHING  # forward and backward
    observed: Work = NOTHING  # forward alone
    devices: int = 1
    precision: str = "fp32"
    wire_bytes: int | None = 0
    device: str = "cpu"

    @property
    def flops(self) -> tuple[float | None, str]:
        """Return the FLOPs of all devices, and the formula that they are counted by."""
        if isinstance(self.dimensions, str):
            return None, self.dimensions
        if self.dimensions is None:
            return 0.0, "no model ran"
        trained = training_flops(self.dimensions, self.trained)
        if self.frozen:
            trained -= forward_flops(self.dimensions, self.trained)
        formula = "2 per weight and token, 4 per attended pair and unit of width; a backward pass is two forward passes"
        return float(trained + forward_flops(self.dimensions, self.observed)), formula


def dimensions(config: PretrainedConfig) -> Decoder | str:
    """Return the dimensions that a model's cost depends on, or why they are unknown."""
    try:
        return decoder_from_config(config.to_dict())
    except InputError as error:
        return str(error)


@cache
def matrix_rate(device: str, precision: str) -> float:
    """Return the FLOP/s of a square matrix product in this process, the best of a few.

    The matrices are smaller where a product is slow, as in bf16 on a CPU without instructions for it.
    """
    largest = PRODUCT_SIDE_CUDA if device.startswith("cuda") else PRODUCT_SIDE
    side = SMALLEST_SIDE
    while side < largest and _product_s(side, device, precision) < SLOW_PRODUCT_S:
        side *= 2
    fastest_s = min(_product_s(side, device, precision) for _ in range(PRODUCTS))
    return 2 * side**3 / fastest_s


def _product_s(side: int, device: str, precision: str) -> float:
    """Return the seconds of one product of square matrices."""
    matrix = torch.ones(side, side, dtype=DTYPES[precision], device=device)
    began = time.perf_counter()
    torch.mm(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Meter:
    """Progress that is forwarded, while the time and energy of this attempt of the step are saved every few seconds."""

    def __init__(self, working: Path, progress: Progress, energy: EnergyMeter) -> None:
        reset_peak_memory()
        self._progress, self._energy, self._working = progress, energy, working
        earlier = sorted(working.glob(SPENT.format("*")))
        self._path = working / SPENT.format(len(earlier) + 1)
        self._earlier = [read_json(path) for path in earlier]
        self._began = self._saved = time.monotonic()
        self._before = energy.reading
        self.attempts = len(earlier) + 1

    def note(self, text: str) -> None:
        """Forward to the progress."""
        self._progress.note(text)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Forward to the progress."""
        self._progress.phase(name, total, done)

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Forward to the progress."""
        self._progress.advance(units, metrics)
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self._saved = time.monotonic()
            self._save_spent()

    def _spent(self) -> tuple[float, EnergyReading]:
        return time.monotonic() - self._began, self._energy.reading - self._before

    def _save_spent(self) -> None:
        seconds, energy = self._spent()
        write_json(self._path, {"seconds": seconds, "kwh": energy.kwh, "co2_kg": energy.co2_kg})

    def ledger(self, done: Done, settings: AccountingSettings) -> Ledger:
        """Return the cost of the step, including earlier attempts as far as they saved it."""
        seconds, energy = self._spent()
        for attempt in self._earlier:
            seconds += attempt["seconds"]
            kwh, co2_kg = _plus(energy.kwh, attempt["kwh"]), _plus(energy.co2_kg, attempt["co2_kg"])
            energy = EnergyReading(kwh=kwh, co2_kg=co2_kg, source=energy.source, measured=energy.measured)
        flops, source = done.flops
        peak = peak_memory(torch.device(done.device))  # before the matrix product below, which needs some
        usage = Usage(
            tokens_trained=done.tokens_trained,
            tokens_computed=done.trained.tokens + done.observed.tokens,
            flops=flops,
            flops_source=source,
            seconds=seconds,
            devices=done.devices,
            peak_flops=matrix_rate(done.device, done.precision),
            peak_memory_bytes=peak,
            wire_bytes=done.wire_bytes,
            weights=done.weights,
        )
        self._save_spent()
        return step_ledger(usage, energy, settings)


def remove_spent(working: Path) -> None:
    """Remove the saved costs of a step's attempts once its ledger is written."""
    for path in working.glob(SPENT.format("*")):
        path.unlink()


def _plus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def reset_peak_memory() -> None:
    """Reset the peak memory of this process, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    path, word = RESET_PEAK
    with suppress(OSError):
        path.write_text(word)
