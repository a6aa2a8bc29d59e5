"""The launcher: a step in the child processes of `accelerate launch`, here or in a job of Slurm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from align.artifacts import read_json, working_folder
from align.config import located
from align.data.chat_clock import BEGAN, began_at
from align.distributed import slurm
from align.distributed.launch import COLLECTIVE_TIMEOUT
from align.distributed.progress import Progress
from align.distributed.signals import defer_stop
from align.errors import BUDGET, SIGTERM, InputError, RunError, Stopped, noting_interrupts
from align.stages.base import LaunchSettings
from align.workflow.following import PHASES, Follower, failure_in
from align.workflow.recipe.load import load_recipe, validated_recipe
from align.workflow.recipe.schema import Recipe

INSIDE_RUN = "ALIGN_INSIDE_RUN"  # in a launched child's environment: the step's fingerprint in its pipeline
LOG = "launch.log"  # in the working folder: the output of a launched step
LAUNCH_LOCK = ".lock-launched"  # beside the pipeline's own lock
CONTENT = "content.json"  # what a launched child leaves for the pipeline to complete its step with
CAPPED = re.compile(rf"align: stopped by ({re.escape(BUDGET)}\w+ \([^)]*\))")  # a launched child by its budget
NOTED_AFTER_S = 30.0  # of waiting for the first process of a launch
POLL_S = 0.5  # seconds between two looks at a launched child


@dataclass(frozen=True)
class Command:
    """A recipe's path and overrides, as child processes are given them."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    values: Mapping[str, Any] | None = field(default=None, compare=False)  # of the recipe, where it has been read

    @cached_property
    def loaded(self) -> Recipe:
        """The validated recipe, as it was when it was first read."""
        if self.values is None:
            return load_recipe(self.recipe, self.overrides)
        with located(self.recipe, self.overrides):
            return validated_recipe(self.values)

    @contextmanager
    def located(self) -> Generator[None]:
        """Prefix errors about a key of the recipe with the line of the file, or the override, that has set it."""
        try:
            yield
        except InputError as error:
            if not any(part.loc for part in error.parts):
                raise
            with located(self.recipe, self.overrides):
                raise


def launch_step(
    command: Command, name: str, settings: LaunchSettings, mark: str, working: Path, progress: Progress
) -> dict[str, Any]:
    """Run a step in `accelerate launch` and return what its first process says of it for the manifest."""
    launch = str(settings.launch)
    if not Path(launch).is_file():
        raise InputError(f"{launch}: no such launch file", ("steps", name, "launch"))
    content = working / CONTENT
    if settings.slurm is not None:
        _run_job(command, name, settings, mark, working, progress)
    elif not content.is_file():  # it exists where a child finished after its pipeline was killed
        arguments = ["-m", "align", "train", str(command.recipe), "--step", name, *command.overrides]
        call = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch, *arguments]
        log = working / LOG
        progress.note(f"{name}: accelerate launch --config_file {launch}")
        status, stopped_by = _follow(call, {**os.environ, INSIDE_RUN: mark}, log, working, progress)
        if not content.is_file():
            reason = failure_in(log.read_text("utf-8", errors="replace"))
            if stopped_by is not None:  # the child was sent SIGTERM, whatever this process received
                what = reason.removeprefix("align: ").replace(f"stopped by {SIGTERM}", f"stopped by {stopped_by}")
                raise Stopped(f"{name}: {what}", stopped_by)
            raise _failure(name, f"accelerate launch exited with status {status}", reason, log)
    return read_json(content)


def is_waited_for(recipe: Recipe, names: Iterable[str], resumed: Container[str]) -> bool:
    """Return whether a job of Slurm that an earlier call has submitted runs, or will run, one of the named steps.

    Raises `RunError` unless that step is `resumed` by waiting for its job.
    """
    is_found = False
    for name in names:
        working = working_folder(recipe.root / name)
        try:
            job = slurm.recorded_job(working)
            state = None if job is None else slurm.job_state(job)
        except RunError as error:
            record = working / slurm.JOB_FILE
            raise RunError(f"{name}: {error}; if its job has ended, delete {record}") from error
        if state is not None and not state.is_ended:
            if name not in resumed or recipe.steps[name].slurm is None:
                what = f"Slurm job {job} of an earlier call is {state.name.lower()}, and this call does not wait for it"
                raise RunError(f"{name}: {what}; cancel it first: scancel {job}")
            is_found = True
    return is_found


