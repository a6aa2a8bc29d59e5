"""Stage `generate`: responses of policies to prompts, judged, as scored groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from align.distributed.launch import check_launch
from align.errors import InputError, Location, within
from align.inference.settings import LocalSettings
from align.records import Prompt
from align.registry import pick
from align.stages.base import GROUPS, POLICY, SOURCE, Input, Stage, UsedEngine, latest_policy
from align.stages.costs.estimates import Estimate, Planning, estimate_answers, prompt_tokens
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.sources import SourceSettings, check_unsplit, prompts, rows_of
from align.stages.responses.settings import (
    GenerationSettings,
    groups_source,
    judge_engines,
    judge_inputs,
    judge_key,
    judge_models,
    local_precision,
)
from align.synth.group_statistics import GroupStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Generate(GenerationSettings, Stage):
    """Responses of policies to prompts, judged, as scored groups."""

    stage: Literal["generate"] = Field(default="generate", description="Sample responses and judge them.")
    policies: list[str] = Field(
        default_factory=list[str],
        description="Steps whose policies respond; the last policy before this step if `models` is empty, too.",
    )
    data: str | list[str] = Field(description="Sources of prompts.")
    round: int = Field(
        default=0,
        ge=0,
        description="Zero-based round; skips `round` times `prompts` prompts of each source.",
    )

    makes: ClassVar[str] = GROUPS

    @property
    def sources(self) -> list[str]:
        """Names of the sources of prompts."""
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def start(self) -> str | None:
        """The first of the policies that answer."""
        return self.policies[0] if self.policies else None

    def resolve(self, before: Mapping[str, Stage]) -> Self:
        """Return the step with the policy that answers."""
        latest = latest_policy(before)
        if self.policies or self.models or latest is None:
            return self
        return self.model_copy(update={"policies": [latest]})

    def inputs(self) -> list[Input]:
        """Return the policies that answer, the prompts, and the judges' models."""
        return [
            *(Input(name, (POLICY,), ("policies",)) for name in self.policies),
            *(Input(name, (SOURCE,), ("data",)) for name in self.sources),
            *judge_inputs(self.judges),
        ]

    def shares(self) -> dict[str, float]:
        """Return the sources of prompts."""
        return dict.fromkeys(self.sources, 1.0)

    def rows(self, folder: Path) -> SourceSettings | None:
        """Return the groups."""
        return groups_source(folder, held_out=self.held_out, max_length=self.max_length)

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise if the step has no policy, or if it is not clear which prompts are answered."""
        check_launch(self.launch)
        if not self.policies and not self.models:
            raise InputError(
                "no step before this one makes a policy: name one here, or a model under models", ("policies",)
            )
        with within("prompts"):
            for source in self.prompts or {}:
                pick({name: name for name in self.sources}, source, "source of its prompts")
        if self.round and (self.prompts is None or set(self.prompts) != set(self.sources)):
            raise InputError("a round needs the number of prompts that it takes of each source", ("prompts",))
        for name, source in inputs.sources.items():
            if source.limit is None and source.is_procedural and not self.prompts:
                raise InputError(f"{name} is unlimited; set its limit, or prompts: {{{name}: NUMBER}}", ("data",))
            check_unsplit(name, source, ("data",))

    def open_rows(self, name: str, source: SourceSettings) -> None:
        """Read the first rows; procedural ones may end with the number of prompts that the step takes."""
        if not source.is_procedural:
            super().open_rows(name, source)

    def check_template(self, name: str, source: SourceSettings, load: Callable[[], PreTrainedTokenizerBase]) -> None:
        """Raise for one of the first prompts that the chat template of the policy cannot render."""
        local = self.engine.local or LocalSettings()
        is_policys = self.engine.kind == "local" and local.tokenizer is None and local.chat_template is None
        if self.policies and is_policys:
            from align.stages.inputs.rendering import check_template  # noqa: PLC0415 - imports transformers

            check_template(name, source, load(), prompts=True)

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the models that are loaded here, and those of judges."""
        own = [(name, ("models", number)) for number, name in enumerate(self.models) if self.engine.loads_model]
        return [*own, *judge_models(self.judges)]

    def engines(self) -> list[UsedEngine]:
        """Return the engine of the policies, and those of judges."""
        return [UsedEngine(self.engine, ("engine",), self.policies, self.models), *judge_engines(self.judges)]

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the groups."""
        judges = [judge.cache_key() for judge in self.judges]
        return {**super().decisive(), "engine": self.engine.cache_key(), "judges": judges}

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the groups, with the content of models and of what judges are made of."""
        models = [inputs.content(name) for name in [*self.models, *self.engine.contents]]
        return [*super().cache_key(inputs), *models, *judge_key(self.judges, inputs)]

    def asked(
        self,
        inputs: StepInputs,
        counts: Counter[str] | None = None,
        check: Callable[[Prompt], None] | None = None,
    ) -> list[Prompt]:
        """Return the prompts of the step's round; `counts` receives the rows that were left out, by reason.

        `check` raises `InputError` for a prompt that cannot be asked.
        """
        found: list[Prompt] = []
        for name in self.sources:
            source = inputs.sources[name]
            number = (self.prompts or {}).get(name)
            if number is None:
                with rows_of(name):
                    found += prompts(source, seed=inputs.seed, counts=counts, check=check)
                continue
            first, last = self.round * number, (self.round + 1) * number
            if source.limit is None and source.constraints is None and (source.on_error == "error" or check is None):
                source = source.model_copy(update={"limit": last})
            with rows_of(name):
                known = prompts(source, seed=inputs.seed, counts=counts, check=check)
            if len(known) < last:
                raise InputError(
                    f"round {self.round + 1} takes prompts {first + 1} to {last}, and {name} has {len(known)}",
                    ("data", name),
                )
            found += known[first:last]
        inputs.check_unchanged(*(inputs.sources[name] for name in self.sources))
        return found

    def _skips_rows(self, inputs: StepInputs) -> bool:
        """Return whether rows with an error are skipped, which takes a check of every prompt."""
        return any(inputs.sources[name].on_error == "skip" for name in self.sources)

    @property
    def _responses_per_prompt(self) -> int:
        return self.sampling.num_responses * len([*self.policies, *self.models])

    def estimate(self, planning: Planning) -> Estimate:
        """Return an upper bound: all responses as long as they may be."""
        from align.data.chat_encoder import ChatEncoder  # noqa: PLC0415 - imports transformers

        made = [planning.made[name] for name in self.sources if name in planning.made]
        rows, tokens = sum(each.rows for each in made), sum(each.tokens for each in made)
        if given := [name for name in self.sources if name not in planning.made]:
            own = self.model_copy(update={"data": given})
            check = ChatEncoder(planning.tokenizer).check_prompt if own._skips_rows(planning.inputs) else None
            asked = own.asked(planning.inputs, check=check)
            rows, tokens = rows + len(asked), tokens + prompt_tokens(asked, planning.tokenizer)
        drawn = rows * self._responses_per_prompt * self.sampling.max_new_tokens
        return estimate_answers(self.stage, planning, rows, tokens, drawn, precision=local_precision(self.engine))

    def run(self, context: RunContext) -> dict[str, Any]:
        """Sample, judge and write the groups; a killed step resumes at the next sample."""
        from align.stages.responses.generation import generate_groups  # noqa: PLC0415 - imports torch
        from align.stages.responses.sampling import prompt_check  # noqa: PLC0415

        inputs = context.inputs
        folders = {inputs.sampled_name(name): str(inputs.folders[name]) for name in self.policies}
        statistics = GroupStatistics()
        answering = [*folders.values(), *self.models]
        check = prompt_check(answering, self.engine) if self._skips_rows(context.inputs) else None
        asked = self.asked(context.inputs, statistics.counts, check)
        return generate_groups(self, folders, asked, context, statistics)
