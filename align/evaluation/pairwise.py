"""Win rates of a policy over a baseline by a judge, plain and length-controlled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from align.errors import InputError
from align.evaluation.statistics import Score, bootstrap_interval, score
from align.registry import LazyModule
from align.rewards.verdicts import Group, Judge, Verdict

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")  # a recipe's tasks are validated without it

RESAMPLES = 200  # of the length-controlled rate, each of which fits a model
RIDGE = 1e-2  # keeps the fit finite if length alone determines every comparison
MAX_STEPS = 50  # of Newton's method, which needs fewer than ten
MAX_STEP = 2.0  # far from the optimum the curvature is flat, and a full step overshoots
CONVERGED = 1e-10  # size of a step
PAIR = 2


class WinRates(NamedTuple):
    """Win rates over the decided comparisons."""

    win_rate: Score
    length_controlled: Score
    undecided: int  # comparisons without a verdict, which are not in the rates


def outcome(verdicts: tuple[Verdict, ...]) -> float | None:
    """Return 1 if the first of two responses wins, 0 if it loses, 0.5 for a tie, None if either has no reward."""
    ours, theirs = (verdict.reward for verdict in verdicts)
    if ours is None or theirs is None:
        return None
    return 0.5 if ours == theirs else float(ours > theirs)


def win_rates(groups: Sequence[Group], judge: Judge) -> WinRates:
    """Return the win rates of each group's first response over its second.

    A judge that compares responses asks in both orders and gives no reward if the answers disagree; such comparisons
    are counted as undecided. Raises `InputError` if a group does not have two responses or nothing is decided.
    """
    if wrong := [number for number, (_, responses) in enumerate(groups) if len(responses) != PAIR]:
        raise InputError(f"win rate: prompt {wrong[0] + 1} has {len(groups[wrong[0]][1])} responses; it needs two")
    outcomes = [outcome(verdicts) for verdicts in judge(groups)]
    decided = [index for index, value in enumerate(outcomes) if value is not None]
    if not decided:
        raise InputError(f"win rate: the judge decides none of {len(outcomes)} comparisons")
    wins = np.array([outcomes[index] for index in decided], dtype=np.float64)
    lengths = [(len(ours), len(theirs)) for ours, theirs in (groups[index][1] for index in decided)]
    longer_by = np.array([ours - theirs for ours, theirs in lengths], dtype=np.float64)
    return WinRates(score(wins.tolist()), length_controlled(wins, longer_by), len(outcomes) - len(decided))


def length_controlled(wins: np.ndarray, longer_by: np.ndarray) -> Score:
    """Return the win rate at equal length, by a logistic model of `wins`.

    `longer_by` is the length of our response minus the baseline's, in characters. Dubois et al. 2024 (Length-Controlled
    AlpacaEval), eq. 1, with its terms for the model and for length, tanh(difference / standard deviation). The
    instruction's difficulty, which they fit over many models, is left out.
    """

    def rate(chosen: np.ndarray) -> float:
        deviation = float(longer_by[chosen].std())
        length = np.tanh(longer_by[chosen] / deviation) if deviation else 0 * longer_by[chosen]
        return fitted_intercept(wins[chosen], length)

    low, high = bootstrap_interval(rate, len(wins), resamples=RESAMPLES)
    return Score(rate(np.arange(len(wins))), low, high, len(wins))


def fitted_intercept(wins: np.ndarray, length: np.ndarray) -> float:
    """Return sigmoid(a) for the a, b that maximize the likelihood of `wins` under sigmoid(a + b * length).

    Fitted by Newton's method with a ridge penalty of `RIDGE`.
    """
    inputs = np.stack([np.ones_like(length), length], axis=1)
    weights = np.zeros(2)
    for _ in range(MAX_STEPS):
        predicted = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (predicted - wins) + RIDGE * weights
        curvature = (inputs * (predicted * (1 - predicted))[:, None]).T @ inputs + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights -= np.clip(step, -MAX_STEP, MAX_STEP)
        if np.abs(step).max() < CONVERGED:
            break
    return float(_sigmoid(weights[:1])[0])


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))
