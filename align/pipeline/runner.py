"""Plan and run steps, each of which fills one folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from align import artifacts
from align.errors import InputError, RunError
from align.pipeline.steps import Step, dependents, fingerprints, order
from align.registry import pick
from align.storage.checksums import content_problems, size_problems
from align.storage.disk_errors import disk_errors

RERUN_REQUEST = ".rerun.json"  # in a run folder while a requested rerun is unfinished: fingerprints of its steps
WAITING, INTERRUPTED, RUNNING, FINISHED = "waiting", "interrupted", "running", "finished"  # states of a step
NOT_VERIFIED = "its files are not verified, as its manifest was written by a version without checksums"
NOT_BUILT = "not built"  # build ID of an input that has yet to run

Execute = Callable[[Step, Path, Mapping[str, Path]], Mapping[str, Any]]  # step, working folder, input folders


class PlannedStep(NamedTuple):
    """A step with its current state and the reason why it will run or not."""

    step: Step
    state: str  # FINISHED, INTERRUPTED or WAITING
    reason: str


def plan(
    steps: Sequence[Step], root: Path, *, until: str | None = None, rerun: Sequence[str] = ()
) -> list[PlannedStep]:
    """Return what `run` would do with each step up to `until`, in order, without changing anything.

    The steps in `rerun` and their dependents are not skipped. Raises `RunError` for a finished step of which a file is
    missing or has another size.
    """
    ordered, current = order(steps), fingerprints(steps)
    positions = {step.name: position for position, step in enumerate(ordered)}
    requested = set[str]() if _is_rerun_started(steps, root, rerun) else dependents(steps, rerun)
    last = pick(positions, until, "step") if until is not None else len(ordered) - 1
    planned: list[PlannedStep] = []
    build_ids: dict[str, str] = {}
    for step in ordered[: last + 1]:
        attempt = _Attempt(current[step.name], {name: build_ids[name] for name in step.inputs})
        planned.append(_planned(step, root / step.name, attempt, is_requested=step.name in requested))
        build_ids[step.name] = _build_id(root / step.name) if planned[-1].state == FINISHED else NOT_BUILT
    return planned


class _Attempt(NamedTuple):
    """The settings and inputs that a step would run with now."""

    fingerprint: str
    build_ids: Mapping[str, str]  # of its inputs

    def matches(self, manifest: Mapping[str, Any] | None) -> bool:
        """Return whether a folder was made with these settings from these builds of its inputs."""
        if manifest is None or manifest.get("fingerprint") != self.fingerprint:
            return False
        return {**self.build_ids, **manifest.get("input_build_ids", {})} == self.build_ids


def _planned(step: Step, target: Path, attempt: _Attempt, *, is_requested: bool) -> PlannedStep:
    finished, started = artifacts.read_manifest(target), artifacts.read_manifest(artifacts.working_folder(target))
    if attempt.matches(finished) and not is_requested:
        return PlannedStep(step, FINISHED, _finished_reason(step, target))
    if attempt.matches(started) and not is_requested:
        return PlannedStep(step, INTERRUPTED, "resumes where it was interrupted")
    if started is not None and not attempt.matches(started):
        return PlannedStep(step, WAITING, "restarts because its unfinished attempt had other settings or inputs")
    if finished is None:
        return PlannedStep(step, WAITING, "runs")
    if is_requested:
        return PlannedStep(step, WAITING, "reruns as requested")
    return PlannedStep(step, WAITING, "reruns because its settings or inputs changed")


def _finished_reason(step: Step, target: Path) -> str:
    """Return why a finished step is skipped, after a look at the sizes of its files."""
    records = artifacts.recorded_files(target)
    if records is None:
        return f"finished before, skipped; {NOT_VERIFIED}"
    if problems := size_problems(target, records):
        raise RunError(f"{problems[0]}; {_restore(step.name)}")
    return "finished before, skipped"


def _restore(name: str) -> str:
    return f"restore it, or make step {name!r} and all that depend on it again: --rerun-from {name}"


def _check_inputs(step: Step, root: Path, verified: set[str], log: Callable[[str], None]) -> None:
    """Raise `RunError` if a file of an input is not as its step wrote it; each input is read once in a run."""
    for name in step.inputs:
        if name in verified:
            continue
        verified.add(name)
        records = artifacts.recorded_files(root / name)
        if records is None:
            log(f"{name}: {NOT_VERIFIED}")
        elif problems := content_problems(root / name, records):
            raise RunError(f"{problems[0]}, and step {step.name!r} reads it; {_restore(name)}")


def _build_id(target: Path) -> str:
    """Return the ID of this execution of a step, which tells apart reruns with equal settings; '' in old manifests."""
    return str((artifacts.read_manifest(target) or {}).get("build_id", ""))


def _is_rerun_started(steps: Sequence[Step], root: Path, rerun: Sequence[str]) -> bool:
    """Return whether an earlier, interrupted call has already started the same rerun."""
    note = root / RERUN_REQUEST
    return bool(rerun) and note.is_file() and artifacts.read_json(note) == _rerun_request(steps, rerun)


def _rerun_request(steps: Sequence[Step], rerun: Sequence[str]) -> dict[str, str]:
    current = fingerprints(steps)
    return {name: current[name] for name in sorted(dependents(steps, rerun))}


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
    """Run every step up to `until` that is not finished; return the manifests of all of them by name.

    `execute(step, working folder, input folders)` resumes from what it finds in the working folder and returns the
    content of the manifest. `cleanup(working folder)` then removes what only resuming needs. The steps in `rerun` and
    their dependents run although they are finished. `on_state(step name, state)` is called on every change of state.
    """
    planned, current = plan(steps, root, until=until, rerun=rerun), fingerprints(steps)
    if rerun and not _is_rerun_started(steps, root, rerun):
        _invalidate([root / name for name in dependents(steps, rerun)])  # including those after `until`
        artifacts.write_json(root / RERUN_REQUEST, _rerun_request(steps, rerun))
    for step, state, _ in planned:
        on_state(step.name, state)
    manifests: dict[str, dict[str, Any]] = {}
    verified: set[str] = set()
    for step, state, reason in planned:
        target = root / step.name
        log(f"{step.name}: {reason}")
        if state != FINISHED:
            if target.exists() and artifacts.read_manifest(target) is None:
                raise InputError(f"{target} exists but was not made by a step; move it away or rename the step")
            _check_inputs(step, root, verified, log)  # before anything of an earlier attempt is removed
            attempt = _Attempt(current[step.name], {name: _build_id(root / name) for name in step.inputs})
            working = artifacts.working_folder(target)
            _prepare(working, attempt)
            on_state(step.name, RUNNING)
            manifest = artifacts.read_manifest(working) or {}
            if "step" not in manifest:  # else interrupted between its manifest and its renaming
                with disk_errors(working), _naming(step):
                    content = execute(step, working, {name: root / name for name in step.inputs})
                manifest = {**content, **_provenance(step, root, attempt)}
            artifacts.complete(working, target, manifest=manifest, cleanup=cleanup)
            verified.add(step.name)
            on_state(step.name, FINISHED)
        elif (stale := artifacts.working_folder(target)).exists():
            log(f"{step.name}: removed an unfinished attempt with other settings or inputs")
            with disk_errors(stale):
                shutil.rmtree(stale)
        manifests[step.name] = artifacts.read_manifest(target) or {}
    (root / RERUN_REQUEST).unlink(missing_ok=True)
    return manifests


@contextmanager
def _naming(step: Step) -> Generator[None]:
    """Add a note to an interrupt: the step that a rerun resumes."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"a rerun of the same command resumes at step {step.name!r}")
        raise


