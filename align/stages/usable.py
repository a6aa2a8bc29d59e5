"""Which records a step can train on, and which of their groups say something to its loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from align.config import InputError
from align.data.chat import TokenGroup
from align.losses.preference import preference_loss
from align.records import Comparison, Demonstration, Message, Prompt, Record
from align.stages.recipe import SourceSettings
from align.stages.steps import PreferenceStep, RewardStep
from align.train.reward_objective import BradleyTerryObjective


def of_kind(
    record: Record, kind: type[Demonstration | Comparison], source: SourceSettings, row: int
) -> Demonstration | Comparison:
    """The record as what the stage trains on; a comparison's best response can also be imitated."""
    if isinstance(record, kind):
        return record
    if kind is Demonstration and isinstance(record, Comparison):
        best = max(record.responses, key=lambda response: response.reward or 0.0)
        if record.chosen is not None:
            best = record.responses[record.chosen]
        return Demonstration((*record.prompt, Message("assistant", best.content)), record.metadata)
    found = {Demonstration: "a demonstration", Comparison: "a comparison", Prompt: "a prompt without a response"}
    needs = "this stage needs comparisons of responses" if kind is Comparison else "sft needs demonstrations"
    raise InputError(f"data: {source.path}: record {row} is {found[type(record)]}, and {needs}")


def comparable(
    groups: Iterable[TokenGroup], step: PreferenceStep, counts: Counter[str], path: str
) -> Iterator[TokenGroup]:
    """The groups that say something to the step's loss; the others are counted by what they lack."""
    needs_values = preference_loss(step.loss.name, **step.loss.settings).uses_rewards
    for group in groups:
        if len(group.sequences) < 2:  # noqa: PLR2004 - a comparison takes two
            counts["dropped:one response"] += 1
        elif group.rewards is None and (needs_values or step.min_chosen is not None):
            wants = f"{step.loss.name} aims at them" if needs_values else "min_chosen looks at them"
            raise InputError(f"data: {path}: record {group.row} has no rewards, and {wants}")
        elif step.min_chosen is not None and _of_best(group) < step.min_chosen:
            counts["dropped:best response too bad"] += 1
        elif not needs_values and group.chosen is None and len(set(group.rewards or ())) < 2:  # noqa: PLR2004
            counts["dropped:no response is preferred"] += 1
        else:
            yield group


def _of_best(group: TokenGroup) -> float:
    """The reward of the response that the row prefers."""
    assert group.rewards is not None
    return group.rewards[group.chosen] if group.chosen is not None else max(group.rewards)


def telling(
    groups: Iterable[TokenGroup], step: RewardStep, attributes: Sequence[str], counts: Counter[str], path: str
) -> Iterator[TokenGroup]:
    """The groups that say something to a reward model's loss; the others are counted."""
    if step.loss == "regression":
        found = set[str]()
        for group in groups:
            found.update(*group.attributes)
            if any(group.attributes):
                yield group
            else:
                counts["dropped:no label"] += 1
        if unknown := sorted(found - set(attributes)):
            raise InputError(
                f"data: {path}: attribute {unknown[0]!r} is none of the model's ({', '.join(attributes)}); "
                f"head.attributes names what the data rates: {', '.join(sorted(found))}"
            )
        if not found and counts:
            raise InputError(f"data: {path}: no response has an attribute; regression needs {', '.join(attributes)}")
        return
    has_pair = BradleyTerryObjective(step.loss, ()).has_pair
    for group in groups:
        if step.loss != "bt" and group.rewards is None:
            raise InputError(f"data: {path}: record {group.row} has no rewards, and {step.loss} takes its margin")
        if has_pair(group):
            yield group
        else:
            counts["dropped:no response is preferred"] += 1
