"""Read a run folder. Files that a run has not written yet are treated as empty."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.artifacts import MANIFEST, METRICS, read_json, read_manifest, working_folder
from align.errors import InputError
from align.registry import is_in_nats, lower_is_better

try:
    import fcntl
except ImportError:  # Windows has no such module; a run is then never shown as running
    fcntl = None

RECIPE, TABLE, CHANGES, LEDGER = "recipe.json", "table.json", "changes.json", "ledger.json"
SEARCH = "search.json"
PARTIAL = ".partial"  # suffix of the working folder of a step that has not finished
LABELS = tuple(f"run {letter}" for letter in "ABCDEFGH")  # in a comparison of runs, which have a colour each
FINISHED, RUNNING, UNFINISHED, NOT_STARTED = "finished", "running", "unfinished", "not started"  # states of a step
LOCK = ".lock"  # held by the process that runs the steps
START = "start/"  # prefix of a held-out metric before the first update, in the line of step 1
THROUGHPUT, MEMORY = "tokens_per_second", "peak_memory_mib"  # metrics derived from the logged ones
MIB = 1 << 20

Facts = Mapping[str, Any]
Scores = Mapping[str, Mapping[str, Facts]]  # policy -> task -> {value, low, high, n}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run."""

    name: str
    state: str
    folder: Path
    settings: Facts
    manifest: Facts
    metrics: Sequence[Mapping[str, float]]  # one entry per optimizer step

    @property
    def environment(self) -> Facts:
        """Return when, where and from what the step was computed; empty if that is unknown."""
        return self.manifest.get("environment") or {}

    @property
    def stage(self) -> str:
        """Return the kind of step, or '' if it is unknown."""
        return str(self.manifest.get("stage") or self.settings.get("stage") or "")


@dataclass(frozen=True, slots=True)
class Run:
    """The content of a run folder."""

    name: str
    recipe: Facts
    steps: Sequence[Step]  # in order
    table: Scores  # policies in the order of their steps
    changes: Scores
    ledgers: Mapping[str, Facts]  # by step
    total: Facts  # of the ledgers
    search: Facts = field(default_factory=dict[str, Any])  # by the step whose settings were searched

    @property
    def tasks(self) -> list[str]:
        """Return every task that a policy was evaluated on."""
        return list(dict.fromkeys(task for scores in self.table.values() for task in scores))

    @property
    def in_nats(self) -> set[str]:
        """Return the tasks whose metric or name is a negative log-likelihood or a KL divergence."""
        columns = self._columns
        names = {task: " ".join([task, *columns.get(task, ())]) for task in [*self.tasks, *columns]}
        return {task for task, name in names.items() if is_in_nats(name)}

    @property
    def lower_is_better(self) -> set[str]:
        """Return the tasks of whose scores the lower one is better."""
        metrics = {task: task for task in self.tasks} | {task: names[-1] for task, names in self._columns.items()}
        return self.in_nats | {task for task, metric in metrics.items() if lower_is_better(metric)}

    @property
    def _columns(self) -> dict[str, Sequence[str]]:
        """Return the evaluation and the metric of each task that a manifest names."""
        found: dict[str, Sequence[str]] = {}
        for step in self.steps:
            found |= step.manifest.get("columns") or {}
        return found

    def step(self, name: str) -> Step | None:
        """Return the step with this name, or None."""
        return next((step for step in self.steps if step.name == name), None)


