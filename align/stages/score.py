"""Stage `score`: judge the responses of given rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.distributed.launch import check_launch
from align.errors import Location
from align.rewards.settings import Combination
from align.rewards.thoughts import THINK, ThoughtSettings
from align.stages.base import GROUPS, SOURCE, Input, Stage, UsedEngine
from align.stages.costs.estimates import Estimate, Planning, estimate_answers
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.sources import SourceSettings, check_without_constraints
from align.stages.responses.settings import (
    Judges,
    groups_source,
    judge_engines,
    judge_inputs,
    judge_key,
    judge_models,
)
from align.synth.settings import GroupSettings


class Score(Stage):
    """Rate existing responses with judges; the step runs again when a judge changes."""

    stage: Literal["score"] = Field(default="score", description="Judge existing responses.")
    data: str = Field(description="Name under `data`, or a step that makes groups.")
    judges: Judges = Field(min_length=1, description="Judges that rate the responses.")
    combine: Combination = Field(
        default="precedence", description="Several judges: the first that does not abstain, or a weighted sum."
    )
    thoughts: ThoughtSettings = Field(default=THINK, description="Delimiters of reasoning, which judges do not see.")
    groups: GroupSettings = Field(default=GroupSettings(), description="Which responses become a group to train on.")
    every_row: bool = Field(
        default=False,
        description="Write each row as it was read with its new rewards, ties and single responses included.",
    )
    held_out: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the prompts that training on the groups keeps for evaluation."
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Most tokens of a response with its prompt, in training."
    )

    makes: ClassVar[str] = GROUPS

    def inputs(self) -> list[Input]:
        """Return the rows, and the judges' models."""
        return [Input(self.data, (SOURCE, GROUPS), ("data",)), *judge_inputs(self.judges)]

    def shares(self) -> dict[str, float]:
        """Return the rows of the step."""
        return {self.data: 1.0}

    def rows(self, folder: Path) -> SourceSettings | None:
        """Return the groups."""
        return groups_source(folder, held_out=self.held_out, max_length=self.max_length)

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise for rows whose responses know nothing of the constraints."""
        check_launch(self.launch)
        for name, source in inputs.sources.items():
            check_without_constraints(name, source.constraints is not None, ("data",))

    def named_models(self) -> list[tuple[str, Location]]:
        """Return the models of judges."""
        return judge_models(self.judges)

    def engines(self) -> list[UsedEngine]:
        """Return the engines of judges."""
        return judge_engines(self.judges)

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the groups."""
        return {**super().decisive(), "judges": [judge.cache_key() for judge in self.judges]}

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the groups, with the content of what judges are made of."""
        return [*super().cache_key(inputs), *judge_key(self.judges, inputs)]

    def estimate(self, planning: Planning) -> Estimate:
        """Return the tokens of the rows; an upper bound where an earlier step makes them."""
        if (made := planning.made.get(self.data)) is not None:
            return estimate_answers(self.stage, planning, made.rows, made.tokens, 0, precision="bf16")
        from align.models.tree.batch import count_tokens  # noqa: PLC0415
        from align.stages.responses.tasks import likelihood_rows  # noqa: PLC0415 - imports torch

        groups, _ = likelihood_rows(self.data, planning.inputs, planning.tokenizer, model_limit=None)
        tokens = sum(count_tokens(group.sequences) for group in groups)
        return estimate_answers(self.stage, planning, len(groups), tokens, 0, precision="bf16")

    def run(self, context: RunContext) -> dict[str, Any]:
        """Judge the responses and write the groups; a killed step resumes at the next verdict."""
        from align.stages.responses.generation import score_every_row, score_rows  # noqa: PLC0415 - imports torch

        score = score_every_row if self.every_row else score_rows
        return score(self.data, self, context)
