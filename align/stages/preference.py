"""Stage `preference`: DPO, RPO and other preference losses, in one step or in rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.content_hash import code_of
from align.data.rejections import Rejections
from align.errors import ErrorList, InputError, within
from align.losses.table import Loss, preference_loss
from align.losses.unpaired import UnpairedLoss, lack_of_labels
from align.records import Comparison, Record
from align.stages.base import POLICY, Placed, Stage
from align.stages.generate import Generate
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.opening import lack_of_preference
from align.stages.inputs.sources import SourceSettings
from align.stages.responses.settings import RoundGeneration
from align.stages.training.contract import Groups
from align.stages.training.stage import TrainingStage
from align.stages.training.uniform import with_uniform
from align.train.objectives.settings import MIN_KL_PROMPTS, NO_SFT_TERM, TOO_FEW_PROMPTS, PreferenceSettings


class Preference(TrainingStage):
    """Preference optimization. The reference is the policy at the start of the step, or of the round."""

    stage: Literal["preference"] = Field(default="preference", description="Train a policy on preferences.")
    data: str | list[str] = Field(
        description="Name under `data`, or a step that makes groups; sources of prompts where on_policy is true."
    )
    min_chosen: float | None = Field(default=None, description="Drop and count groups whose best reward is below this.")
    loss: PreferenceSettings = Field(
        default=PreferenceSettings(), description="Preference loss and weight of the SFT term."
    )
    rounds: int = Field(
        default=1,
        ge=1,
        description="Number of rounds; each starts from the policy of the round before, which is also its reference.",
    )
    on_policy: bool = Field(
        default=False,
        description="Sample responses from the current policy at the start of each round, to new prompts of `data`.",
    )
    generate: RoundGeneration | None = Field(
        default=None, description="How on-policy rounds sample and judge; as in the stage generate."
    )

    makes: ClassVar[str] = POLICY
    can_split_rows: ClassVar[bool] = True

    def made(self, name: str) -> list[str]:
        """Return the name of each round's policy, after those of the uniform runs that it is compared with."""
        return [made for each in self._rounds(name) for made in super(Preference, self).made(each)]

    def _rounds(self, name: str) -> list[str]:
        return [f"{name}-{number}" for number in range(1, self.rounds + 1)] if self.rounds > 1 else [name]

    def expand(self, name: str, before: Mapping[str, Stage], policies: Sequence[str]) -> list[Placed]:
        """Return each round, from the policy of the round before, after the samples that it trains on."""
        if self.generate is not None and not self.on_policy:
            raise InputError(
                "requires on_policy: true; without it every round trains on the rows of `data`", ("generate",)
            )
        if not self.on_policy and not isinstance(self.data, str):
            raise InputError("several sources are supported with on_policy: true only; give one source", ("data",))
        if self.resume is not None and (self.rounds > 1 or self.on_policy):
            raise InputError("a step of several rounds, or on-policy, trains its own rounds; leave it out", ("resume",))
        policy = self.resolve(before).policy
        if self.on_policy and policy is None:
            raise InputError("no step before this one makes a policy that could answer", ("on_policy",))
        found: list[Placed] = []
        for number, round_name in enumerate(self._rounds(name)):
            changes: dict[str, Any] = {"policy": policy, "rounds": 1, "on_policy": False, "generate": None}
            if self.on_policy:
                assert policy is not None
                samples = f"{round_name}-samples"
                found.append(Placed(samples, self._samples(policy, number), ("generate",)))
                changes["data"] = samples
            step = self.model_copy(update=changes)
            step.check_resumed(before)
            found += with_uniform(round_name, step, before)
            policy = round_name
        return found

    def _samples(self, policy: str, number: int) -> Generate:
        if self.generate is None:
            raise InputError("required with on_policy: true; it sets how rounds sample and judge", ("generate",))
        own = {name: getattr(self.generate, name) for name in RoundGeneration.model_fields}
        return Generate(**own, policies=[policy], data=self.data, round=number)

    def shares(self) -> dict[str, float]:
        """Return the rows of the step."""
        return dict.fromkeys([self.data] if isinstance(self.data, str) else self.data, 1.0)

    def _loss(self) -> Loss:
        return preference_loss(self.loss.name, **self.loss.settings)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with its reference."""
        return self._loss().uses_reference

    @property
    def needs_kl(self) -> bool:
        """Whether the loss needs an estimate of the KL divergence from the reference before every step."""
        loss = self._loss()
        return isinstance(loss, UnpairedLoss) and loss.uses_kl

    def filter_groups(
        self, groups: Groups, rejections: Rejections, *, attributes: Sequence[str], source: SourceSettings
    ) -> Groups:
        """Return the groups with a preference or with labels, and with rewards where the loss needs them."""
        from align.train.filters import comparable, distinct, with_labels  # noqa: PLC0415 - imports torch

        loss = self._loss()
        different = distinct(groups, rejections.counts, identical=source.identical)
        if isinstance(loss, UnpairedLoss):
            return with_labels(different, rejections, loss=self.loss.name)
        name = self.loss.name if loss.uses_rewards else None
        return comparable(different, rejections, reward_loss=name, min_chosen=self.min_chosen)

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the policy, with the code of a user's own loss."""
        return [*super().cache_key(inputs), code_of(self.loss.name)]

    def lack(self, record: Record) -> str | None:
        """Return why a comparison has no preference or no labels, or no rewards where the loss needs them."""
        loss = self._loss()
        if isinstance(loss, UnpairedLoss):
            assert isinstance(record, Comparison)
            rewards = [response.reward for response in record.responses if response.reward is not None]
            is_labelled = record.chosen is not None and not rewards  # the label stands for rewards of 1 and 0
            return None if is_labelled else lack_of_labels(rewards or None, self.loss.name)
        return lack_of_preference(record, needs_rewards=loss.uses_rewards)

    def validate_settings(self) -> None:
        """Raise also for an unknown loss, or for settings that it does not have."""
        errors = ErrorList()
        with errors.collect():
            super().validate_settings()
        with errors.collect():
            with within("loss"):
                loss = self._loss()
            if isinstance(loss, UnpairedLoss):
                errors.found += self._without_effect(loss)
        errors.raise_found()

    def _without_effect(self, loss: UnpairedLoss) -> Iterator[InputError]:
        """Yield an error for each setting that a loss on labels does not have or cannot work with."""
        if self.loss.sft_weight:
            yield InputError(NO_SFT_TERM, ("loss", "sft_weight"))
        if self.min_chosen is not None:
            yield InputError(f"is for losses that compare responses, and {self.loss.name} does not", ("min_chosen",))
        if loss.uses_kl and self.train.prompts_per_step < MIN_KL_PROMPTS:
            yield InputError(TOO_FEW_PROMPTS, ("train", "prompts_per_step"))

    def run(self, context: RunContext) -> dict[str, Any]:
        """Train the policy and write it as a plain Hugging Face folder."""
        from align.stages.training.policy_training import prepare  # noqa: PLC0415 - imports torch
        from align.train.objectives.preference import PreferenceObjective  # noqa: PLC0415

        training = prepare(self, PreferenceObjective(self.loss), context)
        return training.save(context.folder, training.loop.run())
