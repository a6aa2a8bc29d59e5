"""Run steps, each of which fills one folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from align import artifacts
from align.errors import InputError, RunError, noting_interrupts
from align.pipeline.cleanup import Cleanup, finish_removals, remove_unneeded, same_build
from align.pipeline.planning import (
    FINISHED,
    NOT_VERIFIED,
    RERUN_REQUEST,
    RUNNING,
    Attempt,
    PlannedStep,
    build_id,
    is_rerun_started,
    plan,
    rerun_request,
    restore,
)
from align.pipeline.steps import Step, dependents, fingerprints
from align.storage.checksums import content_problems
from align.storage.disk_errors import disk_errors

NO_CLEANUP = Cleanup()

Execute = Callable[[Step, Path, Mapping[str, Path]], Mapping[str, Any]]  # step, working folder, input folders


def run(
    steps: Sequence[Step],
    root: Path,
    *,
    execute: Execute,
    log: Callable[[str], None],
    on_state: Callable[[str, str], None] = lambda name, state: None,
    cleanup: Cleanup = NO_CLEANUP,
    until: str | None = None,
    rerun: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Run every step up to `until` that is not finished; return the manifests of all of them by name.

    `execute(step, working folder, input folders)` resumes from what it finds in the working folder and returns the
    content of the manifest. The steps in `rerun` and their dependents run although they are finished, and so do steps
    of which files were removed that a step to run reads. `on_state(step name, state)` is called on every change of
    state.
    """
    planned = plan(steps, root, until=until, rerun=rerun)
    if rerun and not is_rerun_started(steps, root, rerun):
        _invalidate([root / name for name in dependents(steps, rerun)])  # including those after `until`
        artifacts.write_json(root / RERUN_REQUEST, rerun_request(steps, rerun))
    finish_removals(steps, root)
    call = _Call(steps, root, log, on_state, cleanup, fingerprints(steps))
    while not call.is_done:
        for made in call.run(planned):  # a generator, which keeps the traceback of a failed step short
            note = f"a rerun of the same command resumes at step {made.step.name!r}"
            with disk_errors(made.working), noting_interrupts(note):
                made.content = execute(made.step, made.working, {name: root / name for name in made.step.inputs})
        planned = planned if call.is_done else plan(steps, root, until=until)
    (root / RERUN_REQUEST).unlink(missing_ok=True)
    return {each.step.name: artifacts.read_manifest(root / each.step.name) or {} for each in planned}


@dataclass(slots=True)
class _Made:
    """A step that is to run in a folder, and what its manifest will say of it."""

    step: Step
    working: Path
    content: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(slots=True)
class _Call:
    """One call of `run`."""

    steps: Sequence[Step]
    root: Path
    log: Callable[[str], None]
    on_state: Callable[[str, str], None]
    cleanup: Cleanup
    current: Mapping[str, str]  # fingerprints of the steps
    verified: set[str] = field(default_factory=set[str])  # inputs whose files were read and are as they were written
    is_done: bool = False

    def run(self, planned: Sequence[PlannedStep]) -> Iterator[_Made]:
        """Yield each planned step that is to run, and complete it afterwards.

        Ends early if the rest needs a new plan: a step that ran again made other files.
        """
        for step, state, _ in planned:
            self.on_state(step.name, state)
        waiting = {step.name for step, state, _ in planned if state != FINISHED}
        self._remove_unneeded(waiting)
        for step, state, reason in planned:
            target = self.root / step.name
            self.log(f"{step.name}: {reason}")
            if state != FINISHED:
                older = artifacts.read_manifest(target) or {}
                before = build_id(target)
                is_restored = artifacts.REMOVED in older and older["fingerprint"] == self.current[step.name]
                yield from self._make(step, target)
                waiting.remove(step.name)
                if is_restored and build_id(target) != before:
                    self.log(f"{step.name}: differs from what was removed, so the steps that read it run again")
                    return
                self._remove_unneeded(waiting)
            elif (stale := artifacts.working_folder(target)).exists():
                self.log(f"{step.name}: removed an unfinished attempt with other settings or inputs")
                with disk_errors(stale):
                    shutil.rmtree(stale)
        self.is_done = True

    def _remove_unneeded(self, waiting: set[str]) -> None:
        remove_unneeded(self.steps, self.root, self.cleanup.unneeded, waiting=waiting, log=self.log)

    def _make(self, step: Step, target: Path) -> Iterator[_Made]:
        """Yield a step for it to run, unless only its completion was interrupted, and complete it."""
        if target.exists() and artifacts.read_manifest(target) is None:
            raise InputError(f"{target} exists but was not made by a step; move it away or rename the step")
        self._check_inputs(step)  # before anything of an earlier attempt is removed
        fingerprint = self.current[step.name]
        attempt = Attempt(fingerprint, {name: build_id(self.root / name) for name in step.inputs})
        working = artifacts.working_folder(target)
        _prepare(working, attempt)
        self.on_state(step.name, RUNNING)
        manifest = artifacts.read_manifest(working) or {}
        if "step" not in manifest:  # else interrupted between its manifest and its renaming
            made = _Made(step, working)
            yield made
            manifest = {**made.content, **_provenance(step, self.root, attempt)}
        artifacts.complete(
            working,
            target,
            manifest=manifest,
            cleanup=self.cleanup.working,
            amend=lambda records: same_build(target, fingerprint, records),
        )
        self.verified.add(step.name)
        self.on_state(step.name, FINISHED)

    def _check_inputs(self, step: Step) -> None:
        """Raise `RunError` if a file of an input is not as its step wrote it; each input is read once in a run."""
        for name in step.inputs:
            if name in self.verified:
                continue
            self.verified.add(name)
            records = artifacts.recorded_files(self.root / name)
            if records is None:
                self.log(f"{name}: {NOT_VERIFIED}")
            elif problems := content_problems(self.root / name, records):
                raise RunError(f"{problems[0]}, and step {step.name!r} reads it; {restore(name)}")


def _provenance(step: Step, root: Path, attempt: Attempt) -> dict[str, Any]:
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


def _prepare(working: Path, attempt: Attempt) -> None:
    """Create the working folder, or clear it unless it belongs to an equal attempt."""
    if attempt.matches(artifacts.read_manifest(working)):
        return
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    started = {"fingerprint": attempt.fingerprint, "input_build_ids": dict(attempt.build_ids)}
    artifacts.write_json(working / artifacts.MANIFEST, started)
