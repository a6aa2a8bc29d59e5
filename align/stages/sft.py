"""Stage `sft`: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from align.config import Settings
from align.data.mixing import Mixture, StoppingStrategy, shares_of
from align.errors import InputError, within
from align.records import Comparison, Demonstration, Record
from align.registry import pick
from align.stages.base import POLICY, Stage
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.inputs.opening import lack_of_preference
from align.stages.training.stage import TrainingStage


class ReplaySettings(Settings):
    """Rows of an earlier supervised step, mixed in against forgetting (Adler et al. 2024, sec. 3.3.1)."""

    share: float = Field(gt=0, lt=1, description="Share of replayed rows in an epoch.")
    step: str | None = Field(
        default=None, description="Supervised step whose rows are replayed; the one before this by default."
    )
    data: dict[str, float] | None = Field(
        default=None, description="Sources to replay with their weights; those of `step` by default."
    )


class SFT(TrainingStage):
    """Supervised fine-tuning of a policy on demonstrations of one source, or of several by weight."""

    stage: Literal["sft"] = Field(default="sft", description="Train a policy on demonstrations.")
    data: str | dict[str, float] = Field(description="Name under `data`, or several names with their weights.")
    stopping_strategy: StoppingStrategy = Field(
        default="first_exhausted",
        description="When an epoch over several sources ends; first_exhausted and all_exhausted as in "
        "datasets.interleave_datasets; down_weight uses every row exactly once.",
    )
    replay: ReplaySettings | None = Field(default=None, description="Replay of an earlier step's rows.")

    makes: ClassVar[str] = POLICY
    can_choose_tokens: ClassVar[bool] = True
    can_split_rows: ClassVar[bool] = True

    @property
    def weights(self) -> dict[str, float]:
        """The step's own sources with their weights."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data

    def resolve(self, before: Mapping[str, Stage]) -> Self:
        """Return the step with the policy that it starts from and the sources that it replays."""
        step = super().resolve(before)
        if step.replay is not None and step.replay.data is None:
            step = step._with_replayed(step.replay, before)
        step.shares()  # raises for weights that are no shares
        return step

    def _with_replayed(self, replay: ReplaySettings, before: Mapping[str, Stage]) -> Self:
        """Return the step with the sources of the earlier step that it replays."""
        earlier = {name: other for name, other in before.items() if isinstance(other, SFT)}
        if replay.step is None and not earlier:
            raise InputError("no supervised step comes before this one", ("replay",))
        name = replay.step or list(earlier)[-1]
        with within("replay", "step"):
            replayed = pick(earlier, name, "earlier supervised step").weights
        return self.model_copy(update={"replay": replay.model_copy(update={"step": name, "data": replayed})})

    @property
    def replayed(self) -> dict[str, float]:
        """The replayed sources with their weights."""
        return {} if self.replay is None else self.replay.data or {}

    def shares(self) -> dict[str, float]:
        """Return the share of each source in an epoch, replayed ones last."""
        if self.replay is None:
            return shares_of(self.weights, {}, 0.0)
        return shares_of(self.weights, self.replayed, self.replay.share)

    def data_loc(self, source: str) -> tuple[str, ...]:
        """Return the location of the setting that names a source."""
        return ("data", source) if isinstance(self.data, dict) else ("data",)

    @property
    def record_kind(self) -> type[Demonstration | Comparison]:
        """Demonstrations; the preferred response of a comparison counts as one."""
        return Demonstration

    def mixture(self, sizes: tuple[int, ...], seed: int) -> Mixture:
        """Return which rows of several sources of these sizes an epoch takes; the last ones are replayed."""
        return Mixture(sizes, tuple(self.shares().values()), self.stopping_strategy, seed, len(self.replayed))

    def lack(self, record: Record) -> str | None:
        """Return why no response of a comparison can be trained on."""
        several = isinstance(record, Comparison) and len(record.responses) > 1
        return lack_of_preference(record, needs_rewards=False) if several else None

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise also for a stopping strategy of a single source."""
        if "stopping_strategy" in self.model_fields_set and len(inputs.sources) == 1:
            (only,) = inputs.sources
            raise InputError(
                f"{self.stopping_strategy!r} is for several sources, and {only!r} is one; leave it out",
                ("stopping_strategy",),
            )
        super().validate_inputs(inputs)

    def run(self, context: RunContext) -> dict[str, Any]:
        """Train the policy and write it as a plain Hugging Face folder."""
        from align.stages.training.policy_training import prepare  # noqa: PLC0415 - imports torch
        from align.train.objectives.chosen_tokens import ChosenTokensObjective  # noqa: PLC0415
        from align.train.objectives.supervised import SupervisedObjective  # noqa: PLC0415

        selection = self.selection
        objective = SupervisedObjective()
        if selection is not None and selection.tokens is not None and selection.chooses_tokens:
            objective = ChosenTokensObjective(selection.tokens)
        training = prepare(self, objective, context)
        return training.save(context.folder, training.loop.run())
