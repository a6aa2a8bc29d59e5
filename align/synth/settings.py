"""Settings of verifiable constraints and of scored groups. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from align.config import Settings
from align.errors import InputError
from align.registry import pick
from align.synth.constraint_templates import TEMPLATES

Split = Literal["train", "validation", "test"]


def _known(kinds: list[str] | None) -> list[str] | None:
    for kind in kinds or ():
        pick(TEMPLATES, kind, "instruction")
    return kinds


Kinds = Annotated[list[str], Field(min_length=1), AfterValidator(_known)] | None  # of instructions; all for None


class ConstraintSettings(Settings):
    """Verifiable instructions to append to prompts."""

    kinds: Kinds = Field(default=None, description="Kinds of IFEval instructions to draw from; all if left out.")
    max_constraints: int = Field(
        default=1,
        ge=1,
        description="Maximum number of instructions per prompt; each number up to it is equally likely.",
    )
    split: Split | None = Field(
        default=None,
        description="Use only the prompts of this split (60 % train, 10 % validation, 30 % test), which is determined "
        "by the prompt's words; all prompts if left out.",
    )


class GroupSettings(Settings):
    """Which responses to a prompt become a comparison, and which prompts are dropped."""

    keep: Literal["all", "best_worst", "most_variance", "best_and_low", "best"] = Field(
        default="all",
        description="Keep all responses of a group; the best and the worst; the max_responses whose rewards have the "
        "largest variance (PODS, arXiv 2504.13818); the best, and the one whose reward is closest to two standard "
        "deviations below the mean (arXiv 2502.16825); or only the best as a demonstration for SFT (rejection "
        "sampling; set min_best).",
    )
    max_responses: int | None = Field(
        default=None,
        ge=2,
        description="Maximum number of responses kept per prompt. With keep: all, the best, the worst, and evenly "
        "spaced ranks between them; no limit if left out.",
    )
    min_gap: float = Field(
        default=0.0,
        ge=0,
        description="Drop a group whose best and worst rewards differ by less; ties are always dropped.",
    )
    min_best: float | None = Field(default=None, description="Drop a group whose best reward is lower.")
    cut_reward: float | None = Field(
        default=None,
        description="Reward of a response that was truncated at max_new_tokens; the judge's own if left out.",
    )

    @model_validator(mode="after")
    def _check_keep(self) -> Self:
        if self.keep == "most_variance" and self.max_responses is None:
            raise InputError("is needed: the number of responses that keep: most_variance keeps", ("max_responses",))
        number = {"best_worst": "two responses", "best_and_low": "two responses", "best": "one response"}.get(self.keep)
        unused = {"max_responses", *(["min_gap"] if self.keep == "best" else [])} & self.model_fields_set
        for name in sorted(unused) if number else ():
            raise InputError(f"has no effect with keep: {self.keep}, which keeps {number}; remove it", (name,))
        return self
