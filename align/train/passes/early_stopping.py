"""Settings of early stopping; no torch."""

from __future__ import annotations

from pydantic import Field

from align.config import Settings


class EarlyStopping(Settings):
    """When training stops before its last step."""

    patience: int = Field(ge=1, description="Evaluations in a row without a lower held-out loss after which to stop.")
    min_delta: float = Field(
        default=0.0, ge=0, description="Decrease of the held-out loss that counts as an improvement."
    )
