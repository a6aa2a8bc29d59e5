"""Settings of the loss of distillation. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from align.config import Settings


def cached_bytes(top_k: int) -> int:
    """Return the bytes of a trained token in the teacher's cache: int32 tokens, fp32 log-probabilities, the rest."""
    return 8 * top_k + 4


class DistillationSettings(Settings):
    """The divergence from the teacher, and the weight of the SFT term."""

    beta: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Interpolation of the generalized Jensen-Shannon divergence (GKD, Agarwal et al. 2024): 0 is "
        "KL(teacher || student), 1 is KL(student || teacher).",
    )
    top_k: int = Field(
        default=64,
        ge=1,
        description="Number of the teacher's most likely tokens that are compared one by one; all other tokens are one "
        "class. The vocabulary size makes the divergence exact.",
    )
    sft_weight: float = Field(
        default=0.0, ge=0, description="Weight of the negative log-likelihood of the rows, added to the divergence."
    )
