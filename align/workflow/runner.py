"""The runner: every step of a recipe in order, or one step as a process of an `accelerate launch` calls it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from align import artifacts, pipeline
from align.accounting.energy import EnergyMeter
from align.content_hash import content_of
from align.data.chat_clock import BEGAN, began_at, pinned_time
from align.distributed import slurm
from align.distributed.launch import num_launched
from align.distributed.launch_files import check_gpus
from align.distributed.processes import shutdown_processes
from align.distributed.progress import Progress
from align.errors import InputError, RunError
from align.models.loading.pretrained import default_device
from align.redaction import as_written
from align.registry import UserCode
from align.stages.base import REFERENCES
from align.stages.costs.measured import Done, matrix_rate
from align.stages.costs.meter import Meter, remove_spent
from align.stages.inputs.context import RunContext
from align.stages.responses.sampling import remove_journals
from align.stages.training.rows import remove_rows
from align.train.checkpoint import remove_checkpoints
from align.train.references.compute import WORK_FILES
from align.workflow import spending
from align.workflow.environment import device_name, environment
from align.workflow.following import PHASES, WrittenProgress
from align.workflow.launcher import CONTENT, INSIDE_RUN, LAUNCH_LOCK, Command, first_began, is_waited_for, launch_step
from align.workflow.recipe.expansion import RUN_FILES
from align.workflow.recipe.schema import Recipe
from align.workflow.results.cards import write_cards
from align.workflow.results.written import PageWriter, write_results
from align.workflow.retention import unneeded_weights
from align.workflow.search.outcomes import check_chosen

MIB = 2**20


class RunProgress(Progress, Protocol):
    """A progress display that also shows the state of every step."""

    def watch(self, step: str, state: str) -> None:
        """Show that a step has changed its state."""
        ...


@dataclass(frozen=True, slots=True)
class _Executor:
    """Runs a step in its folder: in this process, or in the processes that its launch file describes."""

    recipe: Recipe
    progress: RunProgress
    energy: EnergyMeter
    command: Command | None  # for launched children; None in a child
    content: Callable[[str], str]  # hashes of files and folders that the keys of the steps have
    seconds: list[float] = field(default_factory=list[float])  # of each step that ran

    def __call__(self, step: pipeline.Step, working: Path, inputs: Mapping[str, Path]) -> Mapping[str, Any]:
        spending.record_finished(self.recipe)
        began, settings, allowed = time.monotonic(), self.recipe.steps[step.name], spending.allowance(self.recipe)
        copied = self.recipe.copies.get(step.name)
        if copied is None and settings.launch is not None and self.command is not None:
            self.progress.phase(settings.stage, 0)
            mark = pipeline.fingerprints(self.recipe.pipeline(self.content))[step.name]
            began_at(working)  # for every process of the launch
            launched = launch_step(self.command, step.name, settings, mark, working, self.progress)
            self.seconds.append(time.monotonic() - began)
            return launched
        peak = _peak_flops(settings.training_precision)
        meter = Meter(working, self.progress, self.energy, allowed, peak_flops=peak)
        with meter, pinned_time(began_at(working)), _errors_of(self.recipe, step.name):
            if copied is not None:
                content = {**pipeline.copied(inputs[copied], working), "done": Done()}
            else:
                context = run_context(self.recipe, step.name, working, meter, self.content)
                content = settings.run(context)
                meter.add_elsewhere(spending.used_elsewhere())
        done = content.pop("done")
        ledger = meter.ledger(done, self.recipe.accounting).to_json()
        self.seconds.append(time.monotonic() - began)
        return {
            **content,
            "stage": settings.stage,
            "settings": as_written(settings.model_dump(mode="json")),
            "seed": self.recipe.seed,
            "versions": artifacts.versions(),
            "environment": environment(),
            "device": done.device,
            "ledger": ledger,
            "attempts": meter.attempts,
        }


def _peak_flops(precision: str | None) -> float | None:
    """Return the FLOP/s of a device for the display of a training step.

    None without optimizer steps, or if other processes would share the processor during the measurement.
    """
    device = default_device()
    is_shared = device == "cpu" and num_launched() > 1
    return None if precision is None or is_shared else matrix_rate(device, precision)


@contextmanager
def _errors_of(recipe: Recipe, name: str) -> Generator[None]:
    """Locate the errors of a step in the recipe, and report the exceptions of a user's own stage."""
    stage = recipe.steps[name].stage
    with recipe.locating(name), UserCode("stage", stage) if ":" in stage else nullcontext():
        yield