def _provenance(step: Step, root: Path, attempt: _Attempt) -> dict[str, Any]:
    """Return what a manifest says of how its folder was made."""
    inputs = {name: artifacts.read_manifest(root / name) or {} for name in step.inputs}
    return {
        "step": step.name,
        "key": step.key,
        "inputs": {name: manifest["fingerprint"] for name, manifest in inputs.items()},
        "fingerprint": attempt.fingerprint,
        "build_id": uuid4().hex,
        "input_build_ids": attempt.build_ids,
    }


def _invalidate(targets: Sequence[Path]) -> None:
    """Mark the folders as unfinished on disk, so that none is skipped if this rerun is interrupted."""
    for target in targets:
        shutil.rmtree(artifacts.working_folder(target), ignore_errors=True)
        if (known := artifacts.read_manifest(target)) is not None:
            artifacts.write_json(target / artifacts.MANIFEST, {**known, "fingerprint": None})


def _prepare(working: Path, attempt: _Attempt) -> None:
    """Create the working folder, or clear it unless it belongs to an equal attempt."""
    if attempt.matches(artifacts.read_manifest(working)):
        return
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    started = {"fingerprint": attempt.fingerprint, "input_build_ids": dict(attempt.build_ids)}
    artifacts.write_json(working / artifacts.MANIFEST, started)
