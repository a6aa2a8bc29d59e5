"""Win rate at equal length of both responses: a judge's preference for length, held by a prior, taken out.

Dubois et al. 2024 (Length-Controlled AlpacaEval), eq. 1, with its terms for the model and for length:

    logit P(ours wins) = quality + slope * tanh((len_baseline - len_ours) / standard deviation of this difference)

Their instruction difficulty, which is fitted over many models, is left out, and so are their rows of a baseline with
prescribed length. The rate is therefore near AlpacaEval's length-controlled win rate and not equal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from align.evaluation.statistics import Score, bootstrap_interval
from align.registry import LazyModule

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")  # a recipe's tasks are validated without it

# Of the slopes that AlpacaEval 2.0 fits to 199 models of its leaderboard: the median, and the standard deviation of the
# normal distribution whose quartiles are as far apart as theirs, -1.79 and -1.28. Neither was chosen by how near the
# rates come to published ones.
PRIOR_SLOPE = -1.52
PRIOR_DEVIATION = (1.79 - 1.28) / 1.349
RESAMPLES = 200  # each of which fits the model
RIDGE = 1e-2  # of the quality, which is infinite without it if one side wins everything
MAX_STEPS = 50  # of Newton's method, which needs fewer than ten
MAX_STEP = 2.0  # far from the optimum the curvature is flat, and a full step overshoots
CONVERGED = 1e-10  # size of a step


class LengthControl(NamedTuple):
    """The win rate at equal length, and what it rests on."""

    win_rate: Score
    slope: Score  # in AlpacaEval's direction: negative if the longer response wins more often
    shorter: float  # share of the pairs in which our response is the shorter one
    longer: float
    equal: float

    def counts(self) -> dict[str, object]:
        """Return the slope with its interval and the shares of lengths, as JSON."""
        slope = {"value": self.slope.value, "low": self.slope.low, "high": self.slope.high, "prior": PRIOR_SLOPE}
        return {"slope": slope, "shorter": self.shorter, "longer": self.longer, "equal": self.equal}


class _Fit(NamedTuple):
    quality: float  # log-odds that our response wins at equal length
    slope: float


class Prior(NamedTuple):
    """Independent normal priors of the coefficients."""

    mean: np.ndarray
    precision: np.ndarray


def length_control(
    wins: np.ndarray, longer_by: np.ndarray, questions: Sequence[Sequence[int]] | None = None
) -> LengthControl:
    """Return the win rate at equal length, with 95 % intervals over questions and the prior of the slope.

    `wins`, shape [N], are from 0 to 1: outcomes, or probabilities. `longer_by`, shape [N], is the length of our
    response minus the baseline's, in characters. Where nearly all responses of one side are shorter, the outcomes do
    not tell a preference for length from a difference in quality, and the slope stays at its prior. `questions` are the
    indices of each question's pairs; each pair is a question of its own by default.
    """
    members = [np.array(own) for own in (questions or [[index] for index in range(len(wins))])]
    best = _fit(wins, longer_by, PRIOR_SLOPE)
    draw = np.random.default_rng(0)
    slopes: list[float] = []

    def resampled(chosen: np.ndarray) -> float:
        chosen = np.concatenate([members[question] for question in chosen])
        # The prior's mean is drawn too: otherwise a slope held by the prior would seem to be known exactly.
        fit = _fit(wins[chosen], longer_by[chosen], draw.normal(PRIOR_SLOPE, PRIOR_DEVIATION))
        slopes.append(fit.slope)
        return float(sigmoid(fit.quality))

    low, high = bootstrap_interval(resampled, len(members), resamples=RESAMPLES)
    slope_low, slope_high = np.quantile(slopes, [0.025, 0.975])
    return LengthControl(
        Score(float(sigmoid(best.quality)), low, high, len(members)),
        Score(best.slope, float(slope_low), float(slope_high), len(members)),
        shorter=float((longer_by < 0).mean()),
        longer=float((longer_by > 0).mean()),
        equal=float((longer_by == 0).mean()),
    )


def _fit(wins: np.ndarray, longer_by: np.ndarray, prior_slope: float) -> _Fit:
    """Return the slope of balanced pairs under its prior, and the quality of all pairs under that slope."""
    length = _length_term(longer_by)
    constant = np.ones_like(length)
    prior = Prior(np.array([0.0, prior_slope]), np.array([RIDGE, PRIOR_DEVIATION**-2]))
    _, slope = maximize(np.stack([constant, length], axis=1), wins, prior, weights=_balance(longer_by))
    (quality,) = maximize(constant[:, None], wins, Prior(np.zeros(1), np.array([RIDGE])), offset=slope * length)
    return _Fit(float(quality), float(slope))


def _length_term(longer_by: np.ndarray) -> np.ndarray:
    """Return tanh((len_baseline - len_ours) / deviation); its limit, the sign, if all differences are equal."""
    deviation = float(longer_by.std(ddof=1)) if len(longer_by) > 1 else 0.0
    return np.tanh(-longer_by / deviation) if deviation else -np.sign(longer_by)


def _balance(longer_by: np.ndarray) -> np.ndarray:
    """Return weights, shape [N], under which pairs with a shorter and with a longer response count the same in total.

    The side with more pairs is weighted down; to 0 if the other has none, so that the slope is the prior's.
    """
    shorter, longer = longer_by < 0, longer_by > 0
    smaller_side = min(shorter.sum(), longer.sum())
    weights = np.ones_like(longer_by)
    for side in (shorter, longer):
        weights[side] = smaller_side / max(side.sum(), 1)
    return weights


def maximize(
    inputs: np.ndarray,
    wins: np.ndarray,
    prior: Prior,
    *,
    weights: np.ndarray | float = 1.0,
    offset: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return the coefficients, shape [P], with the highest posterior of a logistic model of `wins`, shape [N].

    The log-odds are `inputs`, shape [N, P], times the coefficients, plus `offset`. Fitted by Newton's method.
    """
    coefficients = prior.mean.copy()
    for _ in range(MAX_STEPS):
        predicted = sigmoid(inputs @ coefficients + offset)
        gradient = inputs.T @ (weights * (predicted - wins)) + prior.precision * (coefficients - prior.mean)
        information = (inputs * (weights * predicted * (1 - predicted))[:, None]).T @ inputs
        step = np.linalg.solve(information + np.diag(prior.precision), gradient)
        coefficients -= np.clip(step, -MAX_STEP, MAX_STEP)
        if np.abs(step).max() < CONVERGED:
            break
    return coefficients


def sigmoid(values: np.ndarray | float) -> np.ndarray:
    """Return the logistic function."""
    return 1 / (1 + np.exp(-values))
