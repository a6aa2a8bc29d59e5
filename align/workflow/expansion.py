"""Expansion: from the steps as they are written to the steps that run one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from align.config import build
from align.content_hash import STEP
from align.errors import InputError, Location, within
from align.pipeline import check_name
from align.registry import suggest
from align.stages.base import POLICY, REFERENCES, Stage
from align.stages.table import STAGES, stage_class

# Files of a run beside the folders of its steps
RUN_FILES = ("recipe.json", "table.json", "changes.json", "ledger.json", "report.html")
RESERVED = (*RUN_FILES, REFERENCES)
NAMES_STEPS = ("policy", "policies", "data", "step")  # keys whose values may be the names of steps


class Expanded(NamedTuple):
    """A step that runs, with the written step that it comes from."""

    name: str
    step: Stage
    origin: str
    below: Location  # the setting of the written step that holds this step's settings


def expand(given: Mapping[Any, Any]) -> list[Expanded]:
    """Return the steps in the order in which they run."""
    written = _written_steps(given)
    policies = [made for name, step in written.items() if step.makes == POLICY for made in step.made(name)]
    found: dict[str, Expanded] = {}
    following: list[tuple[Expanded, str]] = []  # steps that directly follow a policy
    for name, step in written.items():
        before = {other: expanded.step for other, expanded in found.items()}
        with within("steps", name):
            placed = step.expand(name, before, policies)
        for each in placed:
            expanded = Expanded(each.name, each.step, name, each.below)
            _check_name(expanded, found, following)
            if each.after is not None:
                following.append((expanded, each.after))
            else:
                found[each.name] = expanded
    ordered: list[Expanded] = []
    for name, expanded in found.items():
        ordered += [expanded, *(step for step, after in following if after == name)]
    return [*ordered, *(step for step, after in following if after not in found)]


def _written_steps(given: Mapping[Any, Any]) -> dict[str, Stage]:
    """Return each written step, with the last round in place of the name of an earlier step in rounds."""
    latest: dict[str, str] = {}
    found: dict[str, Stage] = {}
    for key, raw in given.items():
        name = str(key)
        if not isinstance(raw, Mapping) or "stage" not in raw:
            raise InputError(f"a step needs a stage; {suggest('', STAGES)}", ("steps", name))
        with within("steps", name, "stage"):
            kind = stage_class(str(raw["stage"]))
        found[name] = build(kind, _with_latest(raw, latest), ("steps", name))
        if (last := found[name].made(name)[-1]) != name:
            latest[name] = last
    return found


def _check_name(step: Expanded, found: Mapping[str, Expanded], following: list[tuple[Expanded, str]]) -> None:
    check_name(step.origin)
    loc = ("steps", step.origin)
    if step.name in RESERVED:
        raise InputError(f"{step.name!r} is the name of another file of a run; give the step another name", loc)
    if step.name in found or any(step.name == other.name for other, _ in following):
        raise InputError(f"it becomes a step called {step.name!r}, and there is one of this name already", loc)


def _with_latest(value: Any, latest: Mapping[str, str], key: str = "") -> Any:  # noqa: ANN401 - plain values of YAML
    """Return the value with the last round in place of the name of a step in rounds."""
    if isinstance(value, Mapping):
        return {str(name): _with_latest(each, latest, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_latest(each, latest, key) for each in value]
    if isinstance(value, str) and value.startswith(STEP):
        return STEP + latest.get(value.removeprefix(STEP), value.removeprefix(STEP))
    return latest.get(value, value) if isinstance(value, str) and key in NAMES_STEPS else value
