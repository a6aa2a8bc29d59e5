"""What a step has computed, used and cost, over all its lives: the way from counts to a ledger."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import PretrainedConfig

from align.accounting.energy import EnergyMeter, EnergyReading
from align.accounting.formulas import (
    Decoder,
    Work,
    decoder,
    forward_flops,
    training_flops,
)
from align.accounting.ledger import Ledger, Usage, entry
from align.accounting.peak_memory import peak_memory
from align.accounting.settings import AccountingSettings
from align.artifacts import read_json, write_json
from align.distributed.progress import Progress
from align.errors import InputError

NOTHING = Work(0, 0, 0)
SPENT = "spent-{}.json"  # what one life of a step has used so far
KEEP_S = 10.0  # seconds between two notes of it: what a kill may lose
RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # Linux: the peak of this process's memory begins anew
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the square matrices whose product says how fast the device is; a smaller one leaves a large GPU half idle.
PRODUCT_SIDE, PRODUCT_SIDE_CUDA = 2048, 4096
PRODUCTS = 4  # timed; the first one is slower


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a step has computed."""

    dimensions: Decoder | str | None = None  # of its model, or why they are not known; None where none has run
    weights: int | None = None
    frozen: bool = False  # whether only adapters were trained: no gradient of the other weights is computed
    tokens_trained: int = 0
    trained: Work = NOTHING  # forward and backward
    observed: Work = NOTHING  # forward alone
    devices: int = 1
    precision: str = "fp32"
    wire_bytes: int | None = 0
    device: str = "cpu"

    @property
    def flops(self) -> tuple[float | None, str]:
        """Floating-point operations of all devices, and by what formula."""
        if isinstance(self.dimensions, str):
            return None, self.dimensions
        if self.dimensions is None:
            return 0.0, "no model was run"
        trained = training_flops(self.dimensions, self.trained)
        if self.frozen:
            trained -= forward_flops(self.dimensions, self.trained)
        told = "2 a weight and token, 4 a pair attended and unit of width; a backward pass twice a forward pass"
        return float(trained + forward_flops(self.dimensions, self.observed)), told


def dimensions(config: PretrainedConfig) -> Decoder | str:
    """What a model's cost depends on, or why it is not known."""
    try:
        return decoder(config.to_dict())
    except InputError as error:
        return str(error)


@cache
def matrix_rate(device: str, precision: str) -> float:
    """Floating-point operations a second of a square matrix product in this process, the best of a few."""
    size = PRODUCT_SIDE_CUDA if device.startswith("cuda") else PRODUCT_SIDE
    matrix = torch.ones(size, size, dtype=DTYPES[precision], device=device)
    best = 0.0
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        if matrix.is_cuda:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


class Meter:
    """A reporter that passes everything on, and now and then writes down what this life of the step has used."""

    def __init__(self, working: Path, report: Progress, energy: EnergyMeter) -> None:
        forget_peak()
        self._report, self._energy, self._working = report, energy, working
        earlier = sorted(working.glob(SPENT.format("*")))
        self._path = working / SPENT.format(len(earlier) + 1)
        self._earlier = [read_json(path) for path in earlier]
        self._began = self._noted = time.monotonic()
        self._before = energy.reading
        self.lives = len(earlier) + 1

    def note(self, text: str) -> None:
        """As the reporter does."""
        self._report.note(text)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """As the reporter does."""
        self._report.phase(name, total, done)

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """As the reporter does."""
        self._report.advance(units, metrics)
        if time.monotonic() - self._noted > KEEP_S:
            self._noted = time.monotonic()
            self._note_spent()

    def _spent(self) -> tuple[float, EnergyReading]:
        return time.monotonic() - self._began, self._energy.reading - self._before

    def _note_spent(self) -> None:
        seconds, energy = self._spent()
        write_json(self._path, {"seconds": seconds, "kwh": energy.kwh, "co2_kg": energy.co2_kg})

    def ledger(self, done: Done, settings: AccountingSettings) -> Ledger:
        """The step's whole cost, earlier lives included as far as they had noted it down."""
        seconds, energy = self._spent()
        for life in self._earlier:
            seconds += life["seconds"]
            kwh, co2_kg = _plus(energy.kwh, life["kwh"]), _plus(energy.co2_kg, life["co2_kg"])
            energy = EnergyReading(kwh=kwh, co2_kg=co2_kg, source=energy.source, measured=energy.measured)
        flops, source = done.flops
        peak = peak_memory(torch.device(done.device))  # before the product below, which takes some
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
        self._note_spent()
        return entry(usage, energy, settings)


def remove_spent(working: Path) -> None:
    """Remove the notes of the lives of a step whose ledger is written."""
    for path in working.glob(SPENT.format("*")):
        path.unlink()


def _plus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def forget_peak() -> None:
    """Let the peak of memory begin anew, where the system can forget the one before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    path, word = RESET_PEAK
    with suppress(OSError):
        path.write_text(word)
