"""A run's folder as plain facts. What a run has not written is absent; only a folder that is no run is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.artifacts import MANIFEST, METRICS, read_json, read_manifest, working_folder
from align.errors import InputError

RECIPE, TABLE, CHANGES, LEDGER = "recipe.json", "table.json", "changes.json", "ledger.json"
LIKELIHOOD = "nll"  # in the name of a rate or of a task
PARTIAL = ".partial"  # ends the name of a folder that a step is still writing
FIRST, SECOND = "run A", "run B"  # labels where there are two
FINISHED, BEGUN, WAITING = "finished", "not finished", "not begun"

Facts = Mapping[str, Any]
Scores = Mapping[str, Mapping[str, Facts]]  # policy -> task -> {value, low, high, n}


@dataclass(frozen=True, slots=True)
class Step:
    """What is known of one step of the recipe."""

    name: str
    state: str
    folder: Path
    settings: Facts
    manifest: Facts
    metrics: Sequence[Mapping[str, float]]  # a line an optimizer step

    @property
    def stage(self) -> str:
        """The stage, as far as it is known."""
        return str(self.manifest.get("stage") or self.settings.get("stage") or "")


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a run."""

    name: str
    recipe: Facts
    steps: Sequence[Step]  # in order
    table: Scores  # policies in the order of their steps
    changes: Scores
    ledgers: Mapping[str, Facts]
    total: Facts

    @property
    def tasks(self) -> list[str]:
        """Every task that a policy was evaluated on."""
        return list(dict.fromkeys(task for scores in self.table.values() for task in scores))

    @property
    def in_nats(self) -> set[str]:
        """The tasks that tell a negative log-likelihood, of which less is better: by their rate, or by their name."""
        rates: dict[str, str] = {task: task for task in self.tasks}
        for step in self.steps:
            columns: Mapping[str, Sequence[str]] = step.manifest.get("columns") or {}
            rates |= {task: " ".join([task, *of]) for task, of in columns.items()}
        return {task for task, rate in rates.items() if LIKELIHOOD in rate.lower()}

    def step(self, name: str) -> Step | None:
        """The step of that name, or None."""
        return next((step for step in self.steps if step.name == name), None)


def read_run(folder: Path) -> Run:
    """The facts of a run."""
    made = _manifests(folder)
    recipe = _optional(folder / RECIPE)
    planned: Mapping[str, Facts] = recipe.get("steps") or {name: {} for name in made}
    settings = {name: planned[name] or (made.get(name) or {}).get("settings") or {} for name in planned}
    names = _in_order(settings, made)
    steps = [_step(folder / name, settings[name], made.get(name)) for name in names]
    ledger = _optional(folder / LEDGER)
    kept: Mapping[str, Facts] = ledger.get("steps") or {}
    ledgers = {step.name: of for step in steps if (of := step.manifest.get("ledger") or kept.get(step.name))}
    table: Scores = _graded(steps) or _optional(folder / TABLE)
    return Run(
        name=str(recipe.get("run") or folder.resolve().name),
        recipe=recipe,
        steps=steps,
        table={name: table[name] for name in dict.fromkeys([*names, *table]) if name in table},
        changes=_optional(folder / CHANGES),
        ledgers=ledgers,
        total=(ledger.get("total") or {}) if kept.keys() == ledgers.keys() else {},
    )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a last line that a kill has left half-written is no line."""
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
    """Manifest by step, None of one not finished; an error where nothing says that the folder is a run's."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a report is made of a run's folder")
    inside = sorted(path for path in folder.iterdir() if (path / MANIFEST).is_file())
    begun = {path.stem: None for path in inside if path.suffix == PARTIAL and not path.name.startswith(".")}
    made = {path.name: read_manifest(path) or {} for path in inside if PARTIAL not in path.name}
    if made or begun or (folder / RECIPE).is_file():
        return {**begun, **made}
    if (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: is the folder of one step; the run is {folder.resolve().parent}")
    raise InputError(f"{folder}: is no run: it holds neither {RECIPE} nor a step's {MANIFEST}")


def _optional(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, where an object is needed")
    return found


def _in_order(settings: Mapping[str, Facts], made: Mapping[str, Facts | None]) -> list[str]:
    """The steps so that each follows those it needs, otherwise as the recipe has them."""
    needs = {name: _needs(of) | set((made.get(name) or {}).get("inputs") or ()) for name, of in settings.items()}
    placed: list[str] = []
    while waiting := [name for name in settings if name not in placed]:
        ready = (name for name in waiting if not needs[name] & (set(waiting) - {name}))
        placed.append(next(ready, waiting[0]))
    return placed


def _needs(settings: Facts) -> set[str]:
    """The steps that a step's settings name."""
    named = [settings.get(key) or () for key in ("policy", "policies", "data")]
    return {str(name) for of in named for name in ([of] if isinstance(of, str) else of)}


def _step(folder: Path, settings: Facts, made: Facts | None) -> Step:
    working = working_folder(folder)
    state = FINISHED if made is not None else BEGUN if working.is_dir() else WAITING
    place = working if state == BEGUN else folder
    lines = [_numbers(line) for line in read_lines(place / METRICS)]
    return Step(folder.name, state, place, settings, made or {}, lines)


def _numbers(line: Facts) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if isinstance(value, int | float)}


def _graded(steps: Sequence[Step]) -> dict[str, dict[str, Facts]]:
    """The table as the manifests of the evaluations have it."""
    found: dict[str, dict[str, Facts]] = {}
    for step in steps:
        for policy, scores in (step.manifest.get("scores") or {}).items():
            found.setdefault(policy, {}).update(scores)
    return found
