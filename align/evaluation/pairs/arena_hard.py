"""Arena-Hard's score of a model against the baseline, without and with control of style.

A verdict is one battle, and `>>` is three; a tie counts one half. Every model meets the baseline only, so the
parameters of a Bradley-Terry model separate, and its score is the weighted mean of the outcomes. Prompts are resampled
for intervals, not battles: both games of a prompt are of the same responses, and three battles are one observation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align.evaluation.pairs.length_control import Prior, maximize, sigmoid
from align.evaluation.pairs.table import MAX_GAMES, JudgedPair
from align.evaluation.statistics import Score, bootstrap_interval, score
from align.registry import LazyModule

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")  # a recipe's tasks are validated without it

CLEAR_WEIGHT = 3  # battles of a `>>` verdict
RULES = ("v0.1", "v2")  # v2 leaves out both games of a prompt if one is void, v0.1 only that one
CODE = re.compile(r"```([^`]*)```")  # removed before markdown is counted
HEADER, BOLD = re.compile(r"^#{1,6}\s", re.MULTILINE), re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
LIST_ITEM = re.compile(r"^[^\S\n]*(\d+\.|[-*+])\s", re.MULTILINE)
MARKDOWN = (HEADER, LIST_ITEM, BOLD)
CONTROLS = {"equal_length": slice(0, 1), "equal_markdown": slice(1, 4), "equal_style": slice(0, 4)}
RIDGE = 1e-2  # of every coefficient, which is infinite without it if the style decides everything
RESAMPLES = 200  # each of which fits the model


class Battles(NamedTuple):
    """The outcome of each game that counts, with its weight and the number of its pair; arrays of shape [N]."""

    wins: np.ndarray
    weights: np.ndarray
    pair: np.ndarray


def battles(pairs: Sequence[JudgedPair], rule: str) -> Battles:
    """Return the battles of the pairs by a rule of `RULES`."""
    rows = [
        (game.win, CLEAR_WEIGHT if game.is_clear else 1, number)
        for number, pair in enumerate(pairs)
        for game in pair.games
        if game.win is not None and (rule == "v0.1" or _is_complete(pair))
    ]
    wins, weights, numbers = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    return Battles(wins, weights, numbers.astype(int))


def _is_complete(pair: JudgedPair) -> bool:
    return len(pair.games) == MAX_GAMES and None not in pair.wins


def arena_hard_score(pairs: Sequence[JudgedPair], rule: str) -> Score | None:
    """Return the share of battles that the model wins, with its 95 % interval over prompts; None without a battle."""
    found = battles(pairs, rule)
    if not len(found.wins):
        return None
    sums = np.bincount(found.pair, found.wins * found.weights, minlength=len(pairs))
    counts = np.bincount(found.pair, found.weights, minlength=len(pairs))
    known = counts > 0
    return score(sums[known].tolist(), counts[known].tolist())


def score_value(pairs: Sequence[JudgedPair], rule: str) -> float | None:
    """Return the score without its interval."""
    found = battles(pairs, rule)
    return float(found.wins @ found.weights / found.weights.sum()) if len(found.wins) else None


class StyleControl(NamedTuple):
    """The score at equal style, and the coefficients of style: the change in log-odds per standard deviation."""

    score: Score
    coefficients: list[float]


def style_control(
    pairs: Sequence[JudgedPair], rule: str, control: str, *, lengths: np.ndarray | None = None
) -> StyleControl:
    """Return the score at a style difference of 0, by the terms of `CONTROLS`.

    The logistic model of a battle has the model's term and terms of style: relative differences of length and of the
    number of headers, list items and bold texts per unit of length, each divided by its standard deviation. They are
    not centred. Published scores are: they are those at the mean difference of style over all models of a leaderboard,
    and so not at equal style. Their coefficients are fitted over all models, these over one model's battles.

    `lengths`, shape [N pairs, 2], are those of the model's and the baseline's responses, such as numbers of tokens; in
    characters by default. All responses must be known.
    """
    found = battles(pairs, rule)
    features = style_features(pairs, lengths)[:, CONTROLS[control]]
    deviation = features[found.pair].std(axis=0)
    inputs = np.concatenate([np.ones((len(pairs), 1)), features / np.where(deviation > 0, deviation, 1)], axis=1)
    prior = Prior(np.zeros(inputs.shape[1]), np.full(inputs.shape[1], RIDGE))
    by_pair = [np.flatnonzero(found.pair == number) for number in range(len(pairs))]

    def fit(chosen: np.ndarray) -> np.ndarray:
        rows = np.concatenate([by_pair[number] for number in chosen])
        return maximize(inputs[found.pair[rows]], found.wins[rows], prior, weights=found.weights[rows])

    counted = np.unique(found.pair)  # pairs with a battle
    best = fit(counted)
    low, high = bootstrap_interval(
        lambda chosen: float(sigmoid(fit(counted[chosen])[0])), len(counted), resamples=RESAMPLES
    )
    return StyleControl(Score(float(sigmoid(best[0])), low, high, len(counted)), best[1:].tolist())


def style_features(pairs: Sequence[JudgedPair], lengths: np.ndarray | None = None) -> np.ndarray:
    """Return relative differences of length, headers, list items and bold texts, shape [N pairs, 4].

    Of length it is (a - b) / (a + b), of the number of each kind of markdown per unit of length
    (a - b) / (a + b + 1), as in Arena-Hard v2. Code blocks have no markdown.
    """
    texts = [(pair.games[0].a or "", pair.games[0].b or "") for pair in pairs]
    if lengths is None:
        lengths = np.array([[len(text) for text in both] for both in texts], dtype=np.float64)
    counts = np.array([[markdown_counts(text) for text in both] for both in texts], dtype=np.float64)
    density = counts / np.maximum(lengths, 1)[:, :, None]
    length = (lengths[:, 0] - lengths[:, 1]) / np.maximum(lengths.sum(axis=1), 1)
    markdown = (density[:, 0] - density[:, 1]) / (density[:, 0] + density[:, 1] + 1)
    return np.concatenate([length[:, None], markdown], axis=1)


def markdown_counts(text: str) -> list[int]:
    r"""Return the numbers of headers, list items and bold texts outside code blocks.

    >>> markdown_counts("# Title\\n- **one**\\n```\\n# no header\\n```")
    [1, 1, 1]
    """
    plain = CODE.sub("", text)
    return [len(pattern.findall(plain)) for pattern in MARKDOWN]


def style_counts(controls: dict[str, StyleControl]) -> dict[str, Any]:
    """Return the coefficients of each control, as JSON."""
    names = ["length", "headers", "list_items", "bold"]
    return {name: dict(zip(names[CONTROLS[name]], each.coefficients, strict=True)) for name, each in controls.items()}
