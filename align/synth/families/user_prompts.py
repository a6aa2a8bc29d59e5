"""Prompts as users write them, without topics: from a chat model alone, or like a few seed prompts.

In Magpie (Xu et al. 2024) a model continues its own chat template where a user's message would stand. It needs no
instruction and no seeds, and works with small models; a model in this process is needed, as servers only take whole
messages. In Self-Instruct (Wang et al. 2023) a model is shown a few prompts and writes new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from align.procedural import general, prompting
from align.procedural.splits import split_of
from align.records import Message
from align.synth.families.family import (
    TEXT_CHARACTERS,
    TOKENS_PER_CHARACTER,
    Calls,
    ChildFamily,
    Family,
    Template,
    lost,
    text_tokens,
)
from align.synth.families.listing import LANGUAGE, NOT_OF_THE_TASK, OF_TEST_SPLIT, Ask, ListFamily, speaks
from align.synth.items import PROMPT, Item
from align.synth.parsing.lists import MAX_SENTENCE_WORDS, TOO_LONG_ITEM
from align.synth.parsing.turns import user_turn

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer
    from align.synth.workbench import Workbench


class SelfInstruct(ListFamily, ChildFamily):
    """New prompts like a few parents that are shown together; the parents of a request are of one split."""

    family: Literal["self_instruct"] = "self_instruct"
    requests: int = Field(default=100, ge=1, description="Requests, each with other parents.")
    number: int = Field(default=4, ge=1, description="Prompts asked for in each request.")
    shown: int = Field(default=8, ge=1, description="Parents shown in each request; 8 in Wang et al. 2023.")
    task: Literal["general"] | None = Field(
        default=None,
        description="Keep only instructions of this built-in task, with what its verifier needs; none of its test "
        "split. For a model trained on tasks:prompting, whose wording is used.",
    )

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (PROMPT,)
    placeholders: ClassVar[tuple[str, ...]] = ("number", "examples")

    def worded(self, name: str = "") -> Template:
        """Return the user's template, that of the task, or the built-in one."""
        own = self.template_file is None and self.task is not None
        return Template(prompting.WORDING) if own else super().worded(name)

    def asks(self, parents: Sequence[Item], bench: Workbench) -> list[Ask]:
        """Return the requests, which take turns between the splits of the parents."""
        template = self.worded()
        found = list[Ask]()
        groups = [
            [each for each in parents if each.split == split]
            for split in sorted({parent.split for parent in parents}, key=str)
        ]
        for index in range(self.requests if groups else 0):
            group = groups[index % len(groups)]
            drawn = bench.random("shown", index).sample(group, min(self.shown, len(group)))
            values = {"number": self.number, "examples": prompting.listed([each.prompt for each in drawn])}
            found.append(Ask(tuple(drawn), values, template, self.number))
        return found

    def reject(self, text: str, ask: Ask) -> str:
        """Return why a text is not kept; empty if it is."""
        if self.task is not None and general.parse(text) is None:
            return NOT_OF_THE_TASK
        if self.task is not None and split_of(text) == "test":
            return OF_TEST_SPLIT
        return super().reject(text, ask)

    def grow(self, ask: Ask, text: str, answer: Answer, bench: Workbench) -> Item:
        """Return the prompt, with the specification that the task's verifier reads."""
        item = super().grow(ask, text, answer, bench)
        spec = general.parse(text) if self.task is not None else None
        return item if spec is None else replace(item, metadata={"kind": self.task, **spec})

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return so many requests, whatever the number of parents."""
        found = super().calls(self.requests, max_new_tokens)
        more = self.requests * (self.shown - 1) * TEXT_CHARACTERS[PROMPT] * TOKENS_PER_CHARACTER
        return found._replace(prompt_tokens=found.prompt_tokens + round(more))


class Magpie(Family):
    """Prompts that a chat model writes itself, in the open place of the user's message; needs the engine local."""

    family: Literal["magpie"] = "magpie"
    number: int = Field(ge=1, description="Prompts asked for, with each system message.")
    systems: list[str] = Field(
        default_factory=list[str], description="System messages that steer the prompts; none by default."
    )
    temperature: float | None = Field(default=1.0, ge=0, description="Replaces sampling.temperature (Magpie: 1).")
    top_p: float | None = Field(default=1.0, gt=0, le=1, description="Replaces sampling.top_p (Magpie: 1).")
    one_line: bool = Field(default=True, description="End a prompt at the first line break, as Magpie does.")

    makes: ClassVar[str] = PROMPT

    @property
    def needs_local(self) -> bool:
        """Whether the family needs a model in this process."""
        return True

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return a request a prompt."""
        requests = self.number * max(1, len(self.systems))
        return Calls(requests, requests, requests * text_tokens("", (PROMPT,)), requests * max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield the prompts."""
        befores = [(Message("system", system),) for system in self.systems] or [()]
        stop = ["\n"] if self.one_line else []
        asked = [(before, number) for before in befores for number in range(self.number)]
        bench.want(len(asked))
        requests = [bench.open_turn(before, number, stop=stop) for before, number in asked]
        for (before, _), answer in zip(asked, bench.ask(requests), strict=True):
            text, reason = _turn(answer, bench.language)
            if reason:
                bench.drop(reason)
                continue
            metadata = {"magpie_system": before[0].content} if before else {}
            item = bench.item(PROMPT, (), answers=[answer], messages=(Message("user", text),), metadata=metadata)
            if bench.keep(item):
                yield item


def _turn(answer: Answer, language: str | None) -> tuple[str, str]:
    """Return the user's message that a model wrote, and why it is dropped; empty if it is kept."""
    if reason := lost(answer):
        return "", reason
    turn = user_turn(answer.text)
    if turn.reason:
        return "", turn.reason
    if len(turn.text.split()) > MAX_SENTENCE_WORDS:
        return "", TOO_LONG_ITEM
    return turn.text, "" if speaks(turn.text, language) else LANGUAGE
