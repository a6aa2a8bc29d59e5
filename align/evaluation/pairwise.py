"""How often a judge prefers a policy's responses to a baseline's, and how often it would at equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.errors import InputError
from align.evaluation.statistics import Score, interval, score
from align.rewards.verdicts import Group, Judge, Verdict

RESAMPLES = 200  # of the length-controlled rate, each of which is a fit
RIDGE = 1e-2  # keeps the fit finite where length alone decides every comparison
MOST_STEPS = 50  # of Newton's method; it needs fewer than ten


def result(verdicts: tuple[Verdict, ...]) -> float | None:
    """1 where the first of two responses wins, 0 where it loses, 0.5 for a tie; None where the judge says nothing."""
    ours, theirs = (verdict.reward for verdict in verdicts)
    if ours is None or theirs is None:
        return None
    return 0.5 if ours == theirs else float(ours > theirs)


def win_rates(groups: Sequence[Group], judge: Judge) -> dict[str, Any]:
    """Win rates of each group's first response over its second: as judged, and length-controlled; and what is void.

    A judge that compares asks in both orders and says nothing where they disagree; such prompts are counted and left
    out of the rates.
    """
    if wrong := [number for number, (_, responses) in enumerate(groups) if len(responses) != 2]:  # noqa: PLR2004
        raise InputError(f"win rate: prompt {wrong[0] + 1} has {len(groups[wrong[0]][1])} responses; two are compared")
    results = [result(verdicts) for verdicts in judge(groups)]
    decided = [index for index, value in enumerate(results) if value is not None]
    void = len(results) - len(decided)
    if not decided:
        raise InputError(f"win rate: the judge decides none of {len(results)} comparisons")
    wins = np.array([results[index] for index in decided], dtype=np.float64)
    longer = np.array([len(groups[index][1][0]) - len(groups[index][1][1]) for index in decided], dtype=np.float64)
    return {
        "win_rate": score(wins.tolist()),
        "win_rate_length_controlled": length_controlled(wins, longer),
        "undecided": void,
    }


def length_controlled(wins: np.ndarray, longer: np.ndarray) -> Score:
    """The win rate that a logistic model of `wins` gives where both responses are equally long.

    Dubois et al. 2024 (Length-Controlled AlpacaEval), eq. 1 with its terms of the model and of length,
    tanh(difference / its deviation); the difficulty of each instruction, which they fit over many models, is left out.
    """

    def rate(chosen: np.ndarray) -> float:
        deviation = float(longer[chosen].std())
        return fitted_intercept(wins[chosen], np.tanh(longer[chosen] / deviation) if deviation else 0 * longer[chosen])

    low, high = interval(rate, len(wins), resamples=RESAMPLES)
    return Score(rate(np.arange(len(wins))), low, high, len(wins))


def fitted_intercept(wins: np.ndarray, length: np.ndarray) -> float:
    """sigmoid(a) of the a, b that maximise the likelihood of `wins` under sigmoid(a + b length), by Newton's method."""
    inputs = np.stack([np.ones_like(length), length], axis=1)
    weights = np.zeros(2)
    for _ in range(MOST_STEPS):
        chance = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (chance - wins) + RIDGE * weights
        curvature = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights -= np.clip(step, -2, 2)  # far out the curvature is flat and a full step overshoots
        if np.abs(step).max() < 1e-10:  # noqa: PLR2004 - rounding
            break
    return float(_sigmoid(weights[:1])[0])


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))
