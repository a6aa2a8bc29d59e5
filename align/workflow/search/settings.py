"""The key `search` of a recipe: settings that are searched, how trials are compared, and what they may cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from align.config import Settings
from align.errors import InputError
from align.workflow.recipe.retention import KeepBest

Bounds = tuple[float, float]
RANGES = ("log", "linear", "choices")
NUM_BEFORE_TPE = 10  # trials with Sobol points, as optuna's n_startup_trials


class Range(Settings):
    """Values of one setting: exactly one of log, linear and choices."""

    log: Bounds | None = Field(
        default=None, description="Lowest and highest value; log-uniform, rounded to 4 significant digits."
    )
    linear: Bounds | None = Field(
        default=None, description="Lowest and highest value; uniform, rounded to 4 significant digits."
    )
    choices: list[Any] | None = Field(
        default=None, min_length=2, description="Values, at least two, with equal probabilities."
    )
    integer: bool = Field(
        default=False, description="Round values of log and linear to whole numbers; the bounds must be whole numbers."
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Range:
        if sum(getattr(self, name) is not None for name in RANGES) != 1:
            raise InputError(f"give one of {', '.join(RANGES)}")
        for name, bounds in {"log": self.log, "linear": self.linear}.items():
            if bounds is not None and not bounds[0] < bounds[1]:
                raise InputError(f"{list(bounds)} are not a lowest and a highest value", (name,))
        if self.log is not None and self.log[0] <= 0:
            raise InputError(f"the lowest value is {self.log[0]:g}; a logarithmic range is above 0", ("log",))
        if self.integer and self.choices is not None:
            raise InputError("has no effect on choices; leave it out", ("integer",))
        bounds = self.log or self.linear
        if self.integer and bounds is not None and not all(bound.is_integer() for bound in bounds):
            raise InputError(f"needs bounds that are whole numbers, not {list(bounds)}", ("integer",))
        return self

    @property
    def text(self) -> str:
        """The range as a page shows it.

        >>> Range(log=(0.02, 2.0)).text, Range(choices=["dpo", "ipo"]).text
        ('log 0.02 to 2', 'one of dpo, ipo')
        """
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        kind = "log" if self.log is not None else "linear"
        low, high = self.log or self.linear or (0.0, 0.0)
        return f"{kind} {low:g} to {high:g}" + (", whole numbers" if self.integer else "")


class TrialBudget(Settings):
    """Limits of a whole search. They include the training of the chosen trial to the end."""

    trials: int | None = Field(default=None, ge=1, description="Maximum number of trials.")
    flops: float | None = Field(default=None, gt=0, description="Maximum FLOPs of the search.")
    money: float | None = Field(default=None, gt=0, description="Maximum cost, in the currency of `accounting`.")

    @model_validator(mode="after")
    def _check_limit(self) -> TrialBudget:
        if self.trials is None and self.flops is None and self.money is None:
            raise InputError("give at least one of trials, flops and money")
        return self


class SearchSettings(Settings):
    """A search of settings for one step that trains a policy or a reward model, by successive halving.

    Jamieson & Talwalkar 2016.
    """

    space: dict[str, Range] = Field(
        min_length=1,
        description="Searched keys with their ranges: keys of the step, such as `loss.settings.beta`; and "
        "`steps.NAME.KEY` of an earlier step, `data.NAME.KEY` and `policy.KEY`. Steps before the searched one that "
        "depend on such a key run once for each of its values; all others are shared by all trials.",
    )
    points: Literal["sobol", "random", "tpe"] = Field(
        default="sobol",
        description="How the values of a trial are drawn: from a randomly shifted Sobol sequence, or independently, "
        "both from the recipe's seed and the number of the trial only; or, after 10 trials with Sobol points, one "
        "after the other by optuna's TPE sampler, from the scores of all earlier trials at the first rung.",
    )
    evaluation: str = Field(
        description="Step with `stage: evaluate` that evaluates the trials; use validation rows. Reward models have "
        "the task `pair_accuracy`."
    )
    metric: str = Field(description="Metric of that step by which trials are ranked, as TASK.METRIC.")
    greater_is_better: bool | None = Field(
        default=None, description="Whether the highest value is the best; by default as for `keep`."
    )
    budget: TrialBudget = Field(
        description="Limits of the whole search, including the training of the chosen trial to the end."
    )
    rungs: list[int] = Field(
        min_length=1,
        description="Optimizer steps after which trials are compared. The best trials continue to the next rung; the "
        "best one of the last rung continues to the end of the step (see `finish`).",
    )
    halving: float = Field(
        default=3.0,
        gt=1,
        description="Reduction factor: a share of 1 / halving of the trials, rounded down but at least one, continues "
        "from each rung.",
    )
    finish: Literal["end", "best_rung"] = Field(
        default="end",
        description="What the step becomes: the best trial of the last rung, trained to the end; or, with `best_rung`, "
        "the trial with the best metric of all rungs, as it was at that rung (Li et al. 2018, Algorithm 1).",
    )
    started: list[list[int]] | None = Field(
        default=None, description="Set by the search itself: the numbers of the trials started in each rung."
    )
    drawn: list[list[float]] = Field(
        default=[],
        description="Set by the search itself with `points: tpe`: the point of each trial, as a share of each range.",
    )
    chosen: int | None = Field(
        default=None, ge=1, description="Set by the search itself at its end: the trial whose settings the step takes."
    )
    chosen_rung: int | None = Field(
        default=None, ge=1, description="Set by the search itself with `finish: best_rung`: where that trial stops."
    )

    @model_validator(mode="after")
    def _check_rungs(self) -> SearchSettings:
        if self.rungs[0] < 1 or any(after <= before for before, after in zip(self.rungs, self.rungs[1:], strict=False)):
            raise InputError(f"{self.rungs} are not increasing numbers of optimizer steps", ("rungs",))
        if self.points == "tpe" and self.budget.trials is not None and self.budget.trials <= NUM_BEFORE_TPE:
            message = f"tpe draws no trial before number {NUM_BEFORE_TPE + 1}; raise budget.trials, or use sobol"
            raise InputError(message, ("points",))
        return self

    @property
    def is_greater_better(self) -> bool:
        """Whether the highest value of the metric is the best."""
        return KeepBest(best=self.metric, greater_is_better=self.greater_is_better).is_greater_better

    def is_at_end(self, num_promoted: int) -> bool:
        """Return whether the search ends after the trials so far, of which `num_promoted` would be promoted."""
        return len(self.levels) == len(self.rungs) or (num_promoted == 1 and self.finish == "end")

    @property
    def levels(self) -> list[list[int]]:
        """The numbers of the trials of each rung so far; before the search, all trials of the first rung."""
        return self.started if self.started is not None else [list(range(1, (self.budget.trials or 1) + 1))]


class SearchedSteps(Settings):
    """The steps that a search makes, and those that wait for it."""

    base: str = Field(description="The searched step; of a step in rounds the first round.")
    earlier: dict[int, dict[str, str]] = Field(
        description="Steps before the searched one that are made for each trial, with those that they stand for."
    )
    copies: dict[str, str] = Field(description="Maps steps that wait to those of the chosen trial that they copy.")
    waiting: list[str] = Field(description="Steps that depend on a searched key, and so have the chosen values.")
