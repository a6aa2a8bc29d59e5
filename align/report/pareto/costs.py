"""The cost of each policy, with all steps that it depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

from align.report.formatting import duration, plain, scaled, size
from align.report.run_folder import Run, Step
from align.report.samples import EVALUATE

IMPORT = "import"  # stage of steps that cost no training
LOGS = ".jsonl"  # files of a policy's folder that no user of the policy needs


@dataclass(frozen=True, slots=True)
class Resource:
    """What a policy costs, as the ledgers of its steps or the files of its folder say."""

    title: str
    key: str  # of the ledger; empty for the size of the folder
    format: Callable[[float], str]
    scale: float = 1  # from the ledger's unit to the shown one
    is_peak: bool = False  # the maximum over steps, in place of their sum


COMPUTE = Resource("compute", "flops", partial(scaled, unit="FLOP"))
RESOURCES = (
    COMPUTE,
    Resource("time", "seconds", duration),
    Resource("energy", "energy_kwh", lambda value: f"{plain(value)} Wh", scale=1000),
    Resource("money", "cost", plain),
    Resource("peak memory", "peak_memory_bytes", size, is_peak=True),
    Resource("size on disk", "", size),
)


def policy_costs(run: Run) -> dict[str, dict[str, float | None]]:
    """Return {policy: {resource: cost}} of the evaluated policies; None if any part of a cost is unknown.

    A cost is the sum over all steps that a policy depends on, and the maximum for peak memory. Imported policies are
    free, and evaluations do not count. The size is that of the policy's own files without logs.
    """
    return {name: {resource.title: _cost(run, name, resource) for resource in RESOURCES} for name in run.table}


def _cost(run: Run, policy: str, resource: Resource) -> float | None:
    if not resource.key:
        return _bytes(run.step(policy))
    known: list[float] = []
    for name in dependencies(run, policy):
        step = run.step(name)
        if step is not None and step.stage in (IMPORT, EVALUATE):
            continue
        value = run.ledgers.get(name, {}).get(resource.key)
        if value is None:
            return None
        known.append(float(value) * resource.scale)
    return max(known, default=0.0) if resource.is_peak else math.fsum(known)


def dependencies(run: Run, policy: str) -> Sequence[str]:
    """Return the policy's step and every step that it depends on, by the inputs in the manifests, each once."""
    found = dict.fromkeys([policy])
    waiting = [policy]
    while waiting:
        step = run.step(waiting.pop())
        inputs: Mapping[str, str] = (step.manifest.get("inputs") or {}) if step is not None else {}
        new = [name for name in inputs if name not in found]
        found |= dict.fromkeys(new)
        waiting += new
    return list(found)


def _bytes(step: Step | None) -> float | None:
    files: Mapping[str, Mapping[str, int]] = (step.manifest.get("files") or {}) if step is not None else {}
    kept = [file["bytes"] for name, file in files.items() if PurePath(name).suffix != LOGS]
    return float(sum(kept)) if kept else None
