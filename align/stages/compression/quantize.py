"""Stage `quantize`: a policy with its linear layers in int8."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.models.loading.int8 import Int8Method, check_torchao
from align.stages.compression.copies import CompressedCopy
from align.stages.costs.estimates import Estimate, Planning
from align.stages.inputs.context import RunContext


class Quantize(CompressedCopy):
    """Write a policy with its linear layers in int8, as a folder that transformers loads; adapters are merged first."""

    stage: Literal["quantize"] = Field(
        default="quantize", description="Write a policy with its linear layers in int8 (torchao)."
    )
    method: Int8Method = Field(
        default="int8",
        description="int8: round the weights, with one scale per output channel. int8_dynamic: also round the "
        "activations, with one scale per token, and compute products in integers.",
    )

    def validate_settings(self) -> None:
        """Raise if torchao is not installed."""
        check_torchao(("stage",))

    def estimate(self, planning: Planning) -> Estimate:
        """Return the disk space of the copy, as if nothing became smaller."""
        return Estimate(name=planning.name, stage=self.stage, rows=0, disk=planning.model_bytes)

    def disk(self, model_bytes: int) -> tuple[int, int]:
        """Return the most bytes of the copy, and of merged adapters while the step runs."""
        return model_bytes, model_bytes

    def run(self, context: RunContext) -> dict[str, Any]:
        """Write the copy and load it back."""
        from align.artifacts import discard_attempt  # noqa: PLC0415
        from align.compress.int8 import quantize_policy  # noqa: PLC0415 - imports torch
        from align.models.loading.pretrained import silence_transformers  # noqa: PLC0415
        from align.stages.costs.measured import Done  # noqa: PLC0415

        assert self.policy is not None
        silence_transformers()
        discard_attempt(context.folder)
        report = quantize_policy(str(context.inputs.folders[self.policy]), context.folder, self.method)
        return {**report, "done": Done(weights=report["compression"]["weights"])}
