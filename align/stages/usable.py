"""Which records a step can train on, and which of their groups say something to its loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from align.data.comparisons import LIKED
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.losses.table import preference_loss
from align.records import Comparison, Demonstration, Located, Message, Prompt, Record
from align.stages.steps import PreferenceStep, RewardStep
from align.train.reward_objective import BradleyTerryObjective


def of_kind(
    found: Iterable[Located[Record]], kind: type[Demonstration | Comparison], counts: Counter[str]
) -> Iterator[Located[Demonstration | Comparison]]:
    """Yield the records as the kind that a stage trains on; `counts` receives their number and those dropped.

    The best response of a comparison becomes a demonstration where the stage needs one.
    """
    names = {Demonstration: "a demonstration", Comparison: "a comparison", Prompt: "a prompt without a response"}
    for located in found:
        counts["records"] += 1
        record: Record | None = located.record
        if kind is Demonstration and isinstance(record, Comparison):
            record = imitated(record, counts)
        if record is None:
            continue
        if isinstance(record, Prompt) or not isinstance(record, kind):
            needs = "comparisons of responses" if kind is Comparison else "demonstrations"
            raise InputError(f"{located.place}: this is {names[type(record)]}, and the stage needs {needs}")
        yield Located(record, located.place, located.row, located.metadata)


def imitated(comparison: Comparison, counts: Counter[str]) -> Demonstration | None:
    """The preferred response as one to imitate, or the only one unless it is disliked; what is not is counted."""
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
    return Demonstration((*comparison.prompt, Message("assistant", responses[best].content)), comparison.metadata)


def comparable(
    groups: Iterable[Located[TokenGroup]], step: PreferenceStep, counts: Counter[str]
) -> Iterator[Located[TokenGroup]]:
    """The groups that say something to the step's loss; the others are counted by what they lack."""
    needs_values = preference_loss(step.loss.name, **step.loss.settings).uses_rewards
    for located in groups:
        group = located.record
        if len(group.sequences) < 2:  # noqa: PLR2004 - a comparison takes two
            counts["dropped:one response"] += 1
        elif group.rewards is None and (needs_values or step.min_chosen is not None):
            wants = f"{step.loss.name} aims at them" if needs_values else "min_chosen looks at them"
            raise InputError(f"{located.place}: the row has no rewards, and {wants}")
        elif step.min_chosen is not None and _of_best(group) < step.min_chosen:
            counts["dropped:best response too bad"] += 1
        elif not needs_values and group.chosen is None and len(set(group.rewards or ())) < 2:  # noqa: PLR2004
            counts["dropped:no response is preferred"] += 1
        else:
            yield located


def _of_best(group: TokenGroup) -> float:
    """The reward of the response that the row prefers."""
    assert group.rewards is not None
    return group.rewards[group.chosen] if group.chosen is not None else max(group.rewards)


def telling(
    groups: Iterable[Located[TokenGroup]], step: RewardStep, attributes: Sequence[str], counts: Counter[str], path: str
) -> Iterator[Located[TokenGroup]]:
    """The groups that say something to a reward model's loss; the others are counted."""
    if step.loss == "regression":
        found = set[str]()
        for located in groups:
            found.update(*located.record.attributes)
            if any(located.record.attributes):
                yield located
            else:
                counts["dropped:no label"] += 1
        if unknown := sorted(found - set(attributes)):
            raise InputError(
                f"{path}: attribute {unknown[0]!r} is none of the model's ({', '.join(attributes)}); "
                f"head.attributes names what the data rates: {', '.join(sorted(found))}"
            )
        if not found and counts["dropped:no label"]:
            raise InputError(f"{path}: no response has an attribute; regression needs {', '.join(attributes)}")
        return
    has_pair = BradleyTerryObjective(step.loss, ()).has_pair
    for located in groups:
        if step.loss != "bt" and located.record.rewards is None:
            raise InputError(f"{located.place}: the row has no rewards, and {step.loss} takes its margin")
        if has_pair(located.record):
            yield located
        else:
            counts["dropped:no response is preferred"] += 1
