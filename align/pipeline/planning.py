"""Plan steps: which are finished, which resume, and which run again and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align import artifacts
from align.errors import RunError
from align.pipeline.steps import Step, dependents, fingerprints, order
from align.registry import pick
from align.storage.checksums import size_problems

RERUN_REQUEST = ".rerun.json"  # in a run folder while a requested rerun is unfinished: fingerprints of its steps
WAITING, INTERRUPTED, RUNNING, FINISHED = "waiting", "interrupted", "running", "finished"  # states of a step
NOT_VERIFIED = "its files are not verified, as its manifest was written by a version without checksums"
NOT_BUILT = "not built"  # build ID of an input that has yet to run


class PlannedStep(NamedTuple):
    """A step with its current state and the reason why it will run or not."""

    step: Step
    state: str  # FINISHED, INTERRUPTED or WAITING
    reason: str


def plan(
    steps: Sequence[Step], root: Path, *, until: str | None = None, rerun: Sequence[str] = ()
) -> list[PlannedStep]:
    """Return what `run` would do with each step up to `until`, in order, without changing anything.

    The steps in `rerun` and their dependents are not skipped, nor are finished steps of which files were removed that
    a step to run reads. Raises `RunError` for a finished step of which a file is missing or has another size.
    """
    ordered = order(steps)
    current = fingerprints(steps)
    positions = {step.name: position for position, step in enumerate(ordered)}
    requested = set[str]() if is_rerun_started(steps, root, rerun) else dependents(steps, rerun)
    last = pick(positions, until, "step") if until is not None else len(ordered) - 1
    planned: list[PlannedStep] = []
    build_ids: dict[str, str] = {}
    for step in ordered[: last + 1]:
        attempt = Attempt(current[step.name], {name: build_ids[name] for name in step.inputs})
        planned.append(_planned(step, root / step.name, attempt, is_requested=step.name in requested))
        build_ids[step.name] = build_id(root / step.name) if planned[-1].state == FINISHED else NOT_BUILT
    return _with_restored(planned, root)


class Attempt(NamedTuple):
    """The settings and inputs that a step would run with now."""

    fingerprint: str
    build_ids: Mapping[str, str]  # of its inputs

    def matches(self, manifest: Mapping[str, Any] | None) -> bool:
        """Return whether a folder was made with these settings from these builds of its inputs."""
        if manifest is None or manifest.get("fingerprint") != self.fingerprint:
            return False
        return {**self.build_ids, **manifest.get("input_build_ids", {})} == self.build_ids


def _planned(step: Step, target: Path, attempt: Attempt, *, is_requested: bool) -> PlannedStep:
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
    removal = artifacts.removal_of(target)
    if records is None:
        return f"finished before, skipped; {NOT_VERIFIED}"
    if problems := size_problems(target, records):
        raise RunError(f"{problems[0]}; {restore(step.name)}")
    return "finished before, skipped" if removal is None else f"finished before, skipped; its {removal}"


def _with_restored(planned: Sequence[PlannedStep], root: Path) -> list[PlannedStep]:
    """Return the plan with those finished steps run again of which files were removed and a step to run reads them."""
    readers: dict[str, str] = {}  # input -> the first step to run that reads it
    found: list[PlannedStep] = []
    for each in reversed(planned):
        name = each.step.name
        if each.state == FINISHED and name in readers and (removal := artifacts.removal_of(root / name)) is not None:
            working = artifacts.read_manifest(artifacts.working_folder(root / name)) or {}
            is_begun = working.get("fingerprint") == (artifacts.read_manifest(root / name) or {}).get("fingerprint")
            reason = f"its {removal}; the step runs again because {readers[name]!r} reads them"
            each = PlannedStep(each.step, INTERRUPTED if is_begun else WAITING, reason)  # noqa: PLW2901
        if each.state != FINISHED:
            readers |= dict.fromkeys(each.step.inputs, name)
        found.insert(0, each)
    return found


def finished_steps(steps: Sequence[Step], root: Path) -> dict[str, dict[str, Any]]:
    """Return the manifest of each step that is finished with its settings and inputs, whatever was removed of it."""
    current = fingerprints(steps)
    found = dict[str, dict[str, Any]]()
    for step in order(steps):
        built = {name: build_id(root / name) if name in found else NOT_BUILT for name in step.inputs}
        manifest = artifacts.read_manifest(root / step.name)
        if manifest is not None and Attempt(current[step.name], built).matches(manifest):
            found[step.name] = manifest
    return found


def restore(name: str) -> str:
    """Return what to do about a file of a step that is missing or damaged."""
    return f"restore it, or make step {name!r} and all that depend on it again: --rerun-from {name}"


def build_id(target: Path) -> str:
    """Return the ID of this execution of a step, which tells apart reruns with equal settings; '' in old manifests."""
    return str((artifacts.read_manifest(target) or {}).get("build_id", ""))


def is_rerun_started(steps: Sequence[Step], root: Path, rerun: Sequence[str]) -> bool:
    """Return whether an earlier, interrupted call has already started the same rerun."""
    note = root / RERUN_REQUEST
    return bool(rerun) and note.is_file() and artifacts.read_json(note) == rerun_request(steps, rerun)


def rerun_request(steps: Sequence[Step], rerun: Sequence[str]) -> dict[str, str]:
    """Return the content of RERUN_REQUEST: the fingerprint of each step of a requested rerun."""
    current = fingerprints(steps)
    return {name: current[name] for name in sorted(dependents(steps, rerun))}
