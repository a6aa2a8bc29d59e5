"""Which records a step can train on, and which of their groups say something to its loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from align.data.chat import TokenGroup
from align.data.comparisons import LIKED
from align.data.formats import Stream
from align.errors import InputError
from align.losses.table import preference_loss
from align.records import Comparison, Demonstration, Message, Prompt, Record, WrongRow
from align.stages.steps import PreferenceStep, RewardStep
from align.train.reward_objective import BradleyTerryObjective


class Usable:
    """Records of the kind that a stage trains on, by number; `counts` says what was dropped, and what was chosen.

    The place and the metadata of a row are kept until they are asked for, row after row.
    """

    def __init__(self, found: Stream, kind: type[Demonstration | Comparison]) -> None:
        self._found, self._kind = found, kind
        self._known: dict[int, tuple[str, Mapping[str, Any]]] = {}
        self.number = 0
        self.counts = Counter[str]()

    def __iter__(self) -> Iterator[tuple[int, Demonstration | Comparison]]:
        for row, record in enumerate(self._found.records):
            self.number += 1
            self._known[row] = self._found.statistics.place, record.metadata
            usable = self._of_kind(record, row)
            if usable is not None:
                yield row, usable

    def place(self, row: int) -> str:
        """Where the row stands, in words."""
        return self._known[row][0]

    def metadata(self, row: int) -> Mapping[str, Any]:
        """That of a row, behind which nobody asks for an earlier one's."""
        while (first := next(iter(self._known))) < row:
            del self._known[first]
        return self._known[row][1]

    def _of_kind(self, record: Record, row: int) -> Demonstration | Comparison | None:
        """The record as what the stage trains on; a comparison's best response can also be imitated."""
        if isinstance(record, self._kind):
            return record
        if self._kind is Demonstration and isinstance(record, Comparison):
            return imitated(record, self.counts)
        found = {Demonstration: "a demonstration", Comparison: "a comparison", Prompt: "a prompt without a response"}
        needs = "comparisons of responses" if self._kind is Comparison else "demonstrations"
        raise WrongRow(row, f"this is {found[type(record)]}, and the stage needs {needs}")


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


def comparable(groups: Iterable[TokenGroup], step: PreferenceStep, counts: Counter[str]) -> Iterator[TokenGroup]:
    """The groups that say something to the step's loss; the others are counted by what they lack."""
    needs_values = preference_loss(step.loss.name, **step.loss.settings).uses_rewards
    for group in groups:
        if len(group.sequences) < 2:  # noqa: PLR2004 - a comparison takes two
            counts["dropped:one response"] += 1
        elif group.rewards is None and (needs_values or step.min_chosen is not None):
            wants = f"{step.loss.name} aims at them" if needs_values else "min_chosen looks at them"
            raise WrongRow(group.row, f"the row has no rewards, and {wants}")
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
            raise WrongRow(group.row, f"the row has no rewards, and {step.loss} takes its margin")
        if has_pair(group):
            yield group
        else:
            counts["dropped:no response is preferred"] += 1