def run_context(
    recipe: Recipe, name: str, folder: Path, progress: Progress, content: Callable[[str], str] | None = None
) -> RunContext:
    """Return what a step's `run` is given besides its settings. `content` are the hashes that its key has."""
    inputs = recipe.resolved(name, content or content_of)
    own = [source.path for source_name, source in inputs.sources.items() if source_name in recipe.data]
    hashed = {path: content(path) for path in own} if content is not None else {}
    return RunContext(name=name, folder=folder, inputs=replace(inputs, hashed=hashed), progress=progress)


def run_recipe(
    command: Command,
    progress: RunProgress,
    *,
    disk: tuple[int, int],
    until: str | None = None,
    rerun_from: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the unfinished steps of a recipe and return the manifest of every step.

    `disk` is what `disk_need` returns. The run's folder then also holds RUN_FILES.
    """
    began, recipe = time.monotonic(), command.loaded
    last, rerun = _ends(recipe, until, rerun_from)
    content = cache(content_of)
    plans = planned(recipe, until, rerun_from, content)
    _check_machine(recipe, plans)
    with pipeline.locked(recipe.root, progress.note), spending.energy_meter(recipe) as energy:
        spending.check_budget(recipe, energy)
        resumed = {each.step.name for each in plans if each.state == pipeline.INTERRUPTED}
        if not is_waited_for(recipe, recipe.steps, resumed):
            _remove_leftovers(recipe, progress)
        spending.record_abandoned(recipe, plans)
        progress.note(f"device: {device_name()}, {torch.get_num_threads()} thread(s) in a process")
        _report_disk(recipe.root, *disk, progress=progress)
        artifacts.write_json(recipe.root / "recipe.json", as_written(recipe.model_dump(mode="json")), sort_keys=False)
        execute = _Executor(recipe, progress, energy, command, content)
        manifests = pipeline.run(
            recipe.pipeline(content),
            recipe.root,
            execute=execute,
            log=progress.note,
            on_state=PageWriter(recipe, progress.watch).watch,
            cleanup=pipeline.Cleanup(_cleanup, partial(unneeded_weights, recipe)),
            until=last,
            rerun=rerun,
        )
        spending.record_finished(recipe)
        ledger = write_results(recipe, manifests)
        write_cards(recipe, manifests)
        wall_s = time.monotonic() - began
        ledger["last_call"] = {"wall_seconds": wall_s, "overhead_seconds": wall_s - sum(execute.seconds)}
        artifacts.write_json(recipe.root / "ledger.json", ledger)
    return manifests


def _remove_leftovers(recipe: Recipe, progress: Progress) -> None:
    """Remove temporary files of killed calls; raise `RunError` where a launched step of one still writes."""
    if (recipe.root / LAUNCH_LOCK).exists():
        with pipeline.locked(recipe.root, progress.note, lock=LAUNCH_LOCK):
            pass
    for name in RUN_FILES:
        artifacts.remove_leftovers(recipe.root, of=name)
    targets = [recipe.root / name for name in recipe.steps]
    for folder in (recipe.root / REFERENCES, *targets, *map(artifacts.working_folder, targets)):
        artifacts.remove_leftovers(folder)


def planned(
    recipe: Recipe, until: str | None, rerun_from: str | None, content: Callable[[str], str] | None = None
) -> list[pipeline.PlannedStep]:
    """Return what `run_recipe` would do with each step. `content` are the hashes of files that are known already."""
    last, rerun = _ends(recipe, until, rerun_from)
    return pipeline.plan(recipe.pipeline(content), recipe.root, until=last, rerun=rerun)


def run_step(command: Command, name: str, progress: RunProgress) -> None:
    """Run one step whose inputs are finished. Every process of a launch calls it; the first one writes the folder."""
    recipe = command.loaded
    (name,) = recipe.expanded(name)[-1:]
    check_chosen(recipe, name)
    recipe.steps[name].check_processes(name)
    content = cache(content_of)
    steps = {step.name: step for step in recipe.pipeline(content)}
    marks = pipeline.fingerprints(list(steps.values()))
    is_first, is_launched = int(os.environ.get("RANK", "0")) == 0, INSIDE_RUN in os.environ
    if is_launched and os.environ[INSIDE_RUN] != marks[name]:
        changed = "the recipe, or a file that it names, has changed since the run began"
        raise RunError(f"step {name!r}: {changed}; rerun the same command")
    needed = recipe.ancestors(name)
    chosen = [steps[other] for other in steps if other in needed or other == name]
    plans = {each.step.name: each for each in pipeline.plan(chosen, recipe.root)}
    state = plans[name].state
    for other in plans.values():
        if other.state != pipeline.FINISHED and other.step.name != name:
            raise InputError(
                f"step {name!r} needs {other.step.name!r}, which has to run first ({other.reason}): align run"
            )
    if state == pipeline.FINISHED and not is_launched:
        progress.note(f"{name}: {plans[name].reason}")
        return
    target, inputs = recipe.root / name, {other: recipe.root / other for other in steps[name].inputs}
    working = artifacts.working_folder(target)
    if not is_first:
        is_complete = "step" in (artifacts.read_manifest(working) or {})  # only renaming it is left, for the first
        if not (state == pipeline.INTERRUPTED and is_complete):
            is_ready = (lambda: True) if is_launched else partial(_is_prepared, chosen, recipe, name)
            began = first_began(working, is_ready, progress.note)
            with pinned_time(began), _errors_of(recipe, name):
                context = run_context(recipe, name, working, progress, content)
                recipe.steps[name].run(context)
                spending.used_elsewhere()
            shutdown_processes()
        return
    lock = LAUNCH_LOCK if is_launched else pipeline.LOCK_FILE  # a launched child may outlive a killed pipeline
    with pipeline.locked(recipe.root, progress.note, lock=lock), spending.energy_meter(recipe) as energy:
        spending.check_budget(recipe, energy)
        execute = _Executor(
            recipe, WrittenProgress(progress, working) if is_launched else progress, energy, None, content
        )
        if is_launched:
            artifacts.write_json(working / CONTENT, execute(steps[name], working, inputs))
        else:
            is_waited_for(recipe, [name], resumed=())
            spending.record_abandoned(recipe, plans.values())
            cleanup = pipeline.Cleanup(_cleanup)  # the other steps of the recipe may read what the chosen ones made
            pipeline.run(
                chosen, recipe.root, execute=execute, log=progress.note, on_state=progress.watch, cleanup=cleanup
            )
            spending.record_finished(recipe)
    shutdown_processes()


def _is_prepared(steps: Sequence[pipeline.Step], recipe: Recipe, name: str) -> bool:
    """Return whether a step's working folder belongs to this attempt, as it does once the first process has begun."""
    return (name, pipeline.INTERRUPTED) in {(each.step.name, each.state) for each in pipeline.plan(steps, recipe.root)}


def _ends(recipe: Recipe, until: str | None, rerun_from: str | None) -> tuple[str | None, list[str]]:
    """Return the last step to run and the steps to run again, by their names in the expanded recipe."""
    last = recipe.expanded(until)[-1] if until is not None else None
    if rerun_from is None:
        return last, []
    of_trials = [trial for trial, step in recipe.stands_for.items() if step == rerun_from]
    return last, [*of_trials, *recipe.expanded(rerun_from)]


def _check_machine(recipe: Recipe, steps: Sequence[pipeline.PlannedStep]) -> None:
    """Raise `InputError` if a step to run needs another machine, or its launch file more GPUs than there are."""
    for name in (each.step.name for each in steps if each.state != pipeline.FINISHED):
        settings = recipe.steps[name]
        with recipe.locating(name):
            settings.check_machine()
            if settings.launch is not None and settings.slurm is None:
                check_gpus(settings.launch, torch.cuda.device_count())


def _report_disk(root: Path, models: int, checkpoints: int, *, progress: Progress) -> None:
    """Report the disk space that the run needs. A step keeps its latest checkpoint, and none when it is finished."""
    free = shutil.disk_usage(root).free
    progress.note(
        f"{root}: models need {models / MIB:,.0f} MiB of disk, and checkpoints up to {checkpoints / MIB:,.0f} MiB more "
        f"while a step runs; {free / MIB:,.0f} MiB free"
    )
    if models + checkpoints > free:
        progress.note("insufficient disk space: the run will stop when the disk is full, and resumes when it is rerun")


def _cleanup(working: Path) -> None:
    """Remove what only resuming a step needs."""
    remove_checkpoints(working)
    remove_rows(working)
    remove_journals(working)
    remove_spent(working)
    for name in (*WORK_FILES, CONTENT, PHASES, BEGAN, slurm.JOB_FILE):
        (working / name).unlink(missing_ok=True)
