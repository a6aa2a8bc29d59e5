"""Expansion: from the steps as they are written to the steps that run one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from align.config import build
from align.content_hash import STEP
from align.errors import ErrorList, InputError, Location, within
from align.pipeline import check_name
from align.registry import suggest
from align.stages.base import EMBEDDINGS, POLICY, REFERENCES, RESPONSES, TRACKING, Placed, Stage
from align.stages.table import STAGES, stage_class
from align.workflow.recipe.hints import stage_hint

# Files of a run beside the folders of its steps
RUN_FILES = ("recipe.json", "search.json", "table.json", "changes.json", "ledger.json", "report.html")
RESERVED = (*RUN_FILES, EMBEDDINGS, REFERENCES, RESPONSES, TRACKING)
NAMES_STEPS = (
    "policy",
    "policies",
    "data",
    "step",
    "of",
    "base",
    "toward",
)  # keys whose values may be the names of steps


class Expanded(NamedTuple):
    """A step that runs, with the written step that it comes from."""

    name: str
    step: Stage
    origin: str
    below: Location  # the setting of the written step that holds this step's settings


def expand(given: Mapping[Any, Any], errors: ErrorList, broken: set[str]) -> list[Expanded]:
    """Return the steps in the order in which they run. `broken` receives the names of those that have errors.

    An error of a step may follow from a broken one before it, and is then not reported.
    """
    written = _written_steps(given, errors)
    broken |= {str(name) for name in given} - written.keys()
    policies = [made for name, step in written.items() if step.makes == POLICY for made in step.made(name)]
    found: dict[str, Expanded] = {}
    following: list[tuple[Expanded, str]] = []  # steps that directly follow a policy
    for name, step in written.items():
        before = {other: expanded.step for other, expanded in found.items()}
        follows_broken = not broken.isdisjoint(map(str, given))
        placed = list[Placed]()
        missed = ErrorList()
        with missed.collect(), within("steps", name):
            placed = step.expand(name, before, policies)
        errors.found += [] if follows_broken else missed.found
        broken |= {name} if missed.found else set()
        for each in placed:
            expanded = Expanded(each.name, each.step, name, each.below)
            with errors.collect():
                _check_name(expanded, found, following)
                if each.after is not None:
                    following.append((expanded, each.after))
                else:
                    found[each.name] = expanded
    ordered: list[Expanded] = []
    for name, expanded in found.items():
        ordered += [expanded, *(step for step, after in following if after == name)]
    return [*ordered, *(step for step, after in following if after not in found)]


def _written_steps(given: Mapping[Any, Any], errors: ErrorList) -> dict[str, Stage]:
    """Return each written step, with the last round in place of the name of an earlier step in rounds."""
    latest: dict[str, str] = {}
    found: dict[str, Stage] = {}
    for key, raw in given.items():
        name = str(key)
        with errors.collect():
            found[name] = _written_step(name, raw, latest)
            if (last := found[name].made(name)[-1]) != name:
                latest[name] = last
    return found


def _written_step(name: str, raw: Any, latest: Mapping[str, str]) -> Stage:  # noqa: ANN401 - plain values of YAML
    """Return a step from its plain values."""
    if not isinstance(raw, Mapping) or "stage" not in raw:
        raise InputError(f"a step needs a stage; {suggest('', STAGES)}", ("steps", name))
    stage = str(raw["stage"])
    loc = ("steps", name)
    if stage not in STAGES and (hint := stage_hint(stage)) is not None:
        meant, text = hint
        errors = ErrorList()
        errors.found.append(InputError(f"no stage is called {stage!r}; write {text}", (*loc, "stage")))
        with errors.collect():
            build(STAGES[meant], {**with_names(raw, latest), "stage": meant}, loc)
        errors.raise_found()
    with within(*loc, "stage"):
        kind = stage_class(stage)
    return build(kind, with_names(raw, latest), loc)


def _check_name(step: Expanded, found: Mapping[str, Expanded], following: list[tuple[Expanded, str]]) -> None:
    check_name(step.origin)
    loc = ("steps", step.origin)
    if step.name in RESERVED:
        raise InputError(f"{step.name!r} is the name of another file of a run; give the step another name", loc)
    if step.name in found or any(step.name == other.name for other, _ in following):
        raise InputError(f"it becomes a step called {step.name!r}, and there is one of this name already", loc)


def with_names(value: Any, names: Mapping[str, str], key: str = "") -> Any:  # noqa: ANN401 - settings of any type
    """Return settings, or plain values, in which `names` replaces names of steps: below NAMES_STEPS and in step:NAME.

    >>> with_names({"policy": "sft", "judges": [{"path": "step:rate"}]}, {"sft": "sft-2", "rate": "rate-1"})
    {'policy': 'sft-2', 'judges': [{'path': 'step:rate-1'}]}
    """
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        changed = {name: with_names(each, names, name) for name, each in fields.items()}
        return value.model_copy(update={name: each for name, each in changed.items() if each != fields[name]})
    if isinstance(value, Mapping):
        kept = names if key == "data" else {}  # shares of rows by their names
        return {kept.get(str(name), str(name)): with_names(each, names, str(name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_names(each, names, key) for each in value)
    if isinstance(value, str) and value.startswith(STEP):
        name, slash, file = value.removeprefix(STEP).partition("/")
        return f"{STEP}{names.get(name, name)}{slash}{file}"
    return names.get(value, value) if isinstance(value, str) and key in NAMES_STEPS else value