def _failure(name: str, what: str, reason: str, log: Path) -> RunError:
    """Return the error of a launch that has ended without completing its step."""
    if (capped := CAPPED.match(reason)) is not None:
        return Stopped(f"{name}: {reason.removeprefix('align: ')}", capped[1])
    return RunError(f"{name}: {what}: {reason}; see {log}")


def _run_job(
    command: Command, name: str, settings: LaunchSettings, mark: str, working: Path, progress: Progress
) -> None:
    """Run a step in a job of Slurm: the one that an earlier call has submitted, or else a new one.

    A job that ends without completing the step is an error, after which a rerun submits another one.
    """
    assert settings.slurm is not None
    log, content = working / LOG, working / CONTENT
    if (job := slurm.recorded_job(working)) is None:
        arguments = ["--config_file", str(settings.launch), str(command.recipe), name, *command.overrides]
        environment = {**slurm.submission_environment(), INSIDE_RUN: mark}
        (working / PHASES).unlink(missing_ok=True)
        job = slurm.submit(settings.slurm, arguments, environment, log=log, step=name)
        progress.note(f"{name}: submitted Slurm job {job}, which writes to {log}")
    follower = Follower(working, progress)

    def look() -> None:
        with suppress(OSError, InputError, RunError):  # NFS: another machine has replaced the file while it was read
            follower.look()

    with noting_interrupts(f"which waits for Slurm job {job}; to cancel the job instead: scancel {job}"):
        state = slurm.wait(job, name, is_complete=content.is_file, look=look, note=progress.note)
    if not content.is_file():
        written = log.read_text("utf-8", errors="replace") if log.is_file() else ""
        last = re.split(rf"slurm\.sbatch: job {job} starts.*\n", written)[-1]  # of several starts after requeues
        (working / slurm.JOB_FILE).unlink()
        raise _failure(name, f"Slurm job {job} ended as {state.name}", failure_in(last), log)


def _follow(
    call: Sequence[str], environment: Mapping[str, str], log: Path, working: Path, progress: Progress
) -> tuple[int, str | None]:
    """Run the call and pass on its progress.

    Returns the exit status, and what asked this process to stop, if anything did. The child is in a process group of
    its own: a first Ctrl-C stops it as SIGTERM does, once its step is saved.
    """
    (working / PHASES).unlink(missing_ok=True)
    follower = Follower(working, progress)
    forwarded = False
    status = None
    with defer_stop(progress.note) as stop, log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(call, env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0)
        try:
            while status is None:
                if stop.requested and not forwarded:
                    _stop(child)
                    forwarded = True
                with suppress(subprocess.TimeoutExpired):
                    status = child.wait(POLL_S)
                follower.look()
            return status, stop.by
        except KeyboardInterrupt:
            for each in [*psutil.Process(child.pid).children(recursive=True), child]:
                each.kill()
            raise
        finally:
            if child.poll() is None:
                _stop(child)
                child.wait()


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the processes of an `accelerate launch`: it does not forward it to a single one."""
    with suppress(psutil.NoSuchProcess):
        for each in psutil.Process(child.pid).children() or [child]:
            each.terminate()


def first_began(working: Path, is_prepared: Callable[[], bool], note: Callable[[str], None]) -> datetime:
    """Return when the first process of a launch began the step, once its folder is prepared for this attempt.

    Other processes call it: they render prompts of their own with chat templates that may write this time, and the
    folder may hold that of an attempt with other settings, which the first process removes. Raises `RunError` if it
    has not begun in the time that a collective may take.
    """
    began = time.monotonic()
    limit_s = COLLECTIVE_TIMEOUT.total_seconds()
    is_noted = False
    while True:
        with suppress(InputError):  # it is being removed
            if (working / BEGAN).exists() and is_prepared():
                return began_at(working)
        waited_s = time.monotonic() - began
        if waited_s > limit_s:
            why = f"has not begun the step after {limit_s / 60:.0f} minutes; do all machines share {working.parent}?"
            raise RunError(f"the first process of the launch {why}")
        if waited_s > NOTED_AFTER_S and not is_noted:
            is_noted = True
            note(f"waits for the first process of the launch, which begins the step in {working.parent}")
        time.sleep(POLL_S)
