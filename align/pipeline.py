"""Steps in order: the finished are skipped, the killed continued, the changed run again. Knows no machine learning."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from uuid import uuid4

from align import artifacts
from align.config import stable_hash
from align.errors import InputError, RunError
from align.registry import pick, suggest

LOCK_FILE = ".lock"
TO_BE_MADE = "to be made"  # in place of what tells one making of a folder from another
RERUN_REQUEST = ".rerun.json"  # in a run's folder while it goes on: what it was asked to run again and has put back
WAITING, INTERRUPTED, RUNNING, FINISHED = "waiting", "interrupted", "running", "finished"  # states of a step

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.partial)")


@dataclass(frozen=True, slots=True)
class Step:
    """One folder to be made; `key` is a hash of all that decides its content besides its inputs."""

    name: str
    inputs: tuple[str, ...]
    key: str

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str) -> None:
    """Raise for the name of a step that cannot be a folder's."""
    if not FOLDER_NAME.fullmatch(name):
        raise InputError(
            "a step's name becomes a folder: letters, digits, '-', '_' and '.' after a letter or digit, "
            f"and no '.partial' behind, not {name!r}",
            ("steps", name),
        )


Execute = Callable[[Step, Path, Mapping[str, Path]], Mapping[str, Any]]


def order(steps: Sequence[Step]) -> list[Step]:
    """The steps so that each follows its inputs, otherwise as they were given."""
    names = [step.name for step in steps]
    for step in steps:
        if names.count(step.name) > 1:
            raise InputError(f"two steps are called {step.name!r}; a name is given once", ("steps", step.name))
        for name in step.inputs:
            if name not in names:
                raise InputError(
                    f"step {step.name!r} needs {name!r}, which is no step; {suggest(name, names)}", ("steps", step.name)
                )
    placed: dict[str, Step] = {}
    while len(placed) < len(steps):
        waiting = [step for step in steps if step.name not in placed]
        ready = next((step for step in waiting if all(name in placed for name in step.inputs)), None)
        if ready is None:
            ring = _ring(waiting)
            raise InputError(f"steps need each other in a ring: {' -> '.join(ring)}", ("steps", ring[0]))
        placed[ready.name] = ready
    return list(placed.values())


def _ring(waiting: Sequence[Step]) -> list[str]:
    """One ring among steps of which each waits for another: its first is its last."""
    needs = {step.name: step.inputs for step in waiting}
    path = [waiting[0].name]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in needs[path[-1]] if name in needs))
    return path[path.index(path[-1]) :]


def fingerprints(steps: Sequence[Step]) -> dict[str, str]:
    """A hash by step that changes when the step's key or anything before it does."""
    found: dict[str, str] = {}
    for step in order(steps):
        found[step.name] = stable_hash([step.key, {name: found[name] for name in step.inputs}])
    return found


class PlannedStep(NamedTuple):
    """A step and what will become of it."""

    step: Step
    state: str  # FINISHED, INTERRUPTED or WAITING
    reason: str


def plan(
    steps: Sequence[Step], root: Path, *, until: str | None = None, rerun: Sequence[str] = ()
) -> list[PlannedStep]:
    """What `run` would do with each step up to `until`, in order: `rerun` and what depends on them are not skipped."""
    ordered, marks = order(steps), fingerprints(steps)
    places = {step.name: place for place, step in enumerate(ordered)}
    redone = set[str]() if _is_put_back(steps, root, rerun) else dependents(steps, rerun)
    last = pick(places, until, "step") if until is not None else len(ordered) - 1
    found: list[PlannedStep] = []
    made: dict[str, str] = {}
    for step in ordered[: last + 1]:
        read = {name: made[name] for name in step.inputs}
        found.append(_planned(step, root / step.name, marks[step.name], read, step.name in redone))
        made[step.name] = _made(root / step.name) if found[-1].state == FINISHED else TO_BE_MADE
    return found


def dependents(steps: Sequence[Step], names: Sequence[str]) -> set[str]:
    """The named steps and every step that reads something of them, directly or not."""
    known = {step.name: step for step in steps}
    found = {pick(known, name, "step").name for name in names}
    for step in order(steps):
        if found & set(step.inputs):
            found.add(step.name)
    return found


def _planned(step: Step, target: Path, mark: str, read: Mapping[str, str], is_redone: bool) -> PlannedStep:
    there, begun = artifacts.read_manifest(target), artifacts.read_manifest(artifacts.working_folder(target))
    if there is not None and not is_redone and _is_of(there, mark, read):
        return PlannedStep(step, FINISHED, "finished before, skipped")
    if begun is not None and not is_redone and _is_of(begun, mark, read):
        return PlannedStep(step, INTERRUPTED, "continues where it was stopped")
    if begun is not None and not _is_of(begun, mark, read):
        return PlannedStep(step, WAITING, "runs from its start: what it had begun was of other settings or inputs")
    if there is None:
        return PlannedStep(step, WAITING, "runs")
    return PlannedStep(step, WAITING, "runs again, as asked" if is_redone else "its settings or inputs changed, runs")


