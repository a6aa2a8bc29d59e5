"""Running a recipe: every step in order, or one step as each process of an `accelerate launch` calls it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from align import artifacts, pipeline
from align.accounting.energy import EnergyMeter
from align.accounting.ledger import Ledger, total
from align.distributed.processes import shutdown_processes
from align.distributed.progress import Progress
from align.distributed.signals import defer_sigterm
from align.errors import InputError, RunError
from align.stages.costs import Meter, remove_spent
from align.stages.evaluating import changes, evaluate_policy
from align.stages.generating import remove_kept
from align.stages.groups import generate_groups, score_groups
from align.stages.recipe import Recipe, load_recipe
from align.stages.rewards import train_reward_model
from align.stages.sources import remove_rows
from align.stages.training import Context, import_policy, train
from align.train.checkpoint import remove_checkpoints
from align.train.reference import REFERENCE_WORK

INSIDE = "ALIGN_INSIDE_RUN"  # in a launched child's environment: the step's fingerprint, as its pipeline has it
LAUNCHED = ".lock-launched"  # beside the pipeline's own
CONTENT = "content.json"  # what a launched child leaves for the pipeline to complete its step with
MIB = 2**20
LEAVES = ("recipe.json", "table.json", "changes.json", "ledger.json", "report.html")  # of a run, beside its steps
LOOK_S = 0.5  # seconds between two looks at a launched child


@dataclass(frozen=True, slots=True)
class Command:
    """How the recipe was given, for children to be given the same."""

    recipe: Path
    overrides: tuple[str, ...]

    def load(self) -> Recipe:
        """The recipe, checked."""
        return load_recipe(self.recipe, self.overrides)


class Watcher(Progress, Protocol):
    """A reporter who also sees the whole pipeline."""

    def watch(self, step: str, state: str) -> None:
        """A step has come into another state."""
        ...


def run_recipe(
    command: Command,
    report: Watcher,
    *,
    need: tuple[int, int],
    until: str | None = None,
    again: str | None = None,
) -> dict[str, dict[str, Any]]:
    """The manifest of every step, after those that were not finished have run.

    Beside the steps it leaves the files of LEAVES.
    """
    began, recipe = time.monotonic(), command.load()
    last, redone = _ends(recipe, until, again)
    gpus = [str(torch.cuda.get_device_properties(at).uuid) for at in range(torch.cuda.device_count())]
    with pipeline.locked(recipe.root, report.note), EnergyMeter(recipe.accounting, gpus) as energy:
        for name in LEAVES:  # what a kill has left of one
            artifacts.remove_leftovers(recipe.root, of=name)
        _tell_disk(recipe.root, *need, report=report)
        artifacts.write_json(recipe.root / "recipe.json", recipe.model_dump(mode="json"), sort_keys=False)
        computing_s: list[float] = []
        made = pipeline.run(
            recipe.pipeline(),
            recipe.root,
            execute=_timed(_executor(recipe, report, energy, command), computing_s),
            log=report.note,
            on_state=report.watch,
            cleanup=_tidy,
            until=last,
            rerun=redone,
        )
        _conclude(recipe, made, began=began, computing_s=sum(computing_s))
    return made


def planned(recipe: Recipe, until: str | None, again: str | None) -> list[pipeline.PlannedStep]:
    """What `run_recipe` would do with each step."""
    last, redone = _ends(recipe, until, again)
    return pipeline.plan(recipe.pipeline(), recipe.root, until=last, rerun=redone)


def _ends(recipe: Recipe, until: str | None, again: str | None) -> tuple[str | None, list[str]]:
    """The last step to be run and those to be run again, by the names under which they are run."""
    last = recipe.written_as(until)[-1] if until is not None else None
    return last, recipe.written_as(again) if again is not None else []


def _tell_disk(root: Path, models: int, checkpoints: int, *, report: Progress) -> None:
    """Say what the run will need before it starts. A step keeps its latest checkpoint, and none when it is finished."""
    free = shutil.disk_usage(root).free
    report.note(
        f"{root}: models take {models / MIB:,.0f} MiB on the disk, checkpoints up to {checkpoints / MIB:,.0f} more "
        f"while a step runs; {free / MIB:,.0f} are free"
    )
    if models + checkpoints > free:
        report.note("that is more than there is: the run will stop when the disk is full, and go on when there is room")


def _timed(execute: pipeline.Execute, seconds: list[float]) -> pipeline.Execute:
    """The same, with the time that each call took added to `seconds`."""

    def timed(step: pipeline.Step, working: Path, inputs: Mapping[str, Path]) -> Mapping[str, Any]:
        began = time.monotonic()
        content = execute(step, working, inputs)
        seconds.append(time.monotonic() - began)
        return content

    return timed


def _conclude(recipe: Recipe, made: Mapping[str, Mapping[str, Any]], *, began: float, computing_s: float) -> None:
    """Write what is known of the whole run, and as the last what it took beside its steps."""
    from align.report import write_report  # noqa: PLC0415 - imports matplotlib, which no launched child needs

    root, ledgers = recipe.root, {name: Ledger.from_json(manifest["ledger"]) for name, manifest in made.items()}
    artifacts.write_json(root / "table.json", table(made))
    artifacts.write_json(root / "changes.json", changes(recipe, made))
    steps = {name: ledger.to_json() for name, ledger in ledgers.items()}
    whole: dict[str, Any] = {"steps": steps, "total": total(list(ledgers.values())).to_json()}
    artifacts.write_json(root / "ledger.json", whole)
    write_report(root)
    wall_s = time.monotonic() - began
    whole["last_call"] = {"wall_seconds": wall_s, "overhead_seconds": wall_s - computing_s}
    artifacts.write_json(root / "ledger.json", whole)


def run_step(command: Command, name: str, report: Watcher) -> None:
    """One step, whose inputs must be finished; called by every process of a launch, of which the first writes."""
    recipe = command.load()
    (name,) = recipe.written_as(name)[-1:]
    steps = {step.name: step for step in recipe.pipeline()}
    marks = pipeline.fingerprints(list(steps.values()))
    needed = [other for other in steps if other in _before(steps, name)]
    chosen = [steps[other] for other in (*needed, name)]
    states = {each.step.name: each.state for each in pipeline.plan(chosen, recipe.root)}
    for other in needed:
        if states[other] != pipeline.FINISHED:
            raise InputError(
                f"step {name!r} needs {other!r}, which is not finished with these settings: align run first"
            )
    target, inputs = recipe.root / name, {other: recipe.root / other for other in steps[name].inputs}
    is_first, is_inside = int(os.environ.get("RANK", "0")) == 0, os.environ.get(INSIDE) == marks[name]
    if states[name] == pipeline.FINISHED and not is_inside:
        report.note(f"{name}: finished before, skipped")
        return
    working = artifacts.working_folder(target)
    context = Context(recipe, name, working, inputs, report)
    if not is_first and states[name] == pipeline.INTERRUPTED and "step" in (artifacts.read_manifest(working) or {}):
        return  # it is whole, and the first gives it its name, which a kill has kept from it
    if not is_first:
        STAGES[recipe.steps[name].stage](context)
        shutdown_processes()
        return
    with (
        # A launched child outlives a killed pipeline, and then holds off the child of the next
        pipeline.locked(recipe.root, report.note, lock=LAUNCHED if is_inside else pipeline.LOCK_FILE),
        EnergyMeter(recipe.accounting) as energy,
    ):
        execute = _executor(recipe, report, energy, None)
        if is_inside:
            artifacts.write_json(working / CONTENT, execute(steps[name], working, inputs))
        else:
            pipeline.run(chosen, recipe.root, execute=execute, log=report.note, on_state=report.watch, cleanup=_tidy)
    shutdown_processes()


def _executor(recipe: Recipe, report: Watcher, energy: EnergyMeter, command: Command | None) -> pipeline.Execute:
    """What makes a step's folder: in this process, or with a command in children that its launch file describes."""

    def execute(step: pipeline.Step, working: Path, inputs: Mapping[str, Path]) -> Mapping[str, Any]:
        settings = recipe.steps[step.name]
        if settings.launch is not None and command is not None:
            report.phase(settings.stage, 0)
            return _launched(command, step.name, settings.launch, _mark(recipe, step.name), working, report)
        meter = Meter(working, report, energy)
        content = STAGES[settings.stage](Context(recipe, step.name, working, inputs, meter))
        done = content.pop("done")
        ledger = meter.ledger(done, recipe.accounting).to_json()
        return {**content, "device": done.device, "ledger": ledger, "lives": meter.lives}

    return execute


