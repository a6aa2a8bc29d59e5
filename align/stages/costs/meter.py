"""The meter of a step: what all of its attempts use, saved while it runs, for its ledger and the budget of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from align.accounting.budget import Allowance, Spent
from align.accounting.energy import EnergyMeter
from align.accounting.ledger import Ledger, Usage, step_ledger, sum_if_known
from align.accounting.peak_memory import peak_memory
from align.accounting.process_usage import PROCESS_USAGE, ServersAndJudges, sum_usage
from align.accounting.settings import AccountingSettings
from align.artifacts import SPENT, read_json, write_json
from align.distributed.launch import num_launched
from align.distributed.progress import Progress
from align.distributed.signals import stop_run
from align.models.loading.pretrained import default_device
from align.stages.costs.measured import FORMULA, Done, matrix_rate

SAVE_EVERY_S = 10.0  # seconds between two writes of it: what a kill may lose
READ_EVERY_S = 1.0  # seconds between two readings of the energy counters
SERVERS_AND_JUDGES = "servers_and_judges"  # what servers charged an attempt, and what judges computed in it
PEAKS = "peak_memory_bytes"  # of an attempt, by kind of device
WITHOUT_SERVED = "without judges on servers, whose FLOPs are unknown"
ONLY_SERVED = "the FLOPs of judges on servers are unknown"
RESET_PEAK = Path("/proc/self/clear_refs"), "5"  # Linux: reset this process's peak memory


class ProcessUse(NamedTuple):
    """What a process of a launch has used when it has run its step."""

    charged: ServersAndJudges
    peak_memory: int  # bytes, of its own device


class Meter:
    """Progress that is forwarded, while what this attempt of the step uses is saved every few seconds.

    What the run has used so far is added to the metrics (`RESOURCES`); `peak_flops` is the peak of a device, for the
    utilization. Where the run has used up its budget, it is stopped: `stop_run` of
    `align.distributed.signals`.
    """

    def __init__(
        self,
        working: Path,
        progress: Progress,
        energy: EnergyMeter,
        allowance: Allowance,
        *,
        peak_flops: float | None = None,
    ) -> None:
        reset_peak_memory()
        self._progress, self._energy, self._allowance = progress, energy, allowance
        self._earlier = read_spent(working)
        self.attempts = len(self._earlier) + 1
        self._path = working / SPENT.format(self.attempts)
        self._began = self._saved = time.monotonic()
        self._read = -math.inf
        self._before = self._last = energy.reading
        self._charged_before = PROCESS_USAGE.now
        self._elsewhere: list[ProcessUse] = []  # of other processes of the launch
        self._flops = 0.0  # as far as they are known while the step runs
        self._devices = num_launched()
        self._peak_flops = None if peak_flops is None else peak_flops * self._devices

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._save_spent()

    def note(self, text: str) -> None:
        """Forward to the progress."""
        self._progress.note(text)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Forward to the progress."""
        self._progress.phase(name, total, done)

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Forward to the progress, and stop the run if its budget is spent."""
        self._flops += (metrics or {}).get("flops", 0.0)
        now = time.monotonic()
        if now - self._read > READ_EVERY_S:
            self._read = now
            self._last = self._energy.reading
        self._progress.advance(units, metrics and {**metrics, **self._resources(metrics)})
        if now - self._saved > SAVE_EVERY_S:
            self._save_spent()
        if (cap := self._allowance.reached(self._spent)) is not None:
            stop_run(cap)

    @property
    def _spent(self) -> Spent:
        return spent_by(self._state(), self._allowance.accounting)

    def _resources(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return what is known of the resources that the optimizer step, this process and the run have used."""
        run = self._allowance.before + self._spent
        mfu = None
        if self._peak_flops is not None and "timed_flops" in metrics:
            mfu = metrics["timed_flops"] / (metrics["seconds"] * self._peak_flops)
        found = {
            "mfu": mfu,
            "peak_memory_bytes": peak_memory(torch.device(default_device())),
            "energy_wh": run.energy_wh,
            "money": run.money,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _state(self) -> dict[str, Any]:
        """Return what this attempt has used so far, its energy at the last reading of the counters."""
        energy = self._last - self._before
        return {
            "seconds": time.monotonic() - self._began,
            "kwh": energy.kwh,
            "co2_kg": energy.co2_kg,
            "devices": self._devices,
            "flops": self._flops,
            SERVERS_AND_JUDGES: sum_usage(
                [PROCESS_USAGE.now.since(self._charged_before), *(each.charged for each in self._elsewhere)]
            ).to_json(),
        }

    def _save_spent(self) -> None:
        self._saved = time.monotonic()
        self._last = self._energy.reading
        peaks = {kind: peak_memory(torch.device(kind)) for kind in sorted({"cpu", default_device()})}
        write_json(self._path, {**self._state(), PEAKS: peaks})

    def ledger(self, done: Done, settings: AccountingSettings) -> Ledger:
        """Return the cost of the step, including earlier attempts as far as they saved it."""
        self._save_spent()
        attempts = [*self._earlier, self._state()]
        used = {name: sum_if_known(attempt[name] for attempt in attempts) for name in ("kwh", "co2_kg")}
        energy = replace(self._last - self._before, **used)
        apart = sum_usage(map(servers_and_judges, attempts))  # from the work of the step's own model
        flops, source = done.flops
        if flops is not None and apart.judge_unknown:
            flops = None
            source = apart.judge_unknown
        elif flops is not None and apart.judge_flops:
            flops += apart.judge_flops
            source = FORMULA
        if flops is not None and apart.served_answers:
            flops, source = (flops, f"{source}; {WITHOUT_SERVED}") if source == FORMULA else (None, ONLY_SERVED)
        device = torch.device(done.device)
        peaks = [each[PEAKS].get(device.type, 0) for each in self._earlier if PEAKS in each]
        peaks += [each.peak_memory for each in self._elsewhere]
        peak = max([peak_memory(device), *peaks])  # before the matrix product below, which needs some
        usage = Usage(
            tokens_trained=done.tokens_trained,
            tokens_computed=_tokens(done, apart),
            flops=flops,
            flops_source=source,
            seconds=sum(attempt["seconds"] for attempt in attempts),
            devices=done.devices,
            peak_flops=matrix_rate(done.device, done.precision),
            peak_memory_bytes=peak,
            wire_bytes=done.wire_bytes,
            weights=done.weights,
        )
        return step_ledger(usage, energy, settings, server_cost=apart.server_cost)

    def add_elsewhere(self, uses: Iterable[ProcessUse]) -> None:
        """Add what other processes of the launch have used."""
        self._elsewhere += uses


def _tokens(done: Done, apart: ServersAndJudges) -> int | None:
    """Return the tokens that the step and its local judges computed; None where they are unknown."""
    if done.tokens_computed is None:
        return None
    tokens = done.tokens_computed + apart.judge_tokens
    return None if tokens == 0 and apart.served_answers else tokens


def read_spent(working: Path) -> list[dict[str, Any]]:
    """Return what each attempt of an unfinished step has used."""
    return [read_json(path) for path in sorted(working.glob(SPENT.format("*")))]


def spent_unfinished(working: Path, accounting: AccountingSettings) -> Spent:
    """Return what all attempts of an unfinished step have used."""
    return sum((spent_by(attempt, accounting) for attempt in read_spent(working)), Spent())


def spent_by(attempt: Mapping[str, Any], accounting: AccountingSettings) -> Spent:
    """Return what an attempt has used, or a step that was replaced, whose record has its whole cost."""
    apart = servers_and_judges(attempt)
    used = Spent.of(
        accounting,
        flops=sum_if_known([attempt["flops"], apart.judge_flops]),
        seconds=attempt["seconds"],
        devices=attempt["devices"],
        kwh=attempt["kwh"],
        server_cost=apart.server_cost,
    )
    return replace(used, money=attempt["cost"]) if "cost" in attempt else used


def servers_and_judges(attempt: Mapping[str, Any]) -> ServersAndJudges:
    """Return what servers charged an attempt, and what judges computed in it."""
    return ServersAndJudges(**attempt.get(SERVERS_AND_JUDGES, {}))


def remove_spent(working: Path) -> None:
    """Remove the saved costs of a step's attempts once its ledger is written."""
    for path in working.glob(SPENT.format("*")):
        path.unlink()


def reset_peak_memory() -> None:
    """Reset the peak memory of this process, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    path, word = RESET_PEAK
    with suppress(OSError):
        path.write_text(word)
