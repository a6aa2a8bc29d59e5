"""Stage `average`: a model from several, or between two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.errors import InputError
from align.stages.base import ONE_PROCESS, POLICY, REWARD_MODEL, SOURCE, Input, Stage
from align.stages.compression.average_settings import AverageSettings
from align.stages.costs.estimates import Estimate, Planning
from align.stages.inputs.context import ModelSpec, RunContext, StepInputs
from align.stages.inputs.sources import SourceSettings
from align.stages.responses.tasks import open_task_rows

PAIR = 2  # policies that a spherical interpolation takes
NO_TASK = "greedy evaluates policies; average reward models by mean or slerp"


class Averaging(AverageSettings, Stage):
    """What averages of policies and of reward models have in common."""

    refused = ONE_PROCESS

    @property
    def start(self) -> str:
        """The step whose configuration and tokenizer the result has, and whose changes are reported: the last."""
        return self.of[-1]

    def inputs(self) -> list[Input]:
        """Return the models, and the rows of the evaluation."""
        names = [*((name, "of") for name in self.of), (self.base, "base"), (self.toward, "toward")]
        models = [Input(name, (self.makes,), (loc,)) for name, loc in names if name is not None]
        return [*models, *(Input(name, (SOURCE,), ("task", "data")) for name in self.shares())]

    def shares(self) -> dict[str, float]:
        """Return the rows of the evaluation."""
        return {self.task.data: 1.0} if self.task is not None else {}

    def open_rows(self, name: str, source: SourceSettings) -> None:
        """Raise for first rows that the evaluation cannot use."""
        assert self.task is not None
        open_task_rows(self.task.resolve(source), source)

    def validate_settings(self) -> None:
        """Raise for settings without effect, and for those that the way of averaging needs."""
        if len(set(self.of)) < len(self.of):
            raise InputError("names a step twice", ("of",))
        needed: Mapping[str, tuple[str, bool]] = {
            "base": ("slerp", self.base is not None),
            "task": ("greedy", self.task is not None),
        }
        for key, (how, is_set) in needed.items():
            if is_set != (self.how == how):
                raise InputError(f"is needed by how: {how}" if not is_set else f"is only for how: {how}", (key,))
        if self.how == "slerp" and len(self.of) != PAIR:
            raise InputError(f"slerp takes two policies, not {len(self.of)}", ("of",))
        given = self.model_fields_set
        for key, needs in {"slerp_weight": self.base, "toward_weight": self.toward, "metric": self.task}.items():
            if key in given and needs is None:
                raise InputError("has no effect here; remove it", (key,))

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the weights."""
        settings = super().decisive()
        if self.task is not None:
            if self.task.limit is None:  # so that steps finished before there was this setting stay finished
                del settings["task"]["limit"]
            settings["task"]["engine"] = None if self.task.engine is None else self.task.engine.cache_key()
        return settings

    def cache_key(self, inputs: StepInputs) -> list[Any]:
        """Return what decides the weights, with the content of what the evaluation reads."""
        own = [] if self.task is None else [*self.task.files, *self.task.contents]
        return [*super().cache_key(inputs), *map(inputs.content, own)]

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise for an evaluation without such a metric."""
        if self.task is not None:
            task = self.task.resolve(inputs.sources.get(self.task.data))
            self.task.check_used(task)
            known = task.metrics_of(self.task.num_responses)
            if not known and self.metric is None:
                raise InputError(f"task {task.name} has its metrics only after it has run; name one", ("metric",))
            if known and self.metric not in (None, *known):
                raise InputError(f"task {task.name} has no metric {self.metric!r}; {', '.join(known)}", ("metric",))

    def model(self, before: ModelSpec) -> ModelSpec:
        """Return the model of the average, whose adapters are merged."""
        return before._replace(settings=before.settings.model_copy(update={"lora": None, "quantize": None}))

    def estimate(self, planning: Planning) -> Estimate:
        """Return the disk space of the average."""
        return Estimate(name=planning.name, stage=self.stage, rows=0, disk=planning.model_bytes)

    def disk(self, model_bytes: int) -> tuple[int, int]:
        """Return the bytes of the average, and of merged adapters and one candidate while the step runs."""
        merged = {*self.of, self.base, self.toward} - {None}
        return model_bytes, model_bytes * (len(merged) + (self.how == "greedy"))

    def run(self, context: RunContext) -> dict[str, Any]:
        """Write the average as a plain Hugging Face folder."""
        from align.stages.compression.averaged import average_models  # noqa: PLC0415 - imports torch

        return average_models(self, context)


class Average(Averaging):
    """Average policies tensor by tensor; adapters are merged first, and tied weights count once."""

    stage: Literal["average"] = Field(default="average", description="Average policies.")

    makes: ClassVar[str] = POLICY


class AverageRewardModels(Averaging):
    """Average reward models that started from one model with other seeds or orders of rows (WARM, Ramé et al. 2024)."""

    stage: Literal["average_reward_models"] = Field(
        default="average_reward_models", description="Average reward models."
    )

    makes: ClassVar[str] = REWARD_MODEL
    refused = {**ONE_PROCESS, "task": NO_TASK, "metric": NO_TASK}

    def validate_settings(self) -> None:
        """Raise for greedy, whose tasks evaluate policies, and for what `average` refuses."""
        if self.how == "greedy":
            raise InputError(NO_TASK, ("how",))
        super().validate_settings()
