"""Settings of the stage `average`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.config import Settings
from align.stages.responses.tasks import TaskSettings


class AverageSettings(Settings):
    """Which models are averaged, and how."""

    of: list[str] = Field(
        min_length=1, description="Steps whose models are averaged, in this order; one is enough with `toward`."
    )
    how: Literal["mean", "slerp", "greedy"] = Field(
        default="mean",
        description=(
            "mean: the average of the weights; slerp: spherical interpolation of the differences of two policies from "
            "`base` (WARP, Ramé et al. 2024); greedy: start from the best policy and add each further one unless it "
            "makes `metric` worse (model soups, Wortsman et al. 2022)."
        ),
    )
    base: str | None = Field(
        default=None, description="Step from which both policies of slerp started; required for slerp."
    )
    slerp_weight: float = Field(default=0.5, ge=0, le=1, description="Weight of the second policy in slerp.")
    toward: str | None = Field(
        default=None, description="Step of an earlier policy to interpolate the result toward (LITI, WARP)."
    )
    toward_weight: float = Field(
        default=0.5, ge=0, le=1, description="Weight of `toward`: 0 is the average, 1 the earlier policy."
    )
    task: TaskSettings | None = Field(
        default=None, description="Evaluation on held-out rows by which greedy chooses policies."
    )
    metric: str | None = Field(
        default=None,
        description="Metric of `task` for greedy; its first by default. The lowest value is the best for nll, "
        "kl, perplexity, unparsable, repetition, calibration error, alignment and uniformity.",
    )
