"""Dialogues and two-turn prompts, in which a teacher plays the user (Adler et al. 2024, secs. 3.2.1 and 3.2.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from align.procedural import general, user_turns
from align.procedural.splits import split_of
from align.records import Message, Prompt
from align.synth.families.family import Calls, ChildFamily, Template, builtin_template, lost, read_template, text_tokens
from align.synth.families.instructions import NOT_FOLLOWED, for_another_turn, violates
from align.synth.families.listing import LANGUAGE, NOT_OF_THE_TASK, OF_TEST_SPLIT, speaks
from align.synth.items import DEMONSTRATION, PROMPT, Item
from align.synth.parsing.turns import Turn, user_turn

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer
    from align.synth.workbench import Workbench

# The report gives the user a personality in each dialogue and does not publish how; these are ours
PERSONAS = (
    "an ordinary person who is curious and writes in plain words",
    "an expert who asks demanding questions with several parts",
    "a critical reader who writes briefly, doubts what was said and asks for proof",
    "someone with a concrete problem at home or at work, who mentions its details",
    "a student who wants to understand each step and asks for examples",
    "an impatient person who wants a short and practical answer",
)
LOW_REWARD, NOT_RATED = "low reward", "not rated by a judge"


@dataclass(slots=True)
class Talk:
    """A dialogue that is being written."""

    parent: Item
    persona: str
    messages: list[Message]
    answers: list[Answer] = field(default_factory=list["Answer"])
    reason: str = ""  # why it is given up
    reward: float | None = None

    @property
    def said(self) -> list[str]:
        """The answers of the assistant that the teacher wrote."""
        return [message.content for message in self.messages if message.role == "assistant"]

    @property
    def history(self) -> str:
        """The dialogue as text."""
        shown = (each for each in self.messages if each.role in ("user", "assistant"))
        return "\n\n".join(f"{each.role.capitalize()}: {each.content}" for each in shown)


class _TalkFamily(ChildFamily):
    """A family in which a teacher writes the messages of both sides."""

    personas: list[str] = Field(
        default=list(PERSONAS), min_length=1, description="Descriptions of users, one of which is drawn for a dialogue."
    )
    user_by: str | None = Field(default=None, description="Model that plays the user; the one of `by` if left out.")
    user_temperature: float = Field(default=0.7, ge=0, description="Temperature of the user's turns.")
    user_template_file: str | None = Field(
        default=None, description="File with your own wording of the request for a user's turn."
    )
    tries: int = Field(default=3, ge=1, description="Maximum number of requests for each user turn.")

    def check(self) -> None:
        """Raise for a template that cannot be filled."""
        self._template()

    def asked_models(self) -> dict[str, str]:
        """Return the models of the family and of the user."""
        return super().asked_models() | ({} if self.user_by is None else {"user_by": self.user_by})

    def files(self) -> list[str]:
        """Return the template."""
        return [] if self.user_template_file is None else [self.user_template_file]

    def _template(self) -> Template:
        if self.user_template_file is None:
            return builtin_template("user_turn")
        return read_template(self.user_template_file, ("persona", "history"))

    def _reason(self, talk: Talk, turn: Turn, bench: Workbench) -> str:
        """Return why a user's turn is not kept; empty if it is."""
        return turn.reason or ("" if speaks(turn.text, bench.language) else LANGUAGE)

    def _talks(self, parents: Sequence[Item], bench: Workbench) -> list[Talk]:
        return [
            Talk(each, bench.random("persona", each.id).choice(self.personas), list(each.messages)) for each in parents
        ]

    def _answer(self, talks: Sequence[Talk], bench: Workbench) -> None:
        """Add the assistant's next message to each dialogue that is not given up."""
        going = [talk for talk in talks if not talk.reason]
        for talk, answer in zip(going, bench.ask([bench.chat(talk.messages) for talk in going]), strict=True):
            talk.answers.append(answer)
            talk.reason = lost(answer)
            if not talk.reason:
                talk.messages.append(Message("assistant", answer.text.strip()))

    def _reply(self, talks: Sequence[Talk], bench: Workbench) -> None:
        """Add the user's next message to each dialogue that is not given up."""
        template = self._template()
        waiting = [talk for talk in talks if not talk.reason]
        reasons: dict[int, str] = {}
        for number in range(self.tries):
            texts = [template.fill(persona=talk.persona, history=talk.history) for talk in waiting]
            requests = [bench.request(text, number, temperature=self.user_temperature) for text in texts]
            still: list[Talk] = []
            for talk, answer in zip(waiting, bench.ask(requests, by=self.user_by), strict=True):
                earlier = [message.content for message in talk.messages if message.role == "user"]
                turn = user_turn(answer.text, earlier, is_cut=answer.is_cut)
                if reason := self._reason(talk, turn, bench):
                    reasons[id(talk)] = f"user's turn: {reason}"
                    still.append(talk)
                    continue
                bench.counts["politeness removed"] += turn.was_polite
                talk.answers.append(answer)
                talk.messages.append(Message("user", turn.text))
            waiting = still
        for talk in waiting:
            talk.reason = reasons[id(talk)]