def read_run(folder: Path) -> Run:
    """Return the content of a run folder; raise `InputError` where it is not one."""
    manifests = _manifests(folder)
    recipe = read_optional(folder / RECIPE)
    planned: Mapping[str, Facts] = recipe.get("steps") or {name: {} for name in manifests}
    settings = {name: planned[name] or (manifests.get(name) or {}).get("settings") or {} for name in planned}
    names = _in_order(settings, manifests)
    is_running = _is_locked(folder / LOCK)
    steps = [_step(folder / name, settings[name], manifests.get(name), is_running=is_running) for name in names]
    ledger = read_optional(folder / LEDGER)
    by_step: Mapping[str, Facts] = ledger.get("steps") or {}
    ledgers = {step.name: found for step in steps if (found := step.manifest.get("ledger") or by_step.get(step.name))}
    table: Scores = _scores(steps) or read_optional(folder / TABLE)
    return Run(
        name=str(recipe.get("run") or folder.resolve().name),
        recipe=recipe,
        steps=steps,
        table={name: table[name] for name in dict.fromkeys([*names, *table]) if name in table},
        changes=read_optional(folder / CHANGES),
        ledgers=ledgers,
        total=(ledger.get("total") or {}) if by_step.keys() == ledgers.keys() else {},
        search=read_optional(folder / SEARCH),
    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, without a last line that was cut off by a kill."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
            except ValueError as error:
                if line.endswith("\n"):
                    raise InputError(f"{path}: line {number} cannot be read as JSON: {error}") from error
                return
            if isinstance(found, dict):
                yield found


def _manifests(folder: Path) -> Mapping[str, Facts | None]:
    """Return the manifest of each step, None for an unfinished one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a run")
    inside = sorted(path for path in folder.iterdir() if (path / MANIFEST).is_file())
    unfinished = {path.stem: None for path in inside if path.suffix == PARTIAL and not path.name.startswith(".")}
    finished = {path.name: read_manifest(path) or {} for path in inside if PARTIAL not in path.name}
    if finished or unfinished or (folder / RECIPE).is_file():
        return {**unfinished, **finished}
    if (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: this is the folder of a step; give the run folder {folder.resolve().parent}")
    raise InputError(f"{folder}: not a run folder: it has neither {RECIPE} nor a step with a {MANIFEST}")


def read_optional(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is no file."""
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, not a {type(found).__name__}")
    return found


def _in_order(settings: Mapping[str, Facts], manifests: Mapping[str, Facts | None]) -> list[str]:
    """Return the steps so that each follows its inputs, otherwise in the order of the recipe."""
    inputs = {
        name: _inputs(values) | set((manifests.get(name) or {}).get("inputs") or ())
        for name, values in settings.items()
    }
    ordered: list[str] = []
    while waiting := [name for name in settings if name not in ordered]:
        ready = (name for name in waiting if not inputs[name] & (set(waiting) - {name}))
        ordered.append(next(ready, waiting[0]))
    return ordered


def _inputs(settings: Facts) -> set[str]:
    """Return the steps that a step's settings name."""
    values = [settings.get(key) or () for key in ("policy", "policies", "data")]
    return {str(name) for value in values for name in ([value] if isinstance(value, str) else value)}


def _step(target: Path, settings: Facts, manifest: Facts | None, *, is_running: bool) -> Step:
    working = working_folder(target)
    unfinished = RUNNING if is_running else UNFINISHED
    state = FINISHED if manifest is not None else unfinished if working.is_dir() else NOT_STARTED
    folder = working if state == unfinished else target
    metrics = [_numbers(line) for line in read_lines(folder / METRICS)]
    return Step(target.name, state, folder, settings, manifest or {}, metrics)


def _is_locked(path: Path) -> bool:
    """Return whether a process of this machine holds the lock of the run folder."""
    if fcntl is None or not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _numbers(line: Facts) -> dict[str, float]:
    """Return the numbers of a line of metrics, with trained tokens per second and peak memory in MiB."""
    found = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
    if found.get("tokens_trained") and found.get("seconds"):
        found[THROUGHPUT] = found["tokens_trained"] / found["seconds"]
    if "peak_memory_bytes" in found:
        found[MEMORY] = found["peak_memory_bytes"] / MIB
    return found


def _scores(steps: Sequence[Step]) -> dict[str, dict[str, Facts]]:
    """Return the table of results from the manifests of the evaluations."""
    found: dict[str, dict[str, Facts]] = {}
    for step in steps:
        for policy, scores in (step.manifest.get("scores") or {}).items():
            found.setdefault(policy, {}).update(scores)
    return found
