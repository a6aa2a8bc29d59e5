"""The table of judges, and several of them as one: by weights, or by precedence."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from align.config import Settings, build, read_overrides
from align.errors import InputError
from align.registry import import_dotted, pick
from align.rewards.llm_judge import LlmSettings, llm_judge
from align.rewards.reward_model_judge import RewardModelJudge, RewardModelSettings
from align.rewards.rule_judges import GroundTruthJudge, GroundTruthSettings, VerifierJudge, VerifierSettings
from align.rewards.unit_tests import ExecutedTests, executed_tests_judge
from align.rewards.verdicts import GROUPS_AT_ONCE, Group, Judge, Verdict

T = TypeVar("T")
J = TypeVar("J", bound="Sequence[JudgeSettings]")
How = Literal["precedence", "weights"]


class JudgeSettings(Settings):
    """One judge of several."""

    name: str  # a row of JUDGES, or a user's own as module:make
    weight: float = 1.0  # of its reward in the sum, where judges are combined by weights
    settings: dict[str, Any] = Field(default_factory=dict[str, Any])

    def deciding(self) -> dict[str, Any]:
        """The settings, as JSON, without what says only how an engine runs."""
        found = self.model_dump(mode="json")
        if self.name == "llm" and "engine" in self.settings:
            found["settings"]["engine"] = build(LlmSettings, self.settings, ("settings",)).engine.deciding()
        return found

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        make = _maker(self.name, self.settings)
        if self.name in JUDGES and not JUDGES[self.name].reads:
            _at("settings", make)
        return self

    @field_validator("weight")
    @classmethod
    def _not_zero(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a weight of 0 would leave the judge without a say; leave the judge out")
        return weight


def judge_of(text: str) -> dict[str, Any]:
    """A judge as its settings from `NAME key=value …`."""
    try:
        name, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise InputError(f"judge {text!r}: {error}; a quotation mark is closed by another") from error
    given = read_overrides(words)
    weight = {"weight": given.pop("weight")} if "weight" in given else {}
    return {"name": name, **weight, "settings": given}


def make_judge(judges: Sequence[JudgeSettings], *, how: How = "precedence") -> Judge:
    """The judge that the settings describe; several become one."""
    if not judges:
        raise InputError("judges: at least one is needed")
    made = [(one.name, one.weight, _maker(one.name, one.settings)()) for one in each_once(judges)]
    if len(made) == 1 and (how == "precedence" or made[0][1] == 1):
        return made[0][2]
    return Precedence({name: judge for name, _, judge in made}) if how == "precedence" else Weighted(made)


def each_once(judges: J) -> J:
    """The judges, of which no two have one name."""
    names = [one.name for one in judges]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise InputError(f"judge {doubled[0]!r} stands there twice; each is named once")
    return judges


def _maker(name: str, settings: Mapping[str, Any]) -> Callable[[], Judge]:
    """What makes the judge of settings that are checked here, while no model is read yet."""
    if ":" not in name:
        kind = _at("name", lambda: pick(JUDGES, name, "judge"))
        made = build(kind.settings, settings, ("settings",))
        return partial(kind.make, made)
    make = _at("name", lambda: import_dotted(name, "judge"))
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters) or "none" if callable(make) else "none"
        raise InputError(f"settings: {error}; those of {name!r} are {known}") from error
    return partial(make, **settings)


def _at(key: str, find: Callable[[], T]) -> T:
    try:
        return find()
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


class Precedence:
    """For each prompt the first judge that knows anything of its responses; rewards of two judges never mix.

    As in the Nemotron-4 report (sec. 3.2.3): ground truth before a verifier before a model.
    """

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        self.judges = judges

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Verdicts of each group, with the judge that gave them under `judge` in `raw`."""
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            part = groups[start : start + GROUPS_AT_ONCE]
            found: dict[int, tuple[Verdict, ...]] = {}
            said: dict[int, list[str]] = {index: [] for index in range(len(part))}
            for name, judge in self.judges.items():
                waiting = [index for index in range(len(part)) if index not in found]
                for index, verdicts in zip(waiting, judge([part[index] for index in waiting]), strict=True):
                    if any(verdict.reward is not None for verdict in verdicts):
                        found[index] = tuple(_named(verdict, name) for verdict in verdicts)
                    else:
                        said[index].append(f"{name}: {verdicts[0].why}")
            for index, (_, responses) in enumerate(part):
                nobody = Verdict(None, why="no judge knows it: " + "; ".join(said[index]))
                yield found.get(index, (nobody,) * len(responses))


class Weighted:
    """The weighted sum of all judges' rewards; a response that one of them says nothing of gets none."""

    def __init__(self, judges: Sequence[tuple[str, float, Judge]]) -> None:
        self.judges = judges

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Verdicts of each group; `raw` has each judge's reward and its own raw verdict."""
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            part = groups[start : start + GROUPS_AT_ONCE]
            all_judges = [judge(part) for _, _, judge in self.judges]
            for verdicts_of_group in zip(*all_judges, strict=True):
                yield tuple(map(self._sum, zip(*verdicts_of_group, strict=True)))

    def _sum(self, verdicts: tuple[Verdict, ...]) -> Verdict:
        named = [(name, weight, verdict) for (name, weight, _), verdict in zip(self.judges, verdicts, strict=True)]
        raw = {name: {"reward": verdict.reward, "raw": verdict.raw} for name, _, verdict in named}
        attributes = {key: value for _, _, verdict in named for key, value in verdict.attributes.items()}
        known = [weight * verdict.reward for _, weight, verdict in named if verdict.reward is not None]
        if len(known) == len(named):
            return Verdict(sum(known), attributes, "; ".join(f"{name}: {one.why}" for name, _, one in named), raw)
        silent = next((name, verdict) for name, _, verdict in named if verdict.reward is None)
        return Verdict(None, attributes, f"{silent[0]} says nothing: {silent[1].why}", raw)


def _named(verdict: Verdict, judge: str) -> Verdict:
    return Verdict(verdict.reward, verdict.attributes, verdict.why, {"judge": judge, "raw": verdict.raw})


class Kind(NamedTuple):
    """One row of JUDGES."""

    settings: type[Settings]
    make: Callable[[Any], Judge]  # of the settings
    reads: bool = False  # a model, when it is made


JUDGES: dict[str, Kind] = {
    "ground_truth": Kind(GroundTruthSettings, GroundTruthJudge),
    "executed_tests": Kind(ExecutedTests, executed_tests_judge),
    "verifier": Kind(VerifierSettings, VerifierJudge),
    "reward_model": Kind(RewardModelSettings, RewardModelJudge, reads=True),
    "llm": Kind(LlmSettings, llm_judge, reads=True),
}
