"""Stage `preference`: DPO, RPO and other preference losses, in one step or in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.content_hash import code_of
from align.data.rejections import Rejections
from align.errors import ErrorList, InputError, within
from align.losses.table import preference_loss
from align.records import Record
from align.stages.base import POLICY, Placed, Stage, latest_policy
from align.stages.generate import Generate
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.opening import lack_of_preference
from align.stages.inputs.sources import SourceSettings
from align.stages.responses.settings import GenerationSettings, RoundGeneration
from align.stages.training.contract import Groups
from align.stages.training.stage import TrainingStage
from align.train.settings import PreferenceSettings


class Preference(TrainingStage):
    """Preference optimization of a policy against itself as it enters the step, once or in rounds."""

    stage: Literal["preference"] = "preference"
    data: str | list[str] = Field(
        description="Name under `data`, or a step that makes groups; sources of prompts where on_policy is true."
    )
    min_chosen: float | None = Field(
        default=None, description="Least reward of the best response; rows below it are dropped and counted."
    )
    loss: PreferenceSettings = Field(
        default=PreferenceSettings(), description="Preference loss and weight of the SFT term."
    )
    rounds: int = Field(
        default=1, ge=1, description="Number of rounds, each starting from and referring to the policy of the last."
    )
    on_policy: bool = Field(
        default=False, description="Whether each round's policy first answers its own part of the prompts in `data`."
    )
    generate: RoundGeneration | None = Field(
        default=None, description="How on-policy rounds sample and judge; as in the stage generate."
    )

    makes: ClassVar[str] = POLICY

    def made(self, name: str) -> list[str]:
        """Return the name of each round's policy."""
        return [f"{name}-{number}" for number in range(1, self.rounds + 1)] if self.rounds > 1 else [name]

    def expand(self, name: str, before: Mapping[str, Stage], policies: Sequence[str]) -> list[Placed]:
        """Return each round, from the policy of the round before, after the samples that it trains on."""
        if self.generate is not None and not self.on_policy:
            raise InputError(
                "is for on_policy: true; without it every round trains on the rows of `data`", ("generate",)
            )
        if not self.on_policy and not isinstance(self.data, str):
            raise InputError("several sources are for prompts, with on_policy: true", ("data",))
        policy = self.policy or latest_policy(before)
        if self.on_policy and policy is None:
            raise InputError("no step before this one makes a policy that could answer", ("on_policy",))
        found: list[Placed] = []
        for number, round_name in enumerate(self.made(name)):
            changes: dict[str, Any] = {"policy": policy, "rounds": 1, "on_policy": False, "generate": None}
            if self.on_policy:
                assert policy is not None
                samples = f"{round_name}-samples"
                found.append(Placed(samples, self._samples(policy, number), ("generate",)))
                changes["data"] = samples
            found.append(Placed(round_name, self.model_copy(update=changes)))
            policy = round_name
        return found

    def _samples(self, policy: str, number: int) -> Generate:
        if self.generate is None:
            raise InputError("required with on_policy: true; it sets how rounds sample and judge", ("generate",))
        own = {name: getattr(self.generate, name) for name in GenerationSettings.model_fields}
        return Generate(**own, launch=self.generate.launch, policies=[policy], data=self.data, round=number)

    def shares(self) -> dict[str, float]:
        """Return the rows of the step."""
        return dict.fromkeys([self.data] if isinstance(self.data, str) else self.data, 1.0)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with its reference."""
        return preference_loss(self.loss.name, **self.loss.settings).uses_reference

    def filter_groups(
        self, groups: Groups, rejections: Rejections, *, attributes: Sequence[str], source: SourceSettings
    ) -> Groups:
        """Return the groups with a preference, and with rewards where the loss needs them."""
        from align.train.filters import comparable, distinct  # noqa: PLC0415 - imports torch

        loss = preference_loss(self.loss.name, **self.loss.settings)
        name = self.loss.name if loss.uses_rewards else None
        different = distinct(groups, rejections.counts, identical=source.identical)
        return comparable(different, rejections, reward_loss=name, min_chosen=self.min_chosen)

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the policy, with the code of a user's own loss."""
        return [*super().cache_key(inputs), code_of(self.loss.name)]

    def lack(self, record: Record) -> str | None:
        """Return why a comparison has no preference, or no rewards where the loss needs them."""
        loss = preference_loss(self.loss.name, **self.loss.settings)
        return lack_of_preference(record, needs_rewards=loss.uses_rewards)

    def validate_settings(self) -> None:
        """Raise also for an unknown loss, or for settings that it does not have."""
        errors = ErrorList()
        with errors.collect():
            super().validate_settings()
        with errors.collect(), within("loss"):
            preference_loss(self.loss.name, **self.loss.settings)
        errors.raise_found()

    def run(self, context: RunContext) -> dict[str, Any]:
        """Train the policy and write it as a plain Hugging Face folder."""
        from align.stages.training.policy_training import prepare  # noqa: PLC0415 - imports torch
        from align.train.objectives.preference import PreferenceObjective  # noqa: PLC0415

        training = prepare(self, PreferenceObjective(self.loss), context)
        return training.save(context.folder, training.loop.run())
