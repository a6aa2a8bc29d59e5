"""How often a reward puts the better of two responses first: by row, by margin and by subset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from align.data.token_groups import TokenGroup
from align.evaluation import score
from align.records import Comparison

NUM_BINS = 3  # of margins, with about equally many pairs each


class Pair(NamedTuple):
    """Two responses to a prompt of which the data prefers one."""

    row: int
    margin: float  # by how much it does, in its own rewards; below 0 where its label goes against them
    right: float  # 1 where the reward in question prefers the same, 0.5 where it tells them not apart
    subset: str | None = None


def pairs_of(
    row: int,
    comparison: Comparison | TokenGroup,
    rewards: Sequence[float],
    *,
    worth: Mapping[str, float],
    subset: str | None = None,
) -> list[Pair]:
    """Every pair of the comparison's responses that it sets apart, and how the rewards judge them.

    What the data prefers is its label, then its rewards; without either, its attributes by what each is `worth`.
    """
    known = own_rewards(comparison, worth)
    if known is None:
        return []
    order = list(known)
    if comparison.chosen is not None:
        order[comparison.chosen] = float("inf")
    found: list[Pair] = []
    for one, other in combinations(range(len(order)), 2):
        if order[one] != order[other]:
            better, worse = (one, other) if order[one] > order[other] else (other, one)
            lead = rewards[better] - rewards[worse]
            right = 1.0 if lead > 0 else 0.5 if lead == 0 else 0.0
            found.append(Pair(row, known[better] - known[worse], right, subset))
    return found


def own_rewards(comparison: Comparison | TokenGroup, worth: Mapping[str, float]) -> list[float] | None:
    """What the data says that each response is worth; None where it says nothing of one of them."""
    if isinstance(comparison, TokenGroup):
        given, attributes = list(comparison.rewards or ()), comparison.attributes
    else:
        given = [response.reward for response in comparison.responses if response.reward is not None]
        attributes = [response.attributes for response in comparison.responses]
    if given:
        return given
    if comparison.chosen is not None:
        return [float(index == comparison.chosen) for index in range(len(attributes))]
    if not all(worth.keys() <= known.keys() for known in attributes):
        return None
    return [sum(weight * known[name] for name, weight in worth.items()) for known in attributes]


def accuracy(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The share of pairs that are put right, with its interval: overall, by margin and by subset."""
    if not pairs:
        return {}
    found: dict[str, Any] = {"all": _share(pairs), "by_margin": [], "by_subset": []}
    margins = sorted(pair.margin for pair in pairs)
    # Equal margins stay together, so that bins of few distinct margins are fewer or unequal.
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
    """Pairs of one prompt are not independent: the interval is over prompts."""
    rights: dict[int, list[float]] = {}
    for pair in pairs:
        rights.setdefault(pair.row, []).append(pair.right)
    found = score([sum(each) for each in rights.values()], [len(each) for each in rights.values()])
    return {**found._asdict(), "pairs": len(pairs)}
