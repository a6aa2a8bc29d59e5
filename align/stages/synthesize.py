"""Stage `synthesize`: prompts, demonstrations and pairs that a teacher makes, from topics and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from align.content_hash import code_of
from align.distributed.launch import check_launch
from align.errors import InputError, Location, within
from align.registry import pick
from align.stages.base import POLICY, SOURCE, SYNTHETIC, Input, Stage, UsedEngine, latest_policy
from align.stages.costs.estimates import Estimate, Planning, estimate_answers
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.sources import check_unsplit
from align.stages.responses.settings import judge_engines, judge_inputs, judge_key, judge_models, local_precision
from align.stages.responses.synthesis_settings import SynthesisSettings
from align.synth.families.family import Calls
from align.synth.order import check_families, planned_calls, written
from align.synth.parsing import PARSERS

MILLION = 1e6
PARTS = ("prompt_tokens", "response_tokens")  # of `Calls`


class Synthesize(SynthesisSettings, Stage):
    """Prompts, demonstrations and pairs that a teacher makes, from topics and seeds."""

    stage: Literal["synthesize"] = "synthesize"
    makes: ClassVar[str] = SYNTHETIC

    @property
    def asked(self) -> list[str]:
        """The steps and models that are asked."""
        return [*self.policies, *self.models]

    @property
    def start(self) -> str | None:
        """The first of the policies that are asked."""
        return self.policies[0] if self.policies else None

    def resolve(self, before: Mapping[str, Stage]) -> Self:
        """Return the step with the policy that is asked."""
        latest = latest_policy(before)
        if self.asked or latest is None:
            return self
        return self.model_copy(update={"policies": [latest]})

    def inputs(self) -> list[Input]:
        """Return the policies that are asked, the sources that entries read, and the judges' models."""
        entries = tuple(self.families)
        return [
            *(Input(name, (POLICY,), ("policies",)) for name in self.policies),
            *(Input(name, (SOURCE,), ("families", entry, "of"), entries) for name, entry in self._readers().items()),
            *judge_inputs(self.judges),
        ]

    def _readers(self) -> dict[str, str]:
        """Return the first entry that reads each source."""
        return {name: next(key for key, each in self.families.items() if name in each.parents) for name in self.sources}

    def shares(self) -> dict[str, float]:
        """Return the sources that entries read."""
        return dict.fromkeys(self.sources, 1.0)

    def files(self) -> list[str]:
        """Return the files of rows, one for each split and kind."""
        return self.row_files()

    def named_files(self) -> list[tuple[str, Location]]:
        """Return the files that families name."""
        named = [(file, ("families", name)) for name, family in self.families.items() for file in family.files()]
        return [*super().named_files(), *named]

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the models that are loaded here, and those of judges."""
        own = [(name, ("models", number)) for number, name in enumerate(self.models) if self.engine.loads_model]
        return [*own, *judge_models(self.judges)]

    def engines(self) -> list[UsedEngine]:
        """Return the engine of the teachers, and those of judges."""
        return [UsedEngine(self.engine, ("engine",), self.policies, self.models), *judge_engines(self.judges)]

    def validate_settings(self) -> None:
        """Raise for families that cannot be made."""
        check_launch(self.launch)
        if not written(self.families):
            raise InputError("no entry is written as rows: none makes prompts, demonstrations or pairs", ("families",))
        for name, family in self.families.items():
            if family.needs_local and self.engine.kind != "local":
                raise InputError(f"{family.family} needs the engine local, not {self.engine.kind}", ("families", name))
            if family.needs_judges and not self.judges:
                raise InputError(f"{family.family} filters by a reward: name judges of the step", ("families", name))

    @property
    def _has_local_policy(self) -> bool:
        return bool(self.policies) and self.engine.kind == "local"

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise if there is no model to ask, or if an entry reads items of a kind that it cannot use."""
        if not self.asked:
            raise InputError(
                "no step before this one makes a policy: name one here, or a model under models", ("policies",)
            )
        if self.embeddings == "policy" and not self._has_local_policy:
            raise InputError("only a policy that runs in this process gives embeddings; use words", ("embeddings",))
        if self.difficulty and not self._has_local_policy:
            raise InputError("only a policy that runs in this process gives likelihoods; remove it", ("difficulty",))
        with within("families"):
            check_families(self.families, list(inputs.sources))
            for name, family in self.families.items():
                for key, model in family.asked_models().items():
                    with within(name, key):
                        pick({each: each for each in self.asked}, model, "model of the step")
        for name, source in inputs.sources.items():
            loc = ("families", self._readers()[name], "of")
            if source.limit is None and source.is_procedural:
                raise InputError(f"{name} is unlimited; set limit", loc)
            if source.constraints is not None:
                raise InputError(f"{name} has constraints: leave them out, and use the family instructions", loc)
            check_unsplit(name, source, loc)

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the rows."""
        judges = [judge.cache_key() for judge in self.judges]
        settings = {key: value for key, value in super().decisive().items() if key != "price"}
        return {**settings, "engine": self.engine.cache_key(), "judges": judges, "parsers": PARSERS}

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the rows, with the content of models, templates and code."""
        files = [file for family in self.families.values() for file in family.files()]
        named = [*self.models, *self.engine.contents, *files]
        code = [code_of(family.family) for family in self.families.values()]
        return [*super().cache_key(inputs), *map(inputs.content, named), *code, *judge_key(self.judges, inputs)]

    def estimate(self, planning: Planning) -> Estimate:
        """Return an upper bound: every wanted item at the first try, and all answers as long as they may be."""
        from align.stages.responses.synthesis import num_rows  # noqa: PLC0415 - imports torch

        rows = {
            name: planning.made[name].rows if name in planning.made else num_rows(source, planning.inputs.seed)
            for name, source in planning.inputs.sources.items()
        }
        calls = planned_calls(self.families, rows, self.sampling.max_new_tokens)
        prompt, response = (sum(getattr(each, part) for each in calls.values()) for part in PARTS)
        requests = sum(each.requests for each in calls.values())
        unknown = "" if self.engine.kind == "local" and not self.models else "the recipe does not make the models"
        precision = local_precision(self.engine)
        total = estimate_answers(self.stage, planning, requests, prompt, response, precision=precision, unknown=unknown)
        lines = {name: self._line(each, total) for name, each in calls.items()}
        num_items = sum(calls[name].items for name in written(self.families))
        return replace(total, rows=num_items, parts=lines)

    def _line(self, calls: Calls, total: Estimate) -> str:
        """Return what an entry takes, as text."""
        tokens = calls.prompt_tokens + calls.response_tokens
        parts = [
            f"at most {calls.items:,} items",
            f"{calls.requests:,} requests",
            f"{calls.prompt_tokens:,} + at most {calls.response_tokens:,} tokens",
        ]
        if total.seconds and total.tokens:
            parts.append(f"{total.seconds * tokens / total.tokens / 60:.1f} minutes")
        if self.price is not None:
            money = calls.prompt_tokens * self.price.prompt + calls.response_tokens * self.price.response
            parts.append(f"price at most {money / MILLION:,.2f}")
        return ", ".join(parts)

    def run(self, context: RunContext) -> dict[str, Any]:
        """Make and write the rows; a killed step resumes at the next request."""
        from align.stages.responses.synthesis import synthesize  # noqa: PLC0415 - imports torch

        return synthesize(self, context)
