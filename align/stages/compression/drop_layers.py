"""Stage `drop_layers`: a policy without the layers that change their input the least."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from align.records import Demonstration
from align.stages.base import GROUPS, SOURCE, Input
from align.stages.compression.copies import PolicyCopy
from align.stages.costs.estimates import Estimate, Planning, estimate_answers
from align.stages.inputs.context import ModelSpec, RunContext
from align.stages.inputs.opening import check_kind, first_records
from align.stages.inputs.sources import SourceSettings


class DropLayers(PolicyCopy):
    """Drop decoder layers with the lowest block influence (ShortGPT, Men et al. 2024); adapters are merged first."""

    stage: Literal["drop_layers"] = Field(
        default="drop_layers", description="Drop the layers of a policy that change their input the least."
    )
    drop: int = Field(ge=1, description="Number of layers to drop.")
    data: str = Field(
        description="Rows on which layers are measured: a name under `data`, or a step that makes groups."
    )
    max_rows: int = Field(
        default=256,
        ge=1,
        description="Number of rows to measure on: the first ones. The influence of a layer is 1 - cos(input, output), "
        "averaged over their tokens.",
    )

    def inputs(self) -> list[Input]:
        """Return the policy and the rows."""
        return [*super().inputs(), Input(self.data, (SOURCE, GROUPS), ("data",))]

    def shares(self) -> dict[str, float]:
        """Return the rows."""
        return {self.data: 1.0}

    def open_rows(self, name: str, source: SourceSettings) -> None:
        """Raise for first rows that have no answer."""
        for located in first_records(source):
            check_kind(located, Demonstration, self.stage)

    def model(self, before: ModelSpec) -> ModelSpec:
        """Return the model of the copy; which layers it keeps is not known before the step runs."""
        from align.stages.compression.dropping import planned_settings  # noqa: PLC0415 - imports torch

        return before._replace(settings=planned_settings(before.settings, self.drop))

    def estimate(self, planning: Planning) -> Estimate:
        """Return the tokens that layers are measured on, and the disk space of the policy."""
        from align.stages.compression.dropping import measured_groups  # noqa: PLC0415 - imports torch

        if (made := planning.made.get(self.data)) is not None:
            number = min(self.max_rows, made.rows)
            tokens = made.tokens * number // max(1, made.rows)
        else:
            groups = measured_groups(self, planning.inputs, planning.tokenizer, planning.config)
            number = len(groups)
            tokens = sum(len(group.sequences[0].ids) for group in groups)
        found = estimate_answers(self.stage, planning, number, tokens, 0, precision="fp32")
        return replace(found, disk=planning.model_bytes)

    def disk(self, model_bytes: int) -> tuple[int, int]:
        """Return the bytes of the policy; merged adapters may take those of the whole one while the step runs."""
        return model_bytes, 2 * model_bytes

    def run(self, context: RunContext) -> dict[str, Any]:
        """Measure the layers and write the policy without some of them as a plain Hugging Face folder."""
        from align.stages.compression.dropping import drop_layers  # noqa: PLC0415 - imports torch

        return drop_layers(self, context)
