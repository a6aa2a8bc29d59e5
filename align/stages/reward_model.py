"""Stage `reward_model`: an attribute regression or Bradley-Terry reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from align.data.rejections import Rejections
from align.errors import ErrorList
from align.models.settings import HELPSTEER, HeadSettings, Rating, check_adapters, resolve_rating
from align.records import Comparison, Record
from align.stages.base import POLICY, REWARD_MODEL
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.opening import lack_of_preference
from align.stages.inputs.sources import SourceSettings
from align.stages.training.contract import Groups
from align.stages.training.stage import TrainingStage
from align.train.settings import RewardLoss

if TYPE_CHECKING:
    from align.stages.inputs.context import ModelSpec


class RewardModel(TrainingStage):
    """Train a reward model on responses with rated attributes, or on preference pairs."""

    stage: Literal["reward_model"] = Field(default="reward_model", description="Train a reward model.")
    data: str = Field(description="Name under `data`, or a step that makes groups.")
    loss: RewardLoss = Field(
        default="regression", description="Regression of attributes, or Bradley-Terry: plain, with margin, or scaled."
    )
    head: HeadSettings = Field(default=HeadSettings(), description="Attributes of the reward and how the head learns.")
    subset: str | None = Field(
        default=None, description="Metadata key; the report also shows the pair accuracy for each of its values."
    )

    makes: ClassVar[str] = REWARD_MODEL

    @property
    def start_kinds(self) -> tuple[str, ...]:
        """A policy, or a reward model whose head is kept."""
        return (POLICY, REWARD_MODEL)

    @property
    def default_attributes(self) -> tuple[str, ...]:
        """Attributes of a new head for which the settings name none."""
        return HELPSTEER if self.loss == "regression" else ("reward",)

    def shares(self) -> dict[str, float]:
        """Return the rows of the step."""
        return {self.data: 1.0}

    @property
    def has_lm_head(self) -> bool:
        """A reward model has a head of one vector for each attribute instead."""
        return False

    def attributes(self, spec: ModelSpec) -> tuple[str, ...]:
        """Return the attributes that the model rates."""
        return self.rating(spec).names

    def filter_groups(
        self, groups: Groups, rejections: Rejections, *, attributes: Sequence[str], source: SourceSettings
    ) -> Groups:
        """Return the groups with a label, for regression, or with a preferred response."""
        from align.train.filters import distinct, labelled, with_pairs  # noqa: PLC0415 - imports torch

        if self.loss == "regression":
            return labelled(groups, rejections.counts, attributes=attributes, path=source.path)
        different = distinct(groups, rejections.counts, identical=source.identical)
        return with_pairs(different, rejections, loss=self.loss)

    def lack(self, record: Record) -> str | None:
        """Return why a comparison has no label that the loss needs."""
        if self.loss != "regression":
            return lack_of_preference(record, needs_rewards=self.loss != "bt")
        has_label = isinstance(record, Comparison) and any(response.attributes for response in record.responses)
        names = ", ".join(self.head.attributes or self.default_attributes)
        return None if has_label else f"no response has an attribute, and loss: regression needs {names}"

    def needs_held_out(self) -> dict[tuple[str, ...], Any]:
        """Return `subset`: the report is about held-out rows."""
        return {("subset",): self.subset}

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise also for a head that cannot be trained, or for attributes without distinct names."""
        errors = ErrorList()
        with errors.collect():
            check_adapters(inputs.policy, self.head)
        if self.head.attributes is not None:
            with errors.collect():
                resolve_rating(self.head, None, default=())
        with errors.collect():
            super().validate_inputs(inputs)
        errors.raise_found()

    def model(self, before: ModelSpec) -> ModelSpec:
        """Return the reward model, given the model that the step starts from."""
        return before._replace(rating=self.rating(before))

    def rating(self, before: ModelSpec) -> Rating:
        """Return what the trained model will rate, given the model that the step starts from."""
        from align.models.reward_model import load_rating  # noqa: PLC0415 - imports torch

        saved = before.rating or (load_rating(before.settings.path) if self.policy is None else None)
        return resolve_rating(self.head, saved, default=self.default_attributes)

    def run(self, context: RunContext) -> dict[str, Any]:
        """Train the reward model, report on held-out rows, and write it as a plain Hugging Face folder."""
        from align.stages.training.reward_training import train_reward_model  # noqa: PLC0415 - imports torch

        return train_reward_model(self, context)
