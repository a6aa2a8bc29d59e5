"""What a family works with: its requests, its random numbers, its counts and the lineage of what it makes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from align.inference.settings import SamplingSettings
from align.records import Message, Prompt
from align.rewards.verdicts import Verdict
from align.synth.items import NAMES, Item
from align.synth.parsing.lists import same
from align.synth.ratings import Ratings
from align.synth.requests import Answer, Request, Teachers, ask_user
from align.synth.splits import SplitShares, seed_words

DROPPED = "dropped: "  # first part of the names of counts whose sum with `kept` is `asked`
ASKED, KEPT = "asked", "kept"


@dataclass(slots=True, kw_only=True)
class Workbench:
    """The tools of one entry of `families`, the same on every process.

    `counts` holds `asked` (wanted items), `kept`, and `dropped: REASON`: asked = kept + Σ dropped. Other names are
    information, such as `surplus`.
    """

    entry: str  # name under `families`
    family: str  # its kind
    seed: int
    sampling: SamplingSettings  # of the step, with what the family changes
    shares: SplitShares
    teachers: Teachers
    ratings: Ratings | None  # None if the step has no judges
    language: str | None = None  # of prompts and turns, as an ISO 639-1 code; any where None
    unsafe: Set[str] = frozenset()  # words of prompts that a source of the step flags
    by: str | None = None  # model that is asked; the first one where None
    counts: Counter[str] = field(default_factory=Counter[str])
    asked_of: Counter[str] = field(default_factory=Counter[str])  # id of a parent -> items asked for about it
    seen: set[str] = field(default_factory=set[str])  # texts of the entry's items

    def ask(self, requests: Sequence[Request], *, by: str | None = None) -> list[Answer]:
        """Return the answers in the order of the requests; each is asked once in the life of the run's folder.

        `by` names another model than the family's.
        """
        return self.teachers.ask(requests, by=by or self.by, activity=self.entry) if requests else []

    def request(self, text: str, number: int = 0, *, temperature: float | None = None) -> Request:
        """Return a request of one user message with the sampling of the family, or another temperature."""
        changes = {} if temperature is None else {"temperature": temperature}
        return ask_user(text, self.sampling.model_copy(update=changes), number)

    def chat(self, messages: Iterable[Message], number: int = 0) -> Request:
        """Return a request that continues a dialogue."""
        return Request(tuple(messages), self.sampling, number)

    def open_turn(self, before: Iterable[Message], number: int, *, stop: Sequence[str] = ()) -> Request:
        """Return a request in which a local model writes the user's message after `before`."""
        sampling = self.sampling.model_copy(update={"stop": [*self.sampling.stop, *stop]})
        return Request((*before, Message("user", "")), sampling, number, opens=True)

    def score(self, requests: Sequence[Request], choices: Sequence[str]) -> list[list[float]]:
        """Return the log-probabilities in nats of each choice as the answer to each request, by a local model."""
        return self.teachers.score(requests, choices, by=self.by) if requests else []

    def random(self, *place: str | int) -> Random:
        """Return random numbers that depend on the recipe's seed, the entry and the place only."""
        address = repr((self.seed, self.entry, *place))
        return Random(hashlib.sha256(address.encode()).digest())

    def want(self, number: int = 1, *, of: Item | None = None) -> None:
        """Count items that are asked for, about a parent; each is then kept by `keep`, or dropped with a reason."""
        self.counts[ASKED] += number
        if of is not None:
            self.asked_of[of.id] += number

    def want_each(self, parents: Iterable[Item]) -> None:
        """Count one item that is asked for about each parent."""
        for parent in parents:
            self.want(of=parent)

    def drop(self, reason: str, number: int = 1) -> None:
        """Count wanted items that are not made."""
        if number:
            self.counts[DROPPED + reason] += number

    def keep(self, item: Item) -> bool:
        """Count an item as kept and return True; False, and a count, where the entry has made the same before."""
        key = same(f"{item.text} {' '.join(each.content for each in item.messages)}") or item.id
        if key in self.seen:
            self.drop("duplicate")
            return False
        self.seen.add(key)
        self.counts[KEPT] += 1
        return True

    def item(
        self,
        kind: str,
        parents: Sequence[Item],
        *,
        answers: Sequence[Answer] = (),
        template: str = "",
        **content: Any,  # noqa: ANN401 - fields of Item
    ) -> Item:
        """Return a new item with its lineage; `content` is its text, messages, responses and metadata.

        The first prompt of a line of ancestors is a seed, and its own split is theirs. The metadata of the first parent
        is inherited where `content` has none.
        """
        own = Item(
            kind=kind,
            entry=self.entry,
            family=self.family,
            parents=tuple(dict.fromkeys(parent.id for parent in parents)),
            template=template,
            model=answers[0].model if answers else "",
            requests=tuple(dict.fromkeys(answer.request for answer in answers)),
            **content,
        )
        flagged = any(parent.flagged for parent in parents) or is_unsafe(own, self.unsafe)
        return with_split(replace(own, flagged=flagged), parents, self.shares)

    def rate(self, groups: Sequence[tuple[Prompt, Sequence[str]]]) -> list[tuple[Verdict, ...]]:
        """Return the verdicts of the step's judges on each group of responses; each is asked once."""
        assert self.ratings is not None, "a family that rates has checked that the step has judges"
        return self.ratings.rate(groups, activity=f"judge {self.entry}")

    def report(self) -> Mapping[str, int]:
        """Return the counts by name."""
        return dict(sorted(self.counts.items()))


def with_split(item: Item, parents: Sequence[Item], shares: SplitShares) -> Item:
    """Return the item with its seeds and their split; a prompt or document without seeds is one itself.

    A flagged one is never in the split `sft`.
    """
    seeds = tuple(sorted({seed for parent in parents for seed in parent.seeds}))
    if item.kind in NAMES:
        return replace(item, seeds=seeds)
    if not seeds:
        return replace(item, seeds=(item.id,), split=shares.split_of(item.first_prompt, flagged=item.flagged))
    splits = {parent.split for parent in parents if parent.seeds}
    split = splits.pop() if len(splits) == 1 else None
    return replace(item, seeds=seeds, split=None if item.flagged and split == "sft" else split)


def is_unsafe(item: Item, unsafe: Set[str]) -> bool:
    """Return whether an item's prompt is one of those whose words are in `unsafe`."""
    return bool(unsafe) and seed_words(item.first_prompt) in unsafe
