"""Prompts of sources; prompts about topics, and longer and more specific versions (Adler et al. 2024, sec. 3.2.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from align.synth.families.family import Calls, ChildFamily
from align.synth.families.instructions import for_another_turn
from align.synth.families.listing import Ask, ListFamily
from align.synth.items import PROMPT, TOPIC, Item

if TYPE_CHECKING:  # imports torch
    from align.synth.workbench import Workbench

DOCUMENT_TYPES = (
    *("short story", "poem", "essay", "blog post", "newspaper article", "letter", "e-mail", "newsletter", "speech"),
    *("film scene", "product description", "technical report", "user manual", "advertisement", "review", "summary"),
    *("lesson plan", "press release", "diary entry", "interview"),
)


class Prompts(ChildFamily):
    """Prompts of sources as they are, with a split and lineage; nothing is asked."""

    family: Literal["prompts"] = "prompts"
    first_turn: bool = Field(default=False, description="Cut a dialogue after the first message of the user.")

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (PROMPT,)

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return no request."""
        return Calls(parents)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield a prompt for each parent."""
        bench.want_each(parents)
        for parent in parents:
            messages, metadata = parent.messages, parent.metadata
            if self.first_turn and parent.first_user + 1 < len(messages):
                messages = messages[: parent.first_user + 1]
                metadata = for_another_turn(metadata)
            item = bench.item(PROMPT, [parent], messages=messages, metadata=metadata)
            if bench.keep(item):
                yield item


class OpenQA(ListFamily, ChildFamily):
    """Questions and requests about each topic; short ones, which `revise_open_qa` elaborates."""

    family: Literal["open_qa"] = "open_qa"

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (TOPIC,)
    placeholders: ClassVar[tuple[str, ...]] = ("number", "topic")


class ReviseOpenQA(ListFamily, ChildFamily):
    """Longer and more specific versions of each question."""

    family: Literal["revise_open_qa"] = "revise_open_qa"
    number: int = Field(default=5, ge=1, description="Versions asked for, of each prompt.")

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (PROMPT,)
    placeholders: ClassVar[tuple[str, ...]] = ("number", "prompt")


class Writing(ListFamily, ChildFamily):
    """Writing tasks for each pair of a topic and a type of document."""

    family: Literal["writing"] = "writing"
    number: int = Field(default=5, ge=1, description="Tasks asked for, of each topic and type of document.")
    documents: list[str] = Field(
        default=list(DOCUMENT_TYPES), min_length=1, description="Types of documents; 20 built-in ones if left out."
    )
    types: int | None = Field(
        default=None, ge=1, description="Types of documents drawn for each topic; all of them if left out."
    )

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (TOPIC,)
    placeholders: ClassVar[tuple[str, ...]] = ("number", "document", "topic")

    def asks(self, parents: Sequence[Item], bench: Workbench) -> list[Ask]:
        """Return what is asked about each topic and type of document."""
        template = self.worded()
        found = list[Ask]()
        for parent in parents:
            drawn = bench.random("documents", parent.id).sample(self.documents, self._types)
            for document in [each for each in self.documents if each in drawn]:
                values = {"number": self.number, "document": document, "topic": parent.prompt}
                found.append(Ask((parent,), values, template, self.number, {"document": document}))
        return found

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return one request a pair of a topic and a type of document."""
        return super().calls(parents * self._types, max_new_tokens)

    @property
    def _types(self) -> int:
        return min(self.types or len(self.documents), len(self.documents))


class ReviseWriting(ListFamily, ChildFamily):
    """Versions of each writing task with more requirements."""

    family: Literal["revise_writing"] = "revise_writing"
    number: int = Field(default=5, ge=1, description="Versions asked for, of each task.")

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (PROMPT,)
    placeholders: ClassVar[tuple[str, ...]] = ("number", "prompt")
