"""The budget of a run: whether its caps can be measured, and what the run has used so far."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from align.accounting.budget import Allowance, Spent, reached
from align.accounting.energy import EnergyMeter
from align.accounting.ledger import Ledger
from align.accounting.peak_memory import peak_memory
from align.accounting.process_usage import PROCESS_USAGE
from align.artifacts import read_json, read_manifest, working_folder, write_json
from align.distributed.processes import Processes
from align.distributed.signals import stop_run
from align.errors import InputError
from align.models.loading.config import dimensions
from align.models.loading.pretrained import default_device
from align.pipeline import INTERRUPTED, PlannedStep
from align.stages.costs.meter import ProcessUse, read_spent, remove_spent, spent_by, spent_unfinished
from align.workflow.estimate import ModelPlans
from align.workflow.recipe.schema import Recipe

SEVERAL_MACHINES = "the step ran on several machines, and only the first one has a meter"
# In a run folder: what finished steps and abandoned attempts used, which outlasts their folders
RECORDS = ".spent.json"


def energy_meter(recipe: Recipe) -> EnergyMeter:
    """Return a meter of this machine's GPUs, or of the whole machine where it has none.

    The energy of a launch over several machines is unknown, as only the first process has a meter.
    """
    gpus = [str(torch.cuda.get_device_properties(at).uuid) for at in range(torch.cuda.device_count())]
    processes = os.environ.get("WORLD_SIZE", "1")
    is_one_machine = int(processes) <= int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return EnergyMeter(recipe.accounting, gpus, unknown=None if is_one_machine else SEVERAL_MACHINES)


def check_budget(recipe: Recipe, energy: EnergyMeter) -> None:
    """Raise `InputError` for a cap on what this machine cannot measure. `energy` is running."""
    if recipe.budget.energy_wh is not None and energy.reading.kwh is None:
        raise InputError(f"the energy of a run cannot be capped here: {energy.reading.source}", ("budget", "energy_wh"))
    plans = ModelPlans(recipe)
    for name, step in recipe.steps.items() if recipe.budget.flops is not None else ():
        if step.disk(1) != (0, 0) and isinstance(reason := dimensions(plans.loaded(name)[1]), str):
            message = f"the FLOPs of step {name!r} cannot be capped: {reason}"
            raise InputError(message, ("budget", "flops"))


def allowance(recipe: Recipe) -> Allowance:
    """Return the caps of a run with what it has used: by finished and by unfinished steps, replaced ones included.

    Stops the run if a cap is reached already. Raises `InputError` for a cap on what is unknown of an earlier step, and
    for a step whose cost is in another currency.
    """
    spent = Spent()
    budget = recipe.budget
    accounting = recipe.accounting
    for name, used in _used(recipe):
        spent = spent + used
        for cap in type(budget).model_fields:
            if getattr(budget, cap) is not None and getattr(spent, cap) is None:
                message = f"step {name!r} ran without a measurement of it; remove the cap, or start another run"
                raise InputError(message, ("budget", cap))
    if (cap := reached(budget, spent, accounting.currency)) is not None:
        stop_run(cap)
    return Allowance(budget, accounting, spent)


def record_finished(recipe: Recipe) -> None:
    """Record what finished steps have used, which counts after they run again and after their folders are removed."""
    records = _records(recipe.root)
    new = [record for name, ledger in _ledgers(recipe) if not _is_in(record := _record(name, ledger), records)]
    if new:
        write_json(recipe.root / RECORDS, [*records, *new])


def record_abandoned(recipe: Recipe, planned: Iterable[PlannedStep]) -> None:
    """Record what those unfinished attempts of planned steps have used that are not resumed: their folders go."""
    for each in planned:
        working = working_folder(recipe.root / each.step.name)
        if each.state != INTERRUPTED and (attempts := read_spent(working)):
            records = [{"step": each.step.name, **attempt} for attempt in attempts]
            write_json(recipe.root / RECORDS, [*_records(recipe.root), *records])
            remove_spent(working)


def _used(recipe: Recipe) -> Iterator[tuple[str, Spent]]:
    """Yield what the steps have used, each by its name."""
    records = _records(recipe.root)
    for each in records:
        yield each["step"], spent_by(each, recipe.accounting)
    for name, ledger in _ledgers(recipe):
        if ledger.cost is not None and ledger.currency != recipe.accounting.currency:
            message = f"step {name!r} has a cost in {ledger.currency}; keep {ledger.currency}, or start another run"
            raise InputError(message, ("accounting", "currency"))
        if not _is_in(_record(name, ledger), records):
            yield name, Spent.of_ledger(ledger, recipe.accounting)
    for name in _steps(recipe):
        yield name, spent_unfinished(working_folder(recipe.root / name), recipe.accounting)


def _steps(recipe: Recipe) -> list[str]:
    """Return the steps of the recipe, and those that the run's folder has besides: later trials, and renamed ones."""
    found = {path.name.removesuffix(".partial") for path in recipe.root.glob("*") if path.is_dir()}
    return [*recipe.steps, *sorted(found - recipe.steps.keys())]


def _ledgers(recipe: Recipe) -> Iterator[tuple[str, Ledger]]:
    """Yield the ledgers of the finished steps, each by its name."""
    for name in _steps(recipe):
        manifest = read_manifest(recipe.root / name) or {}
        if "ledger" in manifest:
            yield name, Ledger.from_json(manifest["ledger"])


def _record(name: str, ledger: Ledger) -> dict[str, Any]:
    """Return what a step has used in the form of an attempt."""
    used = {"flops": ledger.flops, "seconds": ledger.seconds, "devices": ledger.devices, "kwh": ledger.energy_kwh}
    return {"step": name, **used, **({} if ledger.cost is None else {"cost": ledger.cost})}


def _is_in(record: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a step's use is recorded, perhaps under the name that its folder had before."""
    return any({**other, "step": record["step"]} == record for other in records)


def _records(root: Path) -> list[dict[str, Any]]:
    return read_json(root / RECORDS) if (root / RECORDS).is_file() else []


def used_elsewhere() -> list[ProcessUse]:
    """Return what the other processes of a launch have used; all of them call it when they have run the step."""
    if not torch.distributed.is_initialized():
        return []
    processes = Processes(PartialState())
    uses = processes.all_gather_object(ProcessUse(PROCESS_USAGE.now, peak_memory(torch.device(default_device()))))
    return [*uses[: processes.rank], *uses[processes.rank + 1 :]]