class TwoTurn(_TalkFamily):
    """Prompts of two turns: a user's message, an answer, and the user's next message. For preference data."""

    family: Literal["two_turn"] = "two_turn"
    task: Literal["general"] | None = Field(
        default=None,
        description="Keep only valid follow-ups to instructions of this built-in task that are not in its test split, "
        "with the metadata for the verifier. Requests have the wording of tasks:user_turns, on which the model must be "
        "trained.",
    )

    makes: ClassVar[str] = PROMPT
    reads: ClassVar[tuple[str, ...]] = (PROMPT, DEMONSTRATION)

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return an answer and a user's turn for each prompt."""
        return _talk_calls(parents, 1, 1, max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield a prompt for each parent, from its messages up to the first of the user."""
        bench.want_each(parents)
        talks = self._talks(parents, bench)
        for talk in talks:
            talk.messages = talk.messages[: talk.parent.first_user + 1]
        self._answer(talks, bench)
        self._reply(talks, bench)
        for item in _finished(talks, PROMPT, self._template().hash, bench, other_turn=True):
            revised = self._revised(item.metadata, item.prompt)
            yield item if revised is None else replace(item, metadata={**item.metadata, "kind": self.task, **revised})

    def _template(self) -> Template:
        own = self.user_template_file is None and self.task is not None
        return Template(user_turns.WORDING) if own else super()._template()

    def _reason(self, talk: Talk, turn: Turn, bench: Workbench) -> str:
        if self.task is None or turn.reason:
            return super()._reason(talk, turn, bench)
        revised = self._revised(talk.parent.metadata, turn.text)
        if revised is None:
            return NOT_OF_THE_TASK
        return OF_TEST_SPLIT if split_of(general.instruction(revised)) == "test" else ""

    def _revised(self, metadata: Mapping[str, Any], text: str) -> Mapping[str, Any] | None:
        """Return the task's specification of a request after a user's turn; None for another turn, or no task."""
        is_known = self.task is not None and metadata.get("kind") == self.task
        return general.revise({name: metadata[name] for name in general.SPEC}, text) if is_known else None


class Dialogues(_TalkFamily):
    """Dialogues of several turns to imitate, decoded greedily, without politeness in the user's turns.

    The answers to a prompt with verifiable instructions are verified: persistent ones at every turn. With `min_reward`,
    the step's judges rate the last answer given the dialogue before it.
    """

    family: Literal["dialogues"] = "dialogues"
    turns: int = Field(default=3, ge=1, description="Messages of the user, each with an answer (Nemotron-4: 3).")
    temperature: float | None = Field(default=0.0, ge=0, description="Temperature of the answers (Nemotron-4: greedy).")
    min_reward: float | None = Field(default=None, description="Drop a dialogue with a lower reward; needs judges.")

    makes: ClassVar[str] = DEMONSTRATION
    reads: ClassVar[tuple[str, ...]] = (PROMPT,)

    @property
    def needs_judges(self) -> bool:
        """Whether dialogues are filtered by a reward."""
        return self.min_reward is not None

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return an answer for each turn, and the user's turns after the first."""
        return _talk_calls(parents, self.turns, self.turns - 1, max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield a dialogue for each parent."""
        bench.want_each(parents)
        talks = self._talks(parents, bench)
        before = {talk.parent.id: len(talk.said) for talk in talks}
        for turn in range(self.turns):
            if turn:
                self._reply(talks, bench)
            self._answer(talks, bench)
            for talk in talks:
                if not talk.reason and violates(talk.parent, talk.said[before[talk.parent.id] :]):
                    talk.reason = NOT_FOLLOWED
        if self.min_reward is not None:
            self._filter(talks, self.min_reward, bench)
        yield from _finished(talks, DEMONSTRATION, self._template().hash, bench, other_turn=self.turns > 1)

    def _filter(self, talks: Sequence[Talk], least: float, bench: Workbench) -> None:
        going = [talk for talk in talks if not talk.reason]
        groups = [
            (Prompt(tuple(each.messages[:-1]), _metadata(each, other_turn=self.turns > 1)), [each.messages[-1].content])
            for each in going
        ]
        for talk, (verdict,) in zip(going, bench.rate(groups), strict=True):
            talk.reward = verdict.reward
            if verdict.reward is None or not math.isfinite(verdict.reward):
                talk.reason = NOT_RATED
            elif verdict.reward < least:
                talk.reason = LOW_REWARD


def _metadata(talk: Talk, *, other_turn: bool) -> Mapping[str, Any]:
    """Return the parent's metadata; without what holds for the first answer only if another one is the last."""
    return for_another_turn(talk.parent.metadata) if other_turn else talk.parent.metadata


def _finished(talks: Sequence[Talk], kind: str, template: str, bench: Workbench, *, other_turn: bool) -> Iterator[Item]:
    """Yield the dialogues that were not given up, and count the others."""
    for talk in talks:
        if talk.reason:
            bench.drop(talk.reason)
            continue
        rated = {} if talk.reward is None else {"reward": talk.reward}
        metadata = {**_metadata(talk, other_turn=other_turn), "persona": talk.persona, **rated}
        item = bench.item(
            kind,
            [talk.parent],
            answers=talk.answers,
            template=template,
            messages=tuple(talk.messages),
            details=rated,
            metadata=metadata,
        )
        if bench.keep(item):
            yield item


def _talk_calls(parents: int, answers: int, turns: int, max_new_tokens: int) -> Calls:
    """Return the calls of dialogues; each request holds everything said before."""
    own = text_tokens("", (PROMPT,))
    requests = answers + turns
    history = sum(own + number * max_new_tokens for number in range(requests))
    return Calls(parents, parents * requests, parents * history, parents * requests * max_new_tokens)
