"""Filters: which records an objective can train on, and which groups contribute to its loss; the others are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from align.data.readers.pairs import LIKED
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.records import Comparison, Demonstration, Located, Message, Prompt, Record
from align.train.objectives.reward import BradleyTerryObjective
from align.train.settings import RewardLoss

Groups = Iterable[Located[TokenGroup]]


def of_kind(
    records: Iterable[Located[Record]], kind: type[Demonstration | Comparison], counts: Counter[str]
) -> Iterator[Located[Demonstration | Comparison]]:
    """Yield the records as demonstrations or comparisons; `counts` receives their number and those dropped.

    The best response of a comparison becomes a demonstration where demonstrations are needed. Raises `InputError` for
    any other kind of record.
    """
    names = {Demonstration: "a demonstration", Comparison: "a comparison", Prompt: "a prompt without a response"}
    for located in records:
        counts["records"] += 1
        record: Record | None = located.record
        if kind is Demonstration and isinstance(record, Comparison):
            record = best_demonstration(record, counts)
        if record is None:
            continue
        if isinstance(record, Prompt) or not isinstance(record, kind):
            needs = "comparisons of responses" if kind is Comparison else "demonstrations"
            raise InputError(f"{located.place}: the row is {names[type(record)]}, but training needs {needs}")
        yield Located(record, located.place, located.row, located.metadata)


def best_demonstration(comparison: Comparison, counts: Counter[str]) -> Demonstration | None:
    """Return the best response as a demonstration, or None, with the reason in `counts`, if no response is known to be.

    A single response is the best unless the row says that it was disliked.
    """
    responses, best = comparison.responses, comparison.chosen
    rewards = [response.reward for response in responses if response.reward is not None]
    if best is None and len(responses) == 1:
        best = 0 if comparison.metadata.get(LIKED, True) else None
    elif best is None and len(set(rewards)) > 1:
        best = rewards.index(max(rewards))
    if best is None:
        counts["dropped:not liked" if len(responses) == 1 else "dropped:no response is preferred"] += 1
        return None
    if len(responses) > 1:
        counts["best of a comparison"] += 1
    answer = Message("assistant", responses[best].content)
    return Demonstration((*comparison.prompt, answer), comparison.metadata, responses[best].finish)


def comparable(
    groups: Groups, counts: Counter[str], *, reward_loss: str | None, min_chosen: float | None
) -> Iterator[Located[TokenGroup]]:
    """Yield the groups that contribute to a preference loss; `counts` receives the others by reason.

    `reward_loss` is the name of a loss that uses rewards, or None for a loss that needs only a preferred response.
    Groups whose best response has a reward below `min_chosen` are dropped.
    """
    for located in groups:
        group = located.record
        if len(group.sequences) < 2:  # noqa: PLR2004 - a comparison takes two
            counts["dropped:one response"] += 1
        elif group.rewards is None and (reward_loss is not None or min_chosen is not None):
            reader = reward_loss if reward_loss is not None else "min_chosen"
            raise InputError(f"{located.place}: the row has no rewards, and {reader} needs them")
        elif min_chosen is not None and _best_reward(group) < min_chosen:
            counts["dropped:best response too bad"] += 1
        elif reward_loss is None and group.chosen is None and len(set(group.rewards or ())) < 2:  # noqa: PLR2004
            counts["dropped:no response is preferred"] += 1
        else:
            yield located


def _best_reward(group: TokenGroup) -> float:
    """Return the reward of the chosen response, else the largest reward."""
    assert group.rewards is not None
    return group.rewards[group.chosen] if group.chosen is not None else max(group.rewards)


def labelled(
    groups: Groups, counts: Counter[str], *, attributes: Sequence[str], path: str
) -> Iterator[Located[TokenGroup]]:
    """Yield the groups with a labelled attribute; `counts` receives the others.

    Raises `InputError`, after the last group, for labels of other attributes, or if no group has a label.
    """
    found = set[str]()
    for located in groups:
        found.update(*located.record.attributes)
        if any(located.record.attributes):
            yield located
        else:
            counts["dropped:no label"] += 1
    if unknown := sorted(found - set(attributes)):
        raise InputError(
            f"{path}: the model has no attribute {unknown[0]!r}, only {', '.join(attributes)}; set head.attributes to "
            f"the attributes of the rows: {', '.join(sorted(found))}"
        )
    if not found and counts["dropped:no label"]:
        raise InputError(f"{path}: no response has an attribute; regression needs {', '.join(attributes)}")


def with_pairs(groups: Groups, counts: Counter[str], *, loss: RewardLoss) -> Iterator[Located[TokenGroup]]:
    """Yield the groups with two responses that a Bradley-Terry loss can rank; `counts` receives the others."""
    has_pair = BradleyTerryObjective(loss, ()).has_pair
    for located in groups:
        if loss != "bt" and located.record.rewards is None:
            raise InputError(f"{located.place}: the row has no rewards, and {loss} needs them for its margin")
        if has_pair(located.record):
            yield located
        else:
            counts["dropped:no response is preferred"] += 1