def _tidy(working: Path) -> None:
    """Remove what a step goes on from after a kill: its own weights or rows stand for it."""
    remove_checkpoints(working)
    remove_rows(working)
    remove_kept(working)
    remove_spent(working)
    (working / REFERENCE_WORK).unlink(missing_ok=True)
    (working / CONTENT).unlink(missing_ok=True)


def _mark(recipe: Recipe, name: str) -> str:
    return pipeline.fingerprints(recipe.pipeline())[name]


def _launched(command: Command, name: str, launch: str, mark: str, working: Path, report: Watcher) -> dict[str, Any]:
    """What the step's children leave; their lines and metrics are passed on as they come."""
    if not Path(launch).is_file():
        raise InputError(f"steps.{name}.launch: {launch}: no such file for accelerate launch")
    arguments = ["-m", "align", "train", str(command.recipe), "--step", name, *command.overrides]
    call = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch, *arguments]
    log, content = working / "launch.log", working / CONTENT
    if not content.is_file():  # which a child may have left whose pipeline was killed
        report.note(f"{name}: accelerate launch --config_file {launch}")
        status = _followed(call, {**os.environ, INSIDE: mark}, log, working / artifacts.METRICS, report)
        if not content.is_file():
            said = log.read_text("utf-8").splitlines()
            last = said[-1] if said else "it said nothing"
            reason = next((line for line in said if line.startswith("align: ")), last)
            raise RunError(f"{name}: accelerate launch ended with status {status}: {reason}")
    return artifacts.read_json(content)


