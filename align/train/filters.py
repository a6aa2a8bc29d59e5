"""Filters of the records that an objective can train on and of the groups that contribute to its loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from align.data.group_columns import sequence_key
from align.data.readers.pairs import LABELLED_RESPONSE, LIKED
from align.data.rejections import DROPPED, Rejections
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.losses.unpaired import DESIRABLE, lack_of_labels
from align.records import Comparison, Demonstration, Located, Prompt, Record
from align.train.objectives.reward import BradleyTerryObjective
from align.train.settings import RewardLoss

Groups = Iterable[Located[TokenGroup]]
Identical = Literal["drop", "keep"]

REJECTED_IS_BETTER = "a rejected response has a higher reward"
IDENTICAL = "identical responses"


def of_kind(
    records: Iterable[Located[Record]], kind: type[Demonstration | Comparison], rejections: Rejections
) -> Iterator[Located[Demonstration | Comparison]]:
    """Yield the records as demonstrations or comparisons; their number and those dropped are counted.

    The best response of a comparison becomes a demonstration where demonstrations are needed. Any other kind of record
    is an error of its row.
    """
    for located in records:
        rejections.counts["records"] += 1
        record = None
        with rejections.at(located.place):
            record = _as_kind(located.record, kind, rejections.counts)
        if record is not None:
            yield Located(record, located.place, located.row, located.metadata)


def _as_kind(
    record: Record, kind: type[Demonstration | Comparison], counts: Counter[str]
) -> Demonstration | Comparison | None:
    """Return the record as one of the kind, or None if none of its responses is known to be the best."""
    if kind is Demonstration and isinstance(record, Comparison):
        return best_demonstration(record, counts)
    if isinstance(record, kind):
        return record
    names = {Demonstration: "a demonstration", Comparison: "a comparison", Prompt: "a prompt without a response"}
    needs = "comparisons of responses" if kind is Comparison else "demonstrations"
    raise InputError(f"the row is {names[type(record)]}, but training needs {needs}")


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
    messages = (*comparison.prompt, responses[best].message)
    return Demonstration(messages, comparison.metadata, responses[best].finish, comparison.tools)


def distinct(groups: Groups, counts: Counter[str], *, identical: Identical = "drop") -> Iterator[Located[TokenGroup]]:
    """Yield the groups with two different responses, and count those with one sequence several times.

    Sequences are compared as they are trained on, trimmed and cut. With "keep" all groups are yielded. Groups whose
    preferred response has a lower reward than another are counted, too.
    """
    for located in groups:
        group = located.record
        num_repeated = len(group.sequences) - len(set(map(sequence_key, group.sequences)))
        if group.chosen is not None and group.rewards and group.rewards[group.chosen] < max(group.rewards):
            counts[REJECTED_IS_BETTER] += 1
        if num_repeated and num_repeated == len(group.sequences) - 1:
            counts[f"{DROPPED}{IDENTICAL}" if identical == "drop" else IDENTICAL] += 1
            if identical == "drop":
                continue
        elif num_repeated:
            counts["repeated responses in groups"] += num_repeated
        yield located


def comparable(
    groups: Groups, rejections: Rejections, *, reward_loss: str | None, min_chosen: float | None
) -> Iterator[Located[TokenGroup]]:
    """Yield the groups that contribute to a preference loss; the others are counted by reason.

    `reward_loss` is the name of a loss that uses rewards, or None for a loss that needs only a preferred response.
    Groups whose best response has a reward below `min_chosen` are dropped. A single response with a label is an error.
    """
    counts = rejections.counts
    for located in groups:
        group = located.record
        if len(group.sequences) < 2 and LIKED in located.metadata:  # noqa: PLR2004 - a comparison takes two
            with rejections.at(located.place):
                raise InputError(f"the row is {LABELLED_RESPONSE}")
        elif len(group.sequences) < 2:  # noqa: PLR2004
            counts["dropped:one response"] += 1
        elif group.rewards is None and (reward_loss is not None or min_chosen is not None):
            with rejections.at(located.place):
                reader = reward_loss if reward_loss is not None else "min_chosen"
                raise InputError(f"the row has no rewards, and {reader} needs them")
        elif min_chosen is not None and _best_reward(group) < min_chosen:
            counts["dropped:best reward below min_chosen"] += 1
        elif reward_loss is None and group.chosen is None and len(set(group.rewards or ())) < 2:  # noqa: PLR2004
            counts["dropped:no response is preferred"] += 1
        else:
            yield located


def with_labels(groups: Groups, rejections: Rejections, *, loss: str) -> Iterator[Located[TokenGroup]]:
    """Yield the groups whose responses all have a label, a reward of 1 or 0, and count the responses of each kind.

    `loss` is the name of the loss, for errors. Any other group is an error of its row.
    """
    for located in groups:
        rewards = located.record.rewards
        lack = lack_of_labels(rewards, loss)
        if lack is not None:
            with rejections.at(located.place):
                raise InputError(lack)
            continue
        num_desirable = sum(reward > DESIRABLE for reward in rewards or ())
        rejections.counts["desirable"] += num_desirable
        rejections.counts["undesirable"] += len(rewards or ()) - num_desirable
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


def with_pairs(groups: Groups, rejections: Rejections, *, loss: RewardLoss) -> Iterator[Located[TokenGroup]]:
    """Yield the groups with two responses that a Bradley-Terry loss can rank; the others are counted."""
    has_pair, counts = BradleyTerryObjective(loss, ()).has_pair, rejections.counts
    for located in groups:
        if loss != "bt" and located.record.rewards is None:
            with rejections.at(located.place):
                raise InputError(f"the row has no rewards, and {loss} needs them for its margin")
        elif has_pair(located.record):
            yield located
        else:
            counts["dropped:no response is preferred"] += 1
