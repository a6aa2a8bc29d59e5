"""Settings of online selection; no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from align.accounting.flops import BACKWARD
from align.config import Settings
from align.content_hash import STEP
from align.errors import InputError
from align.registry import DOTTED_PATH, suggest

UNIFORM, HARD, EASY, LEARNABILITY = "uniform", "hard", "easy", "learnability"
SCORES = (UNIFORM, HARD, EASY, LEARNABILITY)
SELECTION = "selection/"  # prefix of what a step's selection did, and of the work of scoring
NEED_REFERENCE = (EASY, LEARNABILITY)
CROSS_FIT = "cross_fit"  # reference


def fold_names(name: str) -> list[str]:
    """Return the names of the steps whose models are the cross-fitted references of a step."""
    return [f"{name}-fold-{fold}" for fold in (1, 2)]


class SelectionSettings(Settings):
    """Online selection of the rows of each optimizer step from a larger batch (Evans et al. 2024, JEST), or of tokens.

    With `tokens` every row is trained on, and the tokens of its loss are chosen.
    """

    score: str = Field(
        default=LEARNABILITY,
        description=(
            "Score of a row. hard: the policy's loss; easy: the negative loss of the reference; learnability: the "
            "policy's loss minus the reference's; uniform: no preference; or your own function as `module:name`, which "
            "gets the losses of the policy and of the reference."
        ),
    )
    reference: str | None = Field(
        default=None,
        description="Reference model. `step:NAME`: a step of the same stage, trained on curated rows. cross_fit: two "
        "models, each trained uniformly on one half of the rows, split by prompt, and used to score the other half; "
        "they are the steps NAME-fold-1 and NAME-fold-2, and another step can use them as `cross_fit:NAME`. With "
        "`equal: flops`: the reference whose pass over all rows counts toward the FLOPs, as does its training if it is "
        "cross-fitted.",
    )
    scorer: str | None = Field(
        default=None,
        description="Fixed model that scores the rows in place of the policy, as `step:NAME` of the same stage; for "
        "example a smaller one. Its losses are computed once per row (CoLoR-Filter: Brandfonbrener et al. 2024). By "
        "default the policy scores rows, with its current weights.",
    )
    tokens: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Train on all rows, but only on this share of the trained tokens of each row, rounded up: those "
        "whose loss under the policy exceeds that under the reference the most (Rho-1: Lin et al. 2024, arXiv "
        "2404.07965). For sft, with `reference: step:NAME`; of the other keys only `compare` applies. The paper ranks "
        "the tokens of a batch. The choice within a row does not depend on how a batch is cut or split, and takes no "
        "pass of the policy besides the one that trains.",
    )
    filter: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Share of the rows that is not trained on: a step chooses prompts_per_step rows from "
        "prompts_per_step / (1 - filter). The other rows are not used again in the epoch.",
    )
    chunks: int = Field(
        default=16,
        ge=1,
        description="Number of draws in which the rows of a step are chosen. With `coupling`, each draw depends on the "
        "rows chosen before; without it, the number does not change the probabilities of the rows.",
    )
    coupling: Literal["none", "embedding", "gradient"] = Field(
        default="none",
        description="Penalty for similarity to the rows chosen before: each of them lowers the score of a row by "
        "2 * coupling_weight / prompts_per_step * cosine. embedding: cosine of the mean hidden states that predict the "
        "response, after subtracting their mean over the rows that the step chooses from; gradient: cosine of the "
        "gradients of the loss with respect to the LM head, by random projection. Both are computed in the pass that "
        "scores rows; gradient computes the product with the LM head a second time.",
    )
    coupling_weight: float = Field(
        default=1.0, gt=0, description="Weight of the penalty, in the unit of the score (nats for sft)."
    )
    gain: float | None = Field(
        default=4.0,
        gt=0,
        description="Rows are drawn with probability proportional to exp(gain * score); null takes the highest scores.",
    )
    score_tokens: int | None = Field(
        default=None, ge=1, description="Score only the first trained tokens of each response, at most this many."
    )
    score_layers: int | None = Field(
        default=None,
        ge=1,
        description="Score rows by this many first layers of the policy, followed by its own final norm and head. "
        "Every second chosen row then trains only these layers and the head, so that they keep predicting "
        "(Flexi-JEST). The reference is scored by as many of its own layers, and its step needs the same setting, with "
        "`score: uniform` if it does not select. For sft and reward_model; not under DeepSpeed or FSDP.",
    )
    every: int = Field(
        default=1,
        ge=1,
        description="Score rows every this many optimizer steps, for all steps until the next scoring. Larger values "
        "give fewer and larger passes, but scores of older weights; the FLOPs stay the same.",
    )
    until: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the optimizer steps that select rows by score; later steps choose uniformly.",
    )

    compare: str | None = Field(
        default=UNIFORM,
        description=(
            "Baseline, compared at equal optimizer steps and at equal FLOPs. uniform: also train the step without "
            "selection, for the same FLOPs; `step:NAME`: an earlier step; null: no baseline."
        ),
    )
    equal: Literal["steps", "flops"] = Field(
        default="steps",
        description="For the score uniform: train for the same number of optimizer steps as a run that selects with "
        "these settings, or for the same FLOPs.",
    )

    fold: Literal[1, 2] | None = Field(
        default=None, description="For the score uniform: train only on this half of the rows, as cross_fit does."
    )

    @field_validator("compare")
    @classmethod
    def _check_compare(cls, name: str | None) -> str | None:
        if name not in (None, UNIFORM) and not name.startswith(STEP):
            raise InputError(f"{name!r} is neither {UNIFORM} nor of the form step:NAME")
        return name

    @field_validator("score")
    @classmethod
    def _check_score(cls, name: str) -> str:
        if name not in SCORES and DOTTED_PATH.fullmatch(name) is None:
            raise InputError(f"no score is called {name!r}; {suggest(name, SCORES)}, or your own `module:name`")
        return name

    @field_validator("coupling", mode="before")
    @classmethod
    def _check_coupling(cls, name: Any) -> Any:  # noqa: ANN401 - not validated yet
        if name == "contrastive":
            raise InputError(
                "the loss of this step is a sum over rows, without a contrastive part; the step `embedder` has one, "
                "with selection in train.jest; use embedding or gradient here"
            )
        return name

    @field_validator("reference")
    @classmethod
    def _check_reference(cls, name: str | None) -> str | None:
        if name not in (None, CROSS_FIT) and not name.startswith((STEP, CROSS_FIT + ":")):
            raise InputError(f"{name!r} is neither {CROSS_FIT} nor of the form step:NAME or {CROSS_FIT}:NAME")
        return name

    @field_validator("scorer")
    @classmethod
    def _check_scorer(cls, name: str | None) -> str | None:
        if name is not None and not name.startswith(STEP):
            raise InputError(f"{name!r} is not of the form step:NAME")
        return name

    @model_validator(mode="after")
    def _check_tokens(self) -> SelectionSettings:
        if self.tokens is None:
            return self
        beside = {"score", "equal", "coupling", "scorer"} if self.score == UNIFORM else set[str]()  # of the baseline
        if others := self.model_fields_set - {"tokens", "reference", "compare"} - beside:
            raise InputError("has no effect on a selection of tokens; leave it out", (min(others),))
        if self.score != UNIFORM and (self.reference is None or not self.reference.startswith(STEP)):
            raise InputError("a selection of tokens needs one fixed model, as step:NAME", ("reference",))
        return self

    @model_validator(mode="after")
    def _check_scorer_needs(self) -> SelectionSettings:
        is_counted = self.score == UNIFORM and self.equal == "flops"
        if self.scorer is not None and self.score in (UNIFORM, EASY) and not is_counted:
            raise InputError(f"has no effect on the score {self.score}; leave it out", ("scorer",))
        if self.scorer is not None and self.coupling != "none":
            raise InputError("a coupling needs the policy's pass over the rows; leave one of them out", ("scorer",))
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> SelectionSettings:
        if self.score_layers is not None and (self.scorer is not None or self.score == EASY):
            by = "a fixed scorer" if self.scorer is not None else f"the score {EASY}"
            raise InputError(f"has no effect on {by}; leave it out", ("score_layers",))
        return self

    @model_validator(mode="after")
    def _check_needs(self) -> SelectionSettings:
        if self.score in NEED_REFERENCE and self.reference is None:
            raise InputError(
                f"{self.score} compares with a reference: name a step that trained on curated rows", ("reference",)
            )
        is_counted = self.score == UNIFORM and self.equal == "flops"  # as part of the FLOPs of the other run
        if self.score in (UNIFORM, HARD) and self.reference is not None and not is_counted:
            raise InputError(f"has no effect on the score {self.score}; leave it out", ("reference",))
        if self.score == UNIFORM and self.coupling != "none" and not is_counted:
            raise InputError(f"has no effect on the score {UNIFORM}; leave it out", ("coupling",))
        if self.coupling == "none" and "coupling_weight" in self.model_fields_set:
            raise InputError("has no effect without a coupling; leave it out, or set coupling", ("coupling_weight",))
        if self.fold is not None and (self.score != UNIFORM or is_counted):
            raise InputError(f"is for the score {UNIFORM}, without `equal`; leave it out", ("fold",))
        if self.score != UNIFORM and self.equal != "steps":
            raise InputError(f"is for the score {UNIFORM}; leave it out", ("equal",))
        return self

    def cache_key(self) -> dict[str, object]:
        """Return the settings that determine the trained weights."""
        without = {"compare"}
        if self.coupling == "none":  # so that steps of versions without this key stay finished
            without |= {"coupling", "coupling_weight"}
        without |= {name for name in ("fold", "scorer", "tokens", "score_layers") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=without)

    @property
    def fixed_steps(self) -> dict[str, list[str]]:
        """The names of the steps that make the fixed models, by key: `reference` and `scorer`, where they are given."""
        found = {"scorer": [self.scorer.removeprefix(STEP)]} if self.scorer is not None else dict[str, list[str]]()
        if self.reference is not None and self.reference.startswith(STEP):
            found["reference"] = [self.reference.removeprefix(STEP)]
        elif self.reference not in (None, CROSS_FIT):  # of a step that has its name
            found["reference"] = fold_names(self.reference.removeprefix(CROSS_FIT + ":"))
        return found

    @property
    def is_cross_fitted(self) -> bool:
        """Whether the reference is two models that are trained for the selection."""
        return self.reference is not None and self.reference.startswith(CROSS_FIT)

    @property
    def chooses_tokens(self) -> bool:
        """Whether tokens are chosen, and not rows."""
        return self.tokens is not None and self.score != UNIFORM

    @property
    def needs_policy(self) -> bool:
        """Whether choosing rows takes a forward pass of the policy over them."""
        by_policy = self.score not in (UNIFORM, EASY) and self.scorer is None and self.tokens is None
        return by_policy or self.coupling != "none"

    @property
    def trains_exit(self) -> bool:
        """Whether half of the rows of a step are trained through the first layers alone.

        A uniform run that is compared at equal FLOPs only counts what that costs the other run.
        """
        return self.score_layers is not None and (self.score != UNIFORM or self.equal == "steps")

    def super_batch(self, prompts_per_step: int) -> int:
        """Return the number of rows from which a step chooses `prompts_per_step`.

        >>> SelectionSettings(score="hard", filter=0.8).super_batch(32)
        160
        """
        return prompts_per_step if self.tokens is not None else round(prompts_per_step / (1 - self.filter))

    def cost_factor(self, scoring: float, training: float = 1 + BACKWARD, exit: float = 1.0) -> float:
        """Return C(f) = 1 + rho / (3 (1 - f)): the training FLOPs over those of uniform training of as many rows.

        `scoring` is rho, the FLOPs of scoring a row over those of its forward pass; `training` is the 3, likewise those
        of training on it, which is 2 for adapters, whose base needs no gradients. With `score_layers` the 1 is
        (1 + `exit`) / 2, where `exit` is the cost of a row in the first layers over that in all layers. Fixed models
        are not included: their losses are computed once for each row and cached. A share `until` of the steps is
        scored. That of a uniform run is the cost of the run that it is compared with.
        """
        if self.scorer is not None or self.tokens is not None or (self.score != UNIFORM and not self.needs_policy):
            return 1.0
        trained = 1 - self.until * (1 - self.row_factor(exit))
        if self.score == UNIFORM and self.trains_exit:
            return trained
        return trained + self.until * scoring / (training * (1 - self.filter))

    def row_factor(self, exit: float) -> float:
        """Return the FLOPs of training on the rows of a scored step over those of training them through all layers."""
        return 1.0 if self.score_layers is None else (1 + exit) / 2

    def check_kind(self, kind: str) -> None:
        """Raise `InputError` for settings that a kind of launch, by accelerate's name, does not support."""
        if self.score_layers is not None and kind in ("DEEPSPEED", "FSDP"):
            message = f"some passes skip layers, which {kind} does not support; launch with DDP, or leave it out"
            raise InputError(message, ("selection", "score_layers"))
