"""Steps as batch jobs of Slurm: settings, submission, the recorded job and its state; imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from pydantic import Field, field_validator

from align.artifacts import read_json, write_json
from align.config import Settings
from align.errors import InputError, RunError, one_line

JOB_FILE = "slurm.json"  # in a working folder: name and ID of the job that runs the step
QUEUE_POLL_S = 15.0  # between two questions to Slurm's controller, which all users of a cluster share
LOOK_S = 0.5  # between two looks at the progress of a step
VISIBLE_S = 60.0  # until other machines see a new file: NFS keeps the attributes of a folder for so long by default
ANSWER_S = 120.0  # timeout of a question to Slurm
OPTION = re.compile(r"--([a-z][a-z-]*)(=.+)?")
# Options of sbatch that `align` sets itself, or with which it would not find the job and its files
OWN_OPTIONS = (
    "array", "chdir", "clusters", "error", "export", "job-name", "output", "test-only", "wait", "wrap",
)  # fmt: skip
NO_SUCH_JOB = "Invalid job id"  # how squeue answers for a job that ended more than MinJobAge (300 s) ago
PENDING, UNKNOWN = "PENDING", "UNKNOWN"
# States of a job that neither runs nor will run again; sacct and squeue have further ones of jobs that do
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT", UNKNOWN,
)  # fmt: skip


class SlurmSettings(Settings):
    """Submission of a step to Slurm, which runs it on several machines."""

    script: str = Field(
        default="launch/slurm.sbatch", description="Batch script that starts the launch file on each machine."
    )
    options: list[str] = Field(
        default_factory=list[str], description="Options of sbatch, such as [--nodes=2, --partition=NAME]."
    )

    @field_validator("options")
    @classmethod
    def _accepted(cls, options: list[str]) -> list[str]:
        for number, option in enumerate(options):
            match = OPTION.fullmatch(option)
            if match is None:
                raise InputError(f"write an option of sbatch as --name=value or --name, not {option!r}", (number,))
            if any(own.startswith(match[1]) for own in OWN_OPTIONS):  # sbatch accepts abbreviations
                raise InputError(f"{option}: align decides --{match[1]} of the job; leave it out", (number,))
        return options


class JobState(NamedTuple):
    """The state of a job in Slurm's words, and why it is pending."""

    name: str
    reason: str = ""

    @property
    def is_ended(self) -> bool:
        """Whether the job neither runs nor will run again."""
        return self.name in ENDED


def check_installed() -> None:
    """Raise `InputError` if jobs cannot be submitted."""
    if shutil.which("sbatch") is None:
        raise InputError("sbatch: no such command; run this where jobs are submitted to Slurm, or leave slurm out")


def submit(
    settings: SlurmSettings, arguments: Sequence[str], environment: Mapping[str, str], *, log: Path, step: str
) -> str:
    """Submit the batch script with its arguments and return the ID of the job; `log` is in the working folder.

    The job's unique name is recorded before, and its ID as soon as it is known: `recorded_job` finds the job even if
    this process is killed in between, or if sbatch gives up on a job that the controller has accepted.
    """
    name = f"align-{step}-{uuid4().hex[:8]}"
    record = log.with_name(JOB_FILE)
    log.unlink(missing_ok=True)  # of an earlier job; Slurm appends to it
    write_json(record, {"name": name})
    output = str(log.absolute()).replace("%", "%%")
    own = [f"--job-name={name}", f"--output={output}", "--export=ALL"]
    call = ["sbatch", "--parsable", *settings.options, *own, settings.script, *arguments]
    # In a process group of its own, which Ctrl-C does not reach
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False, process_group=0)
    if done.returncode:
        raise RunError(f"{step}: sbatch exited with status {done.returncode}: {one_line(done.stderr)}")
    job = (done.stdout.split() or [""])[-1].partition(";")[0]  # ID;CLUSTER in a federation
    if not job.isdigit():
        raise RunError(f"{step}: sbatch --parsable printed no job ID: {one_line(done.stdout)!r}")
    write_json(record, {"name": name, "job": job})
    return job


def submission_environment() -> dict[str, str]:
    """Return this process's environment without what Slurm has set for a job that this process may be part of."""
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    return {name: os.environ[name] for name in os.environ if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def recorded_job(working: Path) -> str | None:
    """Return the ID of the job that was last submitted for a step; None if there is none."""
    if not (working / JOB_FILE).is_file():
        return None
    record = read_json(working / JOB_FILE)
    if "job" in record:
        return record["job"]
    return next(iter(_squeue(f"--name={record['name']}", "--format=%i").split()), None)


def job_state(job: str) -> JobState:
    """Return the state of a job. One that has left the queue has ended, as sacct says, or UNKNOWN without accounting.

    Raises `RunError` if Slurm does not answer.
    """
    name, _, reason = _squeue(f"--jobs={job}", "--format=%T %r").strip().partition(" ")
    if name:
        return JobState(name, reason)
    with suppress(RunError):
        states = _ask("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}")
        name = next(iter(states.stdout.split()), "")
    return JobState(name if name in ENDED else UNKNOWN)


def wait(
    job: str, step: str, *, is_complete: Callable[[], bool], look: Callable[[], None], note: Callable[[str], None]
) -> JobState:
    """Wait until a job has ended, and return its last state.

    Every change of the state is noted, and `look` is called in between. A step that `is_complete` is not waited for
    any longer than its job; one that is not, until its files must have become visible here.
    """
    shown = ""
    has_run = False
    ended_s = 0.0
    while True:
        try:
            state = job_state(job)
            has_run = has_run or state.name not in (PENDING, *ENDED)
            text = _described(state, has_run=has_run)
        except RunError as error:
            state = None
            text = f"state unknown, asking again every {QUEUE_POLL_S:g} s: {error}"
        if text != shown:
            note(f"{step}: Slurm job {job}: {text}")
            shown = text
        now = time.monotonic()
        ended_s = (ended_s or now) if state is not None and state.is_ended else 0.0
        if state is not None and ended_s and (is_complete() or now - ended_s > VISIBLE_S):
            look()
            return state
        while time.monotonic() - now < QUEUE_POLL_S:
            look()
            time.sleep(LOOK_S)


def _described(state: JobState, *, has_run: bool) -> str:
    if state.name == PENDING:
        return f"{'requeued, ' if has_run else ''}pending ({state.reason})"
    return f"ended as {state.name}" if state.is_ended else state.name.lower()


def _squeue(*options: str) -> str:
    """Return what squeue prints; nothing for a job that it does not know."""
    done = _ask("squeue", "--noheader", "--states=all", *options)
    if done.returncode and NO_SUCH_JOB not in done.stderr:
        raise RunError(f"squeue: {one_line(done.stderr)}")
    return done.stdout


def _ask(*call: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(call, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except FileNotFoundError as error:
        message = f"{call[0]}: no such command, so that the state of a Slurm job is unknown"
        raise RunError(f"{message}; run this where Slurm is installed") from error
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{call[0]}: no answer within {ANSWER_S:g} s") from error
