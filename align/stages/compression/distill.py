"""Stage `distill`: a policy learns the distributions of another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from align.data.mixing import shares_of
from align.errors import InputError
from align.records import Comparison, Demonstration
from align.stages.base import POLICY, Input
from align.stages.costs.estimates import Estimate, Planning
from align.stages.inputs.context import RunContext, StepInputs
from align.stages.training.stage import TrainingStage
from align.train.distillation.settings import DistillationSettings, cached_bytes


class Distill(TrainingStage):
    """Train a student on the token distributions of a teacher, on given or sampled rows."""

    stage: Literal["distill"] = Field(default="distill", description="Train a policy on another one's distributions.")
    teacher: str = Field(description="Step whose policy is the teacher; it must have the student's tokenizer.")
    data: str | dict[str, float] = Field(
        description="Name under `data`; a step that makes groups (on-policy if the student has sampled them); or "
        "several names with their weights."
    )
    responses: Literal["best", "all"] = Field(
        default="best",
        description="best: train on demonstrations and on the best response of each group. all: train on all responses "
        "of groups.",
    )
    loss: DistillationSettings = Field(
        default=DistillationSettings(), description="Divergence from the teacher and weight of the SFT term."
    )

    makes: ClassVar[str] = POLICY
    refused = {"selection": "is not supported by distill, which trains on all rows"}

    def shares(self) -> dict[str, float]:
        """Return the share of each source in an epoch."""
        return shares_of({self.data: 1.0} if isinstance(self.data, str) else self.data, {}, 0.0)

    def data_loc(self, source: str) -> tuple[str, ...]:
        """Return the location of the setting that names a source."""
        return ("data", source) if isinstance(self.data, dict) else ("data",)

    def inputs(self) -> list[Input]:
        """Return student, rows and teacher."""
        return [*super().inputs(), Input(self.teacher, (POLICY,), ("teacher",))]

    @property
    def record_kind(self) -> type[Demonstration | Comparison]:
        """Demonstrations, where the preferred response of a comparison counts as one; or groups of responses."""
        return Comparison if self.responses == "all" else Demonstration

    def validate_inputs(self, inputs: StepInputs) -> None:
        """Raise also where the student is the teacher."""
        if self.teacher == self.policy:
            raise InputError(f"{self.teacher!r} is also the student; set policy to another step", ("teacher",))
        super().validate_inputs(inputs)

    def estimate(self, planning: Planning) -> Estimate:
        """Return the estimate of the training, with the teacher's pass over the rows and its cache."""
        from align.stages.training.planning import with_forward_pass  # noqa: PLC0415 - imports torch

        found = super().estimate(planning)
        if self.resume is not None:  # the step before has computed them
            return found
        found = with_forward_pass(found, planning.dimensions_of(self.teacher), self.train.precision)
        top_k = min(self.loss.top_k, planning.config.get_text_config().vocab_size)
        cached = found.tokens * cached_bytes(top_k)
        told = f"a pass over the rows, with all weights in each process; its cache takes up to {cached / 2**20:.0f} MiB"
        return replace(found, disk=found.disk + cached, parts={**found.parts, "teacher": told})

    def run(self, context: RunContext) -> dict[str, Any]:
        """Train the student and write it as a plain Hugging Face folder."""
        from align.stages.compression.distilling import distill  # noqa: PLC0415 - imports torch

        return distill(self, self.teacher, self.loss, context)
