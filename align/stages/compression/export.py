"""Stage `export`: a policy as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from align.compress.settings import GGUF_BITS, GgufSettings
from align.stages.compression.copies import CompressedCopy
from align.stages.costs.estimates import Estimate, Planning
from align.stages.inputs.context import RunContext


class Export(GgufSettings, CompressedCopy):
    """Export a policy as a GGUF file for llama.cpp and the programs built on it; adapters are merged first."""

    stage: Literal["export"] = Field(default="export", description="Write a policy as a GGUF file.")

    def estimate(self, planning: Planning) -> Estimate:
        """Return the disk space of the file."""
        size = int(planning.num_weights * GGUF_BITS[self.gguf] / 8)
        return Estimate(name=planning.name, stage=self.stage, rows=0, disk=size)

    def disk(self, model_bytes: int) -> tuple[int, int]:
        """Return the bytes of the file, and of merged adapters while the step runs."""
        return int(model_bytes * GGUF_BITS[self.gguf] / 32), model_bytes

    def run(self, context: RunContext) -> dict[str, Any]:
        """Write the file with the policy's configuration and tokenizer, and load it back."""
        from align.compress.gguf_export import export_policy  # noqa: PLC0415 - imports torch
        from align.models.loading.pretrained import silence_transformers  # noqa: PLC0415
        from align.stages.costs.measured import Done  # noqa: PLC0415

        assert self.policy is not None
        silence_transformers()
        path = context.inputs.folders[self.policy]
        file = context.folder / f"{Path(self.policy).name}-{self.gguf}.gguf"
        report = export_policy(str(path), file, self)
        for note in report["notes"]:
            context.progress.note(note)
        return {**report, "done": Done(weights=report["compression"]["weights"])}
