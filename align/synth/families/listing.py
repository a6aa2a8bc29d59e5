"""Families that ask for a list of items about each parent, and top up what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from align.records import Message
from align.synth.families.family import (
    Calls,
    Family,
    Template,
    builtin_template,
    read_template,
    text_tokens,
    unanswered,
)
from align.synth.items import NAMES, Item
from align.synth.parsing.lists import Parsed, items, same

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer, Request
    from align.synth.workbench import Workbench

MIN_DETECTED, MIN_NAMES = 40, 80  # characters of sentences, and of names; the language of less is not detected
ECHO, LANGUAGE = "repeats its parent", "another language"  # reasons
NOT_OF_THE_TASK, OF_TEST_SPLIT = "not an instruction of the task", "in the task's test split"  # of a built-in task
MORE = """{request}

These are known already; do not repeat any of them:
{known}"""


@dataclass(slots=True)
class Ask:
    """What is asked about one parent, and what has come of it."""

    parents: tuple[Item, ...]
    values: Mapping[str, object]  # of the template's placeholders
    template: Template
    wanted: int
    metadata: Mapping[str, object] = field(default_factory=dict[str, object])
    made: list[Item] = field(default_factory=list[Item])

    @property
    def missing(self) -> int:
        """How many items are still wanted."""
        return self.wanted - len(self.made)


class ListFamily(Family):
    """A family whose template asks for `number` items about each parent."""

    number: int = Field(default=10, ge=1, description="Items asked for, about each parent.")
    template_file: str | None = Field(default=None, description="File with your own wording of the request.")
    tries: int = Field(default=3, ge=1, description="Requests about a parent, until it has its number of items.")

    wording: ClassVar[str] = ""  # the template; the built-in one of the family's name where empty
    placeholders: ClassVar[tuple[str, ...]] = ("number",)

    def check(self) -> None:
        """Raise for a template that cannot be filled."""
        if self.template_file is not None:
            read_template(self.template_file, self.placeholders)

    def files(self) -> list[str]:
        """Return the template."""
        return [] if self.template_file is None else [self.template_file]

    def worded(self, name: str = "") -> Template:
        """Return the user's template, or the built-in one of a name."""
        if self.template_file is not None:
            return read_template(self.template_file, self.placeholders)
        return Template(self.wording) if self.wording else builtin_template(name or self.family)

    def asks(self, parents: Sequence[Item], bench: Workbench) -> list[Ask]:
        """Return what is asked: once about each parent, with its text as the placeholder of its kind."""
        template = self.worded()
        name = self.placeholders[-1]
        return [Ask((each,), {"number": self.number, name: each.prompt}, template, self.number) for each in parents]

    def grow(self, ask: Ask, text: str, answer: Answer, bench: Workbench) -> Item:
        """Return the item of a text: a name, or a prompt of one user message."""
        content = {"text": text} if self.makes in NAMES else {"messages": (Message("user", text),)}
        return bench.item(
            self.makes,
            ask.parents,
            answers=[answer],
            template=ask.template.hash,
            metadata=dict(ask.metadata),
            **content,
        )

    def known(self, item: Item) -> str:
        """Return the text that an item was made from."""
        return item.prompt

    def reject(self, text: str, ask: Ask) -> str:
        """Return why a text is not kept; empty if it is."""
        return ECHO if same(text) in {same(parent.prompt) for parent in ask.parents} else ""

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return one request a parent."""
        asked = max(1, parents) if not self.reads else parents
        wording = self.worded().text
        return Calls(asked * self.number, asked, asked * text_tokens(wording, self.reads), asked * max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield the items, ordered by parent; what is missing is asked for again, with what there is."""
        asks = self.asks(parents, bench)
        bench.seen |= {same(parent.prompt) for parent in parents}  # a copy may be of another split
        for number in range(self.tries):
            waiting = [ask for ask in asks if ask.missing > 0]
            texts = [self._text(ask) for ask in waiting]
            repeated = Counter[str]()
            requests: list[Request] = []
            for text in texts:  # equal requests are different samples
                requests.append(bench.request(text, number + self.tries * repeated[text]))
                repeated[text] += 1
            answers = bench.ask(requests)
            for ask, answer in zip(waiting, answers, strict=True):
                self._add(ask, answer, bench)
        for ask in asks:
            yield from ask.made

    def _text(self, ask: Ask) -> str:
        """Return the wording of a request for what is missing."""
        request = ask.template.fill(**{**ask.values, "number": ask.missing})
        if not ask.made:
            return request
        return MORE.format(
            request=request, known="\n".join(f"- {' '.join(self.known(item).split())}" for item in ask.made)
        )

    def _add(self, ask: Ask, answer: Answer, bench: Workbench) -> None:
        wanted = ask.missing
        bench.want(wanted, of=ask.parents[0] if ask.parents else None)
        parsed = self.parse(ask, answer, bench)
        for reason, number in parsed.dropped.items():
            bench.drop(reason, number)
        if parsed.surplus:
            bench.counts["surplus"] += parsed.surplus
        for text in parsed.items:
            if reason := self.reject(text, ask):
                bench.drop(reason)
            elif bench.keep(item := self.grow(ask, text, answer, bench)):
                ask.made.append(item)

    def parse(self, ask: Ask, answer: Answer, bench: Workbench) -> Parsed:
        """Return the items of an answer."""
        wanted = ask.missing
        if reason := unanswered(answer):
            return Parsed((), Counter({reason: wanted}))
        known = [self.known(item) for item in ask.made]
        is_names = self.makes in NAMES
        parsed = items(answer.text, wanted, finish=answer.finish, names=is_names, known=known)
        shortest = MIN_NAMES if is_names else MIN_DETECTED
        if not speaks("\n".join(parsed.items), bench.language, shortest=shortest):
            lost = Counter({LANGUAGE: len(parsed.items)}) + parsed.dropped
            return Parsed((), lost)
        return parsed


def speaks(text: str, language: str | None, *, shortest: int = MIN_DETECTED) -> bool:
    """Return whether a text may be in a language; always where it is short or no language is asked for."""
    if language is None or len(text) < shortest:
        return True
    from align.rewards.verifiers.language import detected_language  # noqa: PLC0415 - loads its profiles

    found = detected_language(text)
    return found is None or found.partition("-")[0] == language
