"""Closed question answering: tasks about a document, joined with it (Adler et al. 2024, sec. 3.2.1).

The report joins document and task with templates made by hand, which it does not publish; `JOINS` are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from align.records import Message
from align.synth.families.family import ChildFamily
from align.synth.families.listing import Ask, ListFamily
from align.synth.items import DOCUMENT, PROMPT, Item

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer
    from align.synth.workbench import Workbench

JOINS = (
    "{document}\n\n{task}",
    "{task}\n\n{document}",
    "Read the following text.\n\n{document}\n\n{task}",
    "Text:\n{document}\n\nTask: {task}",
    '{task}\n\nThis is the text:\n"""\n{document}\n"""',
    "### Document\n{document}\n\n### Question\n{task}",
    "Here is a passage:\n\n{document}\n\nBased on the passage: {task}",
)


class ClosedQA(ListFamily, ChildFamily):
    """Questions and tasks about each document, joined with it by one of several templates."""

    family: Literal["closed_qa"] = "closed_qa"
    number: int = Field(default=5, ge=1, description="Tasks asked for, about each document.")
    max_characters: int = Field(default=8000, ge=1, description="Longer documents are dropped and counted.")

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (DOCUMENT,)
    placeholders: ClassVar[tuple[str, ...]] = ("number", "document")

    def asks(self, parents: Sequence[Item], bench: Workbench) -> list[Ask]:
        """Return what is asked about each document that is not too long."""
        fitting = [parent for parent in parents if len(parent.text) <= self.max_characters]
        if len(fitting) < len(parents):
            bench.counts["parents: document too long"] = len(parents) - len(fitting)
        return super().asks(fitting, bench)

    def grow(self, ask: Ask, text: str, answer: Answer, bench: Workbench) -> Item:
        """Return the task with its document."""
        (document,) = ask.parents
        join = bench.random("join", document.id, text).choice(JOINS)
        joined = join.format(document=document.text.strip(), task=text)
        content = {"messages": (Message("user", joined),), "metadata": {"task": text}}
        return bench.item(PROMPT, ask.parents, answers=[answer], template=ask.template.hash, **content)

    def known(self, item: Item) -> str:
        """Return the task of an item."""
        return str(item.metadata["task"])