def _followed(call: Sequence[str], environment: Mapping[str, str], log: Path, metrics: Path, report: Progress) -> int:
    """The status that the call ends with; every line of metrics is passed on as it comes."""
    seen, passed, status = 0, False, None
    with defer_sigterm() as stop, log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(call, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while status is None:
                if stop.requested and not passed:
                    child.terminate()  # the launcher passes it on
                    passed = True
                with suppress(subprocess.TimeoutExpired):
                    status = child.wait(LOOK_S)
                lines = metrics.read_text("utf-8").splitlines(keepends=True) if metrics.is_file() else []
                for line in [line for line in lines[seen:] if line.endswith("\n")]:
                    report.advance(1, json.loads(line))
                    seen += 1
            return status
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()


def table(made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Steps x evaluations: `{step: {task: {value, low, high, n}}}`."""
    rows: dict[str, dict[str, Any]] = {}
    for manifest in made.values():
        for step, scores in manifest.get("scores", {}).items():
            rows.setdefault(step, {}).update(scores)
    return rows


def _before(steps: Mapping[str, pipeline.Step], name: str) -> set[str]:
    """All steps that the step depends on."""
    found: set[str] = set()
    waiting = list(steps[name].inputs)
    while waiting:
        other = waiting.pop()
        found.add(other)
        waiting += steps[other].inputs
    return found


STAGES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "import": import_policy,
    "sft": train,
    "preference": train,
    "generate": generate_groups,
    "score": score_groups,
    "reward_model": train_reward_model,
    "evaluate": evaluate_policy,
}
