"""From the steps as they are written to the steps as they are run: rounds, and an evaluation for each policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from align.config import build
from align.errors import InputError
from align.pipeline import check_name
from align.registry import pick, suggest
from align.stages.steps import ALL, MAKES, POLICY, SETTINGS, STEP, AnyStep, EvaluateStep, PreferenceStep, RoundSettings

ROUND_KEYS = tuple(RoundSettings.model_fields)
PREFERENCE_KEYS = (*PreferenceStep.model_fields, *ROUND_KEYS)
# What a run's folder holds beside the folders of its steps.
RESERVED = ("recipe.json", "table.json", "changes.json", "ledger.json", "report.html", "references")
NAMES_STEPS = ("policy", "policies", "data", "step")  # keys whose values may be the names of steps


@dataclass(slots=True)
class Expanded:
    """The steps in the order in which they run."""

    steps: dict[str, AnyStep] = field(default_factory=dict[str, AnyStep])
    origins: dict[str, str] = field(default_factory=dict[str, str])  # the name under which the recipe wrote a step


def expand(given: Mapping[Any, Any]) -> Expanded:
    """Each step with its own stage's settings, so that an error names the step and the stage's own keys."""
    found = Expanded()
    latest: dict[str, str] = {}  # of a step in rounds the last one, which others mean by its name
    evaluations: dict[str, EvaluateStep] = {}
    policy: str | None = None
    for key, raw in given.items():
        name = str(key)
        where = f"steps.{name}"
        if not isinstance(raw, Mapping) or "stage" not in raw:
            raise InputError(f"{where}: a step needs a stage; {suggest('', SETTINGS)}")
        stage, settings = str(raw["stage"]), _renamed(raw, latest)
        kind = _pick_stage(stage, where)
        if unknown := [key for key in settings if stage == "preference" and key not in PREFERENCE_KEYS]:
            raise InputError(f"{where}.{unknown[0]}: unknown key; {suggest(unknown[0], PREFERENCE_KEYS)}")
        rounds = {key: settings[key] for key in ROUND_KEYS if key in settings}
        if stage == "preference" and rounds:
            plain = {key: value for key, value in settings.items() if key not in ROUND_KEYS}
            _add_rounds(found, name, plain, build(RoundSettings, rounds, ("steps", name)), policy)
            latest[name] = policy = list(found.steps)[-1]
            continue
        step = build(kind, settings, ("steps", name))
        if isinstance(step, EvaluateStep):
            if not step.policies:
                raise InputError(f"{where}.policies: name a step at least, or 'all'")
            evaluations[name] = step
            continue
        _add(found, name, step, name)
        policy = name if MAKES[stage] == POLICY else policy
    return _with_evaluations(found, evaluations)


def _pick_stage(stage: str, where: str) -> type[AnyStep]:
    try:
        return pick(SETTINGS, stage, "stage")
    except InputError as error:
        raise InputError(f"{where}.stage: {error}") from error


def _add(found: Expanded, name: str, step: AnyStep, origin: str) -> None:
    check_name(origin)
    if name in RESERVED:
        raise InputError(
            f"steps.{origin}: a run has something else of its own called {name!r}; call the step otherwise"
        )
    if name in found.steps:
        raise InputError(f"steps.{origin}: becomes a step called {name!r}, and there is one of this name already")
    found.steps[name], found.origins[name] = step, origin


def _add_rounds(found: Expanded, name: str, plain: Mapping[str, Any], how: RoundSettings, policy: str | None) -> None:
    """Steps `name-1`, `name-2`, ..., each from the policy of the one before, with its own samples where asked for."""
    where = f"steps.{name}"
    policy = plain.get("policy", policy)
    if how.generate and not how.on_policy:
        raise InputError(f"{where}.generate: is for on_policy: true; without it every round takes the rows of `data`")
    for number in range(how.rounds):
        round_name = f"{name}-{number + 1}" if how.rounds > 1 else name
        settings: dict[str, Any] = {**plain, **({} if policy is None else {"policy": policy})}
        if how.on_policy:
            if policy is None:
                raise InputError(f"{where}.on_policy: no step before this one makes a policy that could answer")
            samples = {"stage": "generate", "policies": [policy], "data": plain.get("data"), "round": number}
            made = build(SETTINGS["generate"], {**samples, **how.generate}, ("steps", name, "generate"))
            _add(found, f"{round_name}-samples", made, name)
            settings["data"] = f"{round_name}-samples"
        _add(found, round_name, build(SETTINGS["preference"], settings, ("steps", name)), name)
        policy = round_name


def _with_evaluations(found: Expanded, evaluations: Mapping[str, EvaluateStep]) -> Expanded:
    """The steps with each evaluation of a policy right after that policy; of what is no policy, at the end."""
    placed = Expanded()
    makers = [name for name, step in found.steps.items() if MAKES[step.stage] == POLICY]
    asked = {name: makers if step.policies == ALL else list(step.policies) for name, step in evaluations.items()}
    if unasked := [name for name, policies in asked.items() if not policies]:
        raise InputError(f"steps.{unasked[0]}.policies: 'all', and no step makes a policy; import one first")
    for name, step in found.steps.items():
        _add(placed, name, step, found.origins[name])
        for evaluation in [each for each, policies in asked.items() if name in policies]:
            _add_evaluation(placed, evaluation, evaluations[evaluation], name)
    for evaluation, policies in asked.items():
        for policy in [policy for policy in policies if policy not in found.steps]:
            _add_evaluation(placed, evaluation, evaluations[evaluation], policy)
    return placed


def _add_evaluation(placed: Expanded, name: str, step: EvaluateStep, policy: str) -> None:
    _add(placed, f"{name}-{policy}", step.model_copy(update={"policies": [policy]}), name)


def _renamed(value: Any, latest: Mapping[str, str], key: str = "") -> Any:  # noqa: ANN401 - plain values of YAML
    """The value with the last round in place of the name of a step in rounds."""
    if isinstance(value, Mapping):
        return {str(name): _renamed(each, latest, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, latest, key) for each in value]
    if isinstance(value, str) and value.startswith(STEP):
        return STEP + latest.get(value.removeprefix(STEP), value.removeprefix(STEP))
    return latest.get(value, value) if isinstance(value, str) and key in NAMES_STEPS else value