def _is_of(manifest: Mapping[str, Any], mark: str, read: Mapping[str, str]) -> bool:
    """Whether the folder is of these settings, and of inputs that have not been made once more since."""
    return manifest.get("fingerprint") == mark and {**read, **manifest.get("input_build_ids", {})} == read


def _made(target: Path) -> str:
    """What tells this making of the folder from others, by the same settings too; '' where an older version made it."""
    return str((artifacts.read_manifest(target) or {}).get("build_id", ""))


def _is_put_back(steps: Sequence[Step], root: Path, rerun: Sequence[str]) -> bool:
    """Whether an earlier call, which did not come to its end, was asked for the same again and has begun it."""
    note = root / RERUN_REQUEST
    return bool(rerun) and note.is_file() and artifacts.read_json(note) == _asked_again(steps, rerun)


def _asked_again(steps: Sequence[Step], rerun: Sequence[str]) -> dict[str, str]:
    marks = fingerprints(steps)
    return {name: marks[name] for name in sorted(dependents(steps, rerun))}


def run(
    steps: Sequence[Step],
    root: Path,
    *,
    execute: Execute,
    log: Callable[[str], None],
    on_state: Callable[[str, str], None] = lambda name, state: None,
    cleanup: Callable[[Path], None] = lambda folder: None,
    until: str | None = None,
    rerun: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """The manifest of every step up to `until` by name, after `execute` has made those that were not there.

    `execute(step, working folder, folder of each input)` continues from what it finds in the working folder,
    and returns what the manifest is to say; `cleanup(working folder)` removes state that only resuming needs.
    `on_state(step, state)` is told whenever a step's state changes.
    """
    planned, marks = plan(steps, root, until=until, rerun=rerun), fingerprints(steps)
    if rerun and not _is_put_back(steps, root, rerun):
        _forget([root / name for name in dependents(steps, rerun)])  # those after `until` as well
        artifacts.write_json(root / RERUN_REQUEST, _asked_again(steps, rerun))
    for step, state, _ in planned:
        on_state(step.name, state)
    made: dict[str, dict[str, Any]] = {}
    for step, state, reason in planned:
        target, mark = root / step.name, marks[step.name]
        found = artifacts.read_manifest(target)
        log(f"{step.name}: {reason}")
        if state == FINISHED:
            assert found is not None
            made[step.name] = found
            continue
        if found is None and target.exists():
            raise InputError(f"{target} is there and no step made it: move it away, or call the step something else")
        working = artifacts.working_folder(target)
        read = {name: _made(root / name) for name in step.inputs}
        _open(working, mark, read)
        on_state(step.name, RUNNING)
        begun = artifacts.read_manifest(working)
        if begun is not None and "step" in begun:  # it is whole, and a kill has kept its name from it
            made[step.name] = begun
        else:
            with artifacts.disk_errors(working):
                content = execute(step, working, {name: root / name for name in step.inputs})
            inputs = {name: marks[name] for name in step.inputs}
            own = {"step": step.name, "key": step.key, "inputs": inputs, "fingerprint": mark}
            made[step.name] = {**content, **own, "build_id": uuid4().hex, "input_build_ids": read}
        artifacts.complete(working, target, manifest=made[step.name], cleanup=cleanup)
        on_state(step.name, FINISHED)
    (root / RERUN_REQUEST).unlink(missing_ok=True)
    return made


def _forget(targets: Sequence[Path]) -> None:
    """Make the folders unfinished for good, so that a kill in between leaves none of them to be skipped."""
    for target in targets:
        shutil.rmtree(artifacts.working_folder(target), ignore_errors=True)
        if (known := artifacts.read_manifest(target)) is not None:
            artifacts.write_json(target / artifacts.MANIFEST, {**known, "fingerprint": None})


def _open(working: Path, mark: str, read: Mapping[str, str]) -> None:
    """Make the working folder ready, cleared of an attempt with another fingerprint or of other inputs."""
    if _is_of(artifacts.read_manifest(working) or {}, mark, read):
        return
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    artifacts.write_json(working / artifacts.MANIFEST, {"fingerprint": mark, "input_build_ids": dict(read)})


@contextmanager
def locked(root: Path, log: Callable[[str], None], *, lock: str = LOCK_FILE) -> Generator[None]:
    """A block in which no other pipeline may write below `root`; who holds it stands in the lock file.

    The system takes the lock back when its holder ends, however it ends, so that a stale one is known for what it is.
    """
    with artifacts.disk_errors(root / lock):
        root.mkdir(parents=True, exist_ok=True)
        file = (root / lock).open("a+", encoding="utf-8")
    with file:
        before = _holder(file)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log(f"{root}: its file system has no locks; see to it that no other pipeline writes to it")
            else:
                raise RunError(
                    f"{root}: a pipeline is running here already, {before}; wait for it, or name this run otherwise "
                    "(run=NAME)"
                ) from error
        if before:
            log(f"{root}: the lock of {before} was left behind; that pipeline is gone, and this one goes on")
        with artifacts.disk_errors(root / lock):
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        try:
            yield
        finally:
            file.truncate(0)


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip()
