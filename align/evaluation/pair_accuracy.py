"""Accuracy of rewards on pairs of responses: overall, by margin and by subset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from align.evaluation.statistics import score
from align.records import Comparison

if TYPE_CHECKING:  # imports torch
    from align.data.token_groups import TokenGroup

NUM_BINS = 3  # of margins, with about equally many pairs each


class Pair(NamedTuple):
    """Two responses to a prompt, one of which the data prefers."""

    row: int
    margin: float  # difference of the data's own rewards; negative if its label contradicts them
    correct: float  # 1 if the predicted rewards prefer the same response, 0.5 if they are equal, else 0
    subset: str | None = None


def preference_pairs(
    row: int,
    comparison: Comparison | TokenGroup,
    rewards: Sequence[float],
    *,
    weights: Mapping[str, float],
    subset: str | None = None,
) -> list[Pair]:
    """Return every pair of the comparison's responses that the data ranks, and whether `rewards` agree.

    The data ranks by its label, then by its rewards; without either, by the weighted sum of the attributes.
    """
    known = _data_rewards(comparison, weights)
    if known is None:
        return []
    ranks = list(known)
    if comparison.chosen is not None:
        ranks[comparison.chosen] = float("inf")
    found: list[Pair] = []
    for one, other in combinations(range(len(ranks)), 2):
        if ranks[one] != ranks[other]:
            better, worse = (one, other) if ranks[one] > ranks[other] else (other, one)
            lead = rewards[better] - rewards[worse]
            correct = 1.0 if lead > 0 else 0.5 if lead == 0 else 0.0
            found.append(Pair(row, known[better] - known[worse], correct, subset))
    return found


def _data_rewards(comparison: Comparison | TokenGroup, weights: Mapping[str, float]) -> list[float] | None:
    """Return the reward of each response according to the data; None if a response has none."""
    if isinstance(comparison, Comparison):
        given = [response.reward for response in comparison.responses if response.reward is not None]
        attributes = [response.attributes for response in comparison.responses]
    else:
        given = list(comparison.rewards or ())
        attributes = comparison.attributes
    if given:
        return given
    if comparison.chosen is not None:
        return [float(index == comparison.chosen) for index in range(len(attributes))]
    if not all(weights.keys() <= known.keys() for known in attributes):
        return None
    return [sum(weight * known[name] for name, weight in weights.items()) for known in attributes]


def pair_accuracy(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the share of correct pairs with its interval: `all`, `by_margin` and `by_subset`; empty without pairs."""
    if not pairs:
        return {}
    found: dict[str, Any] = {"all": _share(pairs), "by_margin": [], "by_subset": []}
    margins = sorted(pair.margin for pair in pairs)
    # Equal margins share a bin, so few distinct margins give fewer or unequal bins.
    bounds = sorted({margins[len(margins) * part // NUM_BINS - 1] for part in range(1, NUM_BINS)} - {margins[-1]})
    for low, high in zip([float("-inf"), *bounds], [*bounds, float("inf")], strict=True):
        members = [pair for pair in pairs if low < pair.margin <= high]
        if members:
            first, last = min(pair.margin for pair in members), max(pair.margin for pair in members)
            found["by_margin"].append({"margin": [first, last], **_share(members)})
    for name in sorted({pair.subset for pair in pairs if pair.subset is not None}):
        found["by_subset"].append({"subset": name, **_share([pair for pair in pairs if pair.subset == name])})
    return found


def _share(pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the share of correct pairs. Its interval is over prompts, as pairs of one prompt are not independent."""
    by_row: dict[int, list[float]] = {}
    for pair in pairs:
        by_row.setdefault(pair.row, []).append(pair.correct)
    found = score([sum(each) for each in by_row.values()], [len(each) for each in by_row.values()])
    return {**found._asdict(), "pairs": len(pairs)}
