"""Steps in order: the finished are skipped, the killed continued, the changed run again. Knows no machine learning."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import artifacts
from align.config import InputError, nearest, pick, stable_hash

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?<!\.partial)")


@dataclass(frozen=True, slots=True)
class Step:
    """One folder to be made; `key` is a hash of all that decides its content besides its inputs."""

    name: str
    inputs: tuple[str, ...]
    key: str

    def __post_init__(self) -> None:
        if not FOLDER_NAME.fullmatch(self.name):
            raise InputError(f"a step's name becomes a folder: letters, digits, '-', '_' and '.', not {self.name!r}")


Execute = Callable[[Step, Path, Mapping[str, Path]], Mapping[str, Any]]


def order(steps: Sequence[Step]) -> list[Step]:
    """The steps so that each follows its inputs, otherwise as they were given."""
    names = [step.name for step in steps]
    for step in steps:
        if names.count(step.name) > 1:
            raise InputError(f"two steps are called {step.name!r}; a name is given once")
        for name in step.inputs:
            if name not in names:
                raise InputError(f"step {step.name!r} needs {name!r}, which is no step; {nearest(name, names)}")
    placed: dict[str, Step] = {}
    while len(placed) < len(steps):
        waiting = [step for step in steps if step.name not in placed]
        ready = next((step for step in waiting if all(name in placed for name in step.inputs)), None)
        if ready is None:
            raise InputError(f"steps need each other in a ring: {_ring(waiting)}")
        placed[ready.name] = ready
    return list(placed.values())


def _ring(waiting: Sequence[Step]) -> str:
    """One ring among steps of which each waits for another, as `a -> b -> a`."""
    needs = {step.name: step.inputs for step in waiting}
    path = [waiting[0].name]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in needs[path[-1]] if name in needs))
    return " -> ".join(path[path.index(path[-1]) :])


def fingerprints(steps: Sequence[Step]) -> dict[str, str]:
    """A hash by step that changes when the step's key or anything before it does."""
    found: dict[str, str] = {}
    for step in order(steps):
        found[step.name] = stable_hash([step.key, {name: found[name] for name in step.inputs}])
    return found


def run(
    steps: Sequence[Step],
    root: Path,
    *,
    execute: Execute,
    announce: Callable[[str], None],
    until: str | None = None,
) -> dict[str, dict[str, Any]]:
    """The manifest of every step up to `until` by name, after `execute` has made those that were not there.

    `execute(step, working folder, folder of each input)` continues from what it finds in the working folder,
    and returns what the manifest is to say.
    """
    ordered = order(steps)
    marks = fingerprints(steps)
    if until is not None:
        ordered = ordered[: 1 + pick({step.name: place for place, step in enumerate(ordered)}, until, "step")]
    made: dict[str, dict[str, Any]] = {}
    for step in ordered:
        target, mark = root / step.name, marks[step.name]
        found = artifacts.manifest(target)
        if found is not None and found.get("fingerprint") == mark:
            announce(f"{step.name}: finished before, skipped")
            made[step.name] = found
            continue
        if found is None and target.exists():
            raise InputError(f"{target} is there and no step made it: move it away, or call the step something else")
        working = artifacts.working_folder(target)
        how = _open(working, mark)
        announce(f"{step.name}: {how}" if found is None else f"{step.name}: its settings or inputs changed, {how}")
        with artifacts.writing(working):
            content = execute(step, working, {name: root / name for name in step.inputs})
        inputs = {name: marks[name] for name in step.inputs}
        made[step.name] = {**content, "step": step.name, "key": step.key, "inputs": inputs, "fingerprint": mark}
        artifacts.complete(working, target, manifest=made[step.name])
    return made


def _open(working: Path, mark: str) -> str:
    """How the step starts in its working folder, which is cleared of an attempt with another fingerprint."""
    how = "runs"
    if working.exists():
        if (artifacts.manifest(working) or {}).get("fingerprint") == mark:
            return "continues where it was stopped"
        shutil.rmtree(working)
        how = "runs from its start: what it had begun was of other settings or inputs"
    working.mkdir(parents=True)
    artifacts.write_json(working / artifacts.MANIFEST, {"fingerprint": mark})
    return how
