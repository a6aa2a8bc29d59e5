"""Topics and subtopics, from which prompts are made (Adler et al. 2024, sec. 3.2.1; the form follows UltraChat)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from align.synth.families.family import Calls, ChildFamily
from align.synth.families.listing import Ask, ListFamily
from align.synth.items import TOPIC, Item

if TYPE_CHECKING:  # imports torch
    from align.synth.workbench import Workbench

EVERYTHING = "everyday life, science, technology, culture and the world at large"


class Topics(ListFamily):
    """Broad topics of a subject, asked for in one list."""

    family: Literal["topics"] = "topics"
    subject: str = Field(default=EVERYTHING, description="What the topics are about.")
    also: list[str] = Field(default_factory=list[str], description="Topics collected by hand, which are added.")

    makes: ClassVar[str] = TOPIC
    placeholders: ClassVar[tuple[str, ...]] = ("number", "subject")

    def asks(self, parents: Sequence[Item], bench: Workbench) -> list[Ask]:
        """Return the one list that is asked for."""
        return [Ask((), {"number": self.number, "subject": self.subject}, self.worded(), self.number)]

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield the topics collected by hand, then those of the answers."""
        for text in self.also:
            bench.want()
            item = bench.item(TOPIC, (), text=text)
            if bench.keep(item):
                yield item
        yield from super().make(parents, bench)

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return one request."""
        one = super().calls(1, max_new_tokens)
        return one._replace(items=one.items + len(self.also))


class Subtopics(ListFamily, ChildFamily):
    """Aspects of each topic."""

    family: Literal["subtopics"] = "subtopics"
    number: int = Field(default=5, ge=1, description="Aspects asked for, of each topic.")

    makes: ClassVar[str] = TOPIC
    reads: ClassVar[tuple[str, ...]] = (TOPIC,)
    placeholders: ClassVar[tuple[str, ...]] = ("number", "topic")
