"""The key `keep` of a recipe: whose weights are kept when a run is finished."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import Settings
from align.registry import lower_is_better


class KeepBest(Settings):
    """Keep the weights of the policy with the best value of a metric."""

    best: str = Field(description="Metric of a step of the stage evaluate, as TASK.METRIC.")
    greater_is_better: bool | None = Field(
        default=None,
        description=(
            "Whether the highest value is the best. Default: false for nll, kl, perplexity, unparsable, repetition, "
            "calibration error, alignment and uniformity, otherwise true."
        ),
    )

    @property
    def is_greater_better(self) -> bool:
        """Return whether the highest value is the best."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not lower_is_better(self.best.partition(".")[2])


Keep = Literal["all", "last"] | KeepBest
