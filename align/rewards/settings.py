"""Which judges rate responses: `JudgeSettings`, one judge of a recipe. Imports no torch.

A recipe names judges with their settings, and a weight where their rewards are added up:

    judges:
      - {name: verifier, settings: {reward: all}}
      - {name: "my_package.judges:make", weight: 0.5, settings: {scale: 2.0}}

A name is a row of `JUDGES`, or with a colon the dotted path of a user's own judge: a callable that takes `settings` as
keyword arguments and returns a `Judge` (see `align.rewards.verdicts`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Discriminator, Field, RootModel, Tag, field_validator, model_validator

from align.errors import InputError, RunError, one_line, within
from align.registry import UserCode, import_dotted, pick
from align.rewards.builtin_judges import (
    JUDGES,
    ExecutedTestsSpec,
    GroundTruthSpec,
    JudgeSpec,
    LlmSpec,
    RewardModelSpec,
    VerifierSpec,
)
from align.rewards.verdicts import Group, Judge, Verdict

J = TypeVar("J", bound="list[JudgeSettings]")
Combination = Literal["precedence", "weights"]


class CustomSpec(JudgeSpec):
    """Reward of a user's own judge."""

    name: str = Field(
        description="Custom judge: module:name of a callable that returns it.",
        json_schema_extra={"pattern": ":"},
    )
    settings: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="Keyword arguments of the callable that returns the judge."
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if ":" not in name:
            pick(JUDGES, name, "judge")
        import_dotted(name, "judge")
        return name

    @model_validator(mode="after")
    def _check_signature(self) -> Self:
        make = import_dotted(self.name, "judge")
        with within("settings"):
            if not callable(make):
                raise InputError(f"{self.name!r} is not callable")
            signature = inspect.signature(make)
            try:
                signature.bind(**self.settings)
            except TypeError as error:
                known = ", ".join(signature.parameters) or "none"
                raise InputError(f"{error}; the parameters of {self.name!r} are: {known}") from error
        return self


def _spec_name(value: Any) -> str:  # noqa: ANN401 - input that is not yet validated, or a spec
    """Return the name of the class of a judge's specification."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return JUDGES.get(str(name), CustomSpec).__name__


AnySpec = Annotated[
    Annotated[GroundTruthSpec, Tag("GroundTruthSpec")]
    | Annotated[ExecutedTestsSpec, Tag("ExecutedTestsSpec")]
    | Annotated[VerifierSpec, Tag("VerifierSpec")]
    | Annotated[RewardModelSpec, Tag("RewardModelSpec")]
    | Annotated[LlmSpec, Tag("LlmSpec")]
    | Annotated[CustomSpec, Tag("CustomSpec")],
    Discriminator(_spec_name),
]


class JudgeSettings(RootModel[AnySpec]):
    """One judge: a row of `JUDGES` or a user's own, with its weight and settings.

    >>> JudgeSettings(name="verifier", settings={"reward": "all"}).values["min_words"]
    0
    """

    model_config = ConfigDict(frozen=True)

    @property
    def name(self) -> str:
        """Name of the judge: a key of `JUDGES`, or module:name."""
        return self.root.name

    @property
    def weight(self) -> float:
        """Factor of the judge's reward in a weighted sum."""
        return self.root.weight

    @property
    def values(self) -> dict[str, Any]:
        """Settings of the judge as JSON, with defaults."""
        return self.root.model_dump(mode="json")["settings"]

    def with_values(self, values: Mapping[str, Any]) -> JudgeSettings:
        """Return this judge with other settings."""
        return JudgeSettings.model_validate({"name": self.name, "weight": self.weight, "settings": dict(values)})

    def cache_key(self) -> dict[str, Any]:
        """Return everything that decides a verdict, as JSON: not how many workers or which server computes it."""
        settings = self.root.settings
        key = settings if isinstance(settings, dict) else settings.cache_key()
        return {"name": self.name, "weight": self.weight, "settings": key}

    def make(self) -> Judge:
        """Return the judge."""
        if isinstance(self.root, CustomSpec):
            return CustomJudge(self.name, self.root.settings)
        return import_dotted(self.root.maker, "judge")(self.root.settings)


class CustomJudge:
    """A user's own judge, with its exceptions and verdicts checked."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self._code = UserCode("judge", name)
        self._judge: Judge = self._code.call(import_dotted(name, "judge"), **settings)

    def __call__(self, groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        """Yield the verdicts of each group; raise `RunError` where they are of another form."""
        judged = self._code.iterate(self._code.call(self._judge, groups))
        for group, verdicts in zip_longest(groups, judged):
            responses = [] if group is None else group[1]
            given: list[Any] = list(self._code.iterate(verdicts or ()))
            if len(given) != len(responses) or not all(isinstance(verdict, Verdict) for verdict in given):
                raise RunError(
                    f"judge {self._code.path!r} must yield for each group one Verdict per response, in a tuple; "
                    f"for {len(responses)} responses it yields {one_line(repr(given))[:80]}"
                )
            for verdict in given:
                try:
                    json.dumps(asdict(verdict), allow_nan=False)
                except (TypeError, ValueError, RecursionError) as error:
                    raise RunError(
                        f"judge {self._code.path!r} must yield verdicts of JSON values and finite numbers; it yields "
                        f"{one_line(repr(verdict))[:80]}: {one_line(error)}"
                    ) from error
            yield tuple(given)


def unique_judges(judges: J) -> J:
    """Return the judges; raise where two have the same name."""
    names = [judge.name for judge in judges]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise InputError(f"judge {doubled[0]!r} is listed twice")
    return judges
