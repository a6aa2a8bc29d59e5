"""Tasks that need what a language model lacks, with answers that decline them, and doable twins that are answered.

Adler et al. 2024 (sec. 3.2.5) ask for such questions and expressly for refusals. A model that only sees refusals learns
to refuse, so each task gets a twin that is as similar as possible and can be done (our choice).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from align.records import Message
from align.rewards.verifiers.refusals import is_refusal
from align.synth.families.family import Calls, builtin_template, lost, text_tokens
from align.synth.families.listing import LANGUAGE, Ask, ListFamily, speaks
from align.synth.items import DEMONSTRATION, PROMPT, Item
from align.synth.parsing.lists import items

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer
    from align.synth.workbench import Workbench

LACKS = (
    "has no access to the internet and cannot open links or search",
    "does not know today's date, the weather, prices or anything else that is live",
    "cannot see, hear or make images, sound or video",
    "cannot act in the world: it cannot call, send, book, buy or control anything",
    "does not remember earlier conversations and knows nothing of the user's life that is not said",
    "cannot open files, accounts or devices of the user",
    "has no body and no experiences of its own",
)
ATTEMPTED, REFUSED_TWIN = "not declined", "twin is declined"
REFUSAL, TWIN = "incapable_refusal", "incapable_twin"


class Incapable(ListFamily):
    """Requests that a language model cannot fulfil, each declined, and with `twins` one that it can, answered."""

    family: Literal["incapable"] = "incapable"
    number: int = Field(default=10, ge=1, description="Requests asked for, about each thing that a model lacks.")
    lacks: list[str] = Field(
        default=list(LACKS), min_length=1, description="What a language model lacks, as the end of a sentence."
    )
    twins: bool = Field(default=True, description="Also make a similar request that can be fulfilled, and answer it.")

    makes: ClassVar[str] = DEMONSTRATION
    placeholders: ClassVar[tuple[str, ...]] = ("number", "lack")

    def asks(self, parents: Sequence[Item], bench: Workbench) -> list[Ask]:
        """Return what is asked about each thing that a model lacks."""
        template = self.worded()
        return [
            Ask((), {"number": self.number, "lack": lack}, template, self.number, {"lack": lack, "capable": False})
            for lack in self.lacks
        ]

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return a list for each thing, and for each request its answer, its twin and the twin's answer."""
        tasks = len(self.lacks) * self.number
        per_task = 3 if self.twins else 1
        requests = len(self.lacks) + tasks * per_task
        tokens = text_tokens(builtin_template(REFUSAL).text, (PROMPT,))
        return Calls(tasks * (2 if self.twins else 1), requests, requests * tokens, requests * max_new_tokens)

    def grow(self, ask: Ask, text: str, answer: Answer, bench: Workbench) -> Item:
        """Return the request as a prompt."""
        content = {"messages": (Message("user", text),), "metadata": dict(ask.metadata)}
        return bench.item(PROMPT, (), answers=[answer], template=ask.template.hash, **content)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield the requests as prompts, then each with its answer, and the twin after it."""
        tasks = list(super().make(parents, bench))
        yield from tasks
        declined = dict(self._declined(tasks, bench))
        answered = dict(self._twins([task for task in tasks if task.id in declined], bench)) if self.twins else {}
        for task in tasks:
            yield from (found[task.id] for found in (declined, answered) if task.id in found)

    def _declined(self, tasks: Sequence[Item], bench: Workbench) -> Iterator[tuple[str, Item]]:
        template = builtin_template(REFUSAL)
        bench.want(len(tasks))
        texts = [template.fill(lack=task.metadata["lack"], prompt=task.prompt) for task in tasks]
        answers = bench.ask([bench.request(text) for text in texts])
        asked = [(task, task) for task in tasks]
        yield from _kept(asked, answers, template.hash, bench, capable=False)

    def _twins(self, tasks: Sequence[Item], bench: Workbench) -> Iterator[tuple[str, Item]]:
        template = builtin_template(TWIN)
        bench.want(len(tasks))
        texts = [template.fill(lack=task.metadata["lack"], prompt=task.prompt) for task in tasks]
        twins: list[tuple[Item, Item]] = []
        for task, answer in zip(tasks, bench.ask([bench.request(text) for text in texts]), strict=True):
            parsed = items(answer.text, 1, finish=answer.finish, known=[task.prompt])
            if not parsed.items:
                bench.drop(next(iter(parsed.dropped)))
                continue
            if not speaks(parsed.items[0], bench.language):
                bench.drop(LANGUAGE)
                continue
            messages = (Message("user", parsed.items[0]),)
            metadata = {**task.metadata, "capable": True}
            content = {"messages": messages, "metadata": metadata}
            twins.append((task, bench.item(PROMPT, [task], answers=[answer], template=template.hash, **content)))
        answers = bench.ask([bench.chat(twin.messages) for _, twin in twins])
        yield from _kept(twins, answers, template.hash, bench, capable=True)


def _kept(
    asked: Sequence[tuple[Item, Item]], answers: Sequence[Answer], template: str, bench: Workbench, *, capable: bool
) -> Iterator[tuple[str, Item]]:
    """Yield each task's id with its prompt's answer: a refusal of what the model lacks, or none of what it can do."""
    unwanted = REFUSED_TWIN if capable else ATTEMPTED
    for (task, prompt), answer in zip(asked, answers, strict=True):
        reason = lost(answer, refusals=False) or (unwanted if is_refusal(answer.text) == capable else "")
        if reason:
            bench.drop(reason)
            continue
        item = _answered(task, prompt, [answer], template, bench, capable=capable)
        if bench.keep(item):
            yield task.id, item


def _answered(
    task: Item, prompt: Item, answers: Sequence[Answer], template: str, bench: Workbench, *, capable: bool
) -> Item:
    """Return a prompt with its answer; the task is its parent, so that a twin shares the split."""
    messages = (*prompt.messages, Message("assistant", answers[-1].text.strip()))
    metadata = {**prompt.metadata, "capable": capable}
    item = bench.item(DEMONSTRATION, [task], answers=answers, template=template, messages=messages, metadata=metadata)
    return item
