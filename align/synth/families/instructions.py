"""Prompts with verifiable instructions, in three forms, and pairs of which one answer violates an instruction.

The forms are those of Adler et al. 2024 (sec. 3.2.1), the instructions those of `align.synth.constraints`: in a single
turn; persistent over all turns; and as a request to revise the answer before. The wordings are ours. Pairs follow
Lambert et al. 2024 (Tülu 3): the rejected answer was written for a prompt without one of the instructions, so no judge
is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from align.errors import InputError
from align.records import Message, Prompt
from align.rewards.published_rows import ANSWER_KEYS, TEST_KEYS
from align.rewards.verifiers.instructions import follows
from align.synth.constraints import Constraint, draw_constraints, instruction_columns
from align.synth.families.family import Calls, ChildFamily, lost, text_tokens
from align.synth.items import PAIR, PROMPT, Item
from align.synth.settings import ConstraintSettings, Kinds

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer
    from align.synth.workbench import Workbench

SINGLE, PERSISTENT, REVISION = "single", "persistent", "revision"
FORM = "form"  # key of the metadata
JOINS = {  # form -> ways to join a prompt and its instructions
    SINGLE: (
        "{prompt}\n\n{instructions}",
        "{prompt} {instructions}",
        "{prompt}\n\nRequirements: {instructions}",
        "{instructions}\n\n{prompt}",
    ),
    PERSISTENT: (
        "[BEGIN INSTRUCTION]\n{instructions}\n[END INSTRUCTION]\nThe instruction above holds for this question and for "
        "all that follow.\n\n{prompt}",
        "<instruction>\n{instructions}\n</instruction>\nFollow what stands between the marks in every answer of this "
        "conversation, beginning with this one.\n\n{prompt}",
        "{prompt}\n\n---- standing instruction ----\n{instructions}\n---- end ----\nIt applies to this answer and to "
        "each later one.",
    ),
    REVISION: (
        "Revise your answer so that it meets this requirement: {instructions}",
        "Rewrite what you just wrote. {instructions}",
        "Please change your last answer accordingly: {instructions}",
    ),
}
INSTRUCTION_KEYS = ("instruction_id_list", "kwargs", "instructions", FORM)  # of the metadata
# Kinds that mean the first prompt only: no later answer can follow them
OF_ONE_PROMPT = frozenset({"combination:repeat_prompt"})
NOT_FOLLOWED, FOLLOWED, HAS_SOME = "instruction not followed", "rejected answer follows it", "has instructions already"


def violates(item: Item, answers: Sequence[str]) -> bool:
    """Return whether answers violate the instructions of their prompt.

    Persistent instructions hold for every answer; those of a single turn or of a revision for the first one after them.
    """
    checked = answers if item.metadata.get(FORM) == PERSISTENT else answers[:1]
    return not all(all(follows(item.metadata, answer)) for answer in checked)


def for_another_turn(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a prompt without what only holds for its own answer.

    These are known answers, tests, and instructions that are not persistent.
    """
    kept = INSTRUCTION_KEYS if metadata.get(FORM) == PERSISTENT else ()
    ended = {*ANSWER_KEYS, *TEST_KEYS, *INSTRUCTION_KEYS} - {*kept}
    return {name: value for name, value in metadata.items() if name not in ended}


class _Constrained(ChildFamily):
    """Draws verifiable instructions for prompts."""

    kinds: Kinds = Field(default=None, description="Kinds of IFEval instructions to draw from; all if left out.")
    max_constraints: int = Field(
        default=1, ge=1, description="Most instructions of a prompt; each number up to it is equally likely."
    )

    reads: ClassVar[tuple[str, ...]] = (PROMPT,)

    def _drawn(self, parent: Item, bench: Workbench, without: frozenset[str] = frozenset()) -> list[Constraint]:
        """Return the instructions of a prompt."""
        settings = ConstraintSettings(kinds=self.kinds, max_constraints=self.max_constraints)
        prompt = Prompt(parent.messages)
        return draw_constraints(prompt, settings, seed=bench.random("instructions").getrandbits(31), without=without)


class Instructions(_Constrained):
    """Prompts with verifiable instructions: single turn, persistent over all turns, or a revision of an answer."""

    family: Literal["instructions"] = "instructions"
    form: Literal["single", "persistent", "revision"] = Field(
        default="single", description="One turn; over all turns; or as a second turn that asks to revise the answer."
    )

    makes: ClassVar[str] = PROMPT

    def check(self) -> None:
        """Raise if no kind can be drawn for the form."""
        if self.form != SINGLE and self.kinds is not None and OF_ONE_PROMPT.issuperset(self.kinds):
            kinds = ", ".join(sorted(set(self.kinds)))
            raise InputError(
                f"no answer after the first can follow {kinds}: add a kind, or use form: single", ("kinds",)
            )

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return one request a prompt for revisions; the other forms need none."""
        if self.form != REVISION:
            return Calls(parents)
        return Calls(parents, parents, parents * text_tokens("", self.reads), parents * max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield a prompt for each parent."""
        bench.want_each(parents)
        plain = [parent for parent in parents if not _has_instructions(parent)]
        bench.drop(HAS_SOME, len(parents) - len(plain))
        answers: list[Answer | None] = [None] * len(plain)
        if self.form == REVISION:
            answers = [*bench.ask([bench.chat(parent.messages) for parent in plain])]
        for parent, answer in zip(plain, answers, strict=True):
            reason = lost(answer) if answer is not None else ""
            if reason:
                bench.drop(reason)
                continue
            item = self._joined(parent, answer, bench)
            if bench.keep(item):
                yield item

    def _joined(self, parent: Item, answer: Answer | None, bench: Workbench) -> Item:
        without = frozenset[str]() if self.form == SINGLE else OF_ONE_PROMPT
        constraints = self._drawn(parent, bench, without)
        joins = JOINS[self.form]
        if any(each.kind in OF_ONE_PROMPT for each in constraints):  # they speak of the request above
            joins = [each for each in joins if each.startswith("{prompt}")]
        join = bench.random("join", parent.id).choice(joins)
        instructions = " ".join(each.wording for each in constraints)
        if answer is None:
            *before, last = parent.messages
            text = join.format(prompt=last.content.strip(), instructions=instructions)
            messages = (*before, replace(last, content=text))
        else:
            text = join.format(instructions=instructions)
            messages = (*parent.messages, Message("assistant", answer.text), Message("user", text))
        columns = {
            **parent.metadata,
            **instruction_columns(Prompt(parent.messages), text, constraints),
            FORM: self.form,
        }
        answers = [answer] if answer is not None else []
        return bench.item(PROMPT, [parent], answers=answers, messages=messages, metadata=columns)


class RelaxedConstraint(_Constrained):
    """Pairs without a judge: the rejected answer was written for the prompt without one of its instructions.

    The chosen answer follows all instructions of the prompt and the rejected one violates the one that was left out;
    both are verified.
    """

    family: Literal["relaxed_constraint"] = "relaxed_constraint"
    tries: int = Field(default=4, ge=1, description="Maximum number of answers sampled for each side.")

    makes: ClassVar[str] = PAIR

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return two requests a prompt."""
        number = 2 * parents
        return Calls(parents, number, number * text_tokens("", self.reads), number * max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield a pair for each prompt that has an answer of both kinds."""
        bench.want_each(parents)
        plain = [parent for parent in parents if not _has_instructions(parent)]
        bench.drop(HAS_SOME, len(parents) - len(plain))
        sides = [_Sides(parent, self._drawn(parent, bench), bench) for parent in plain]
        self._draw(sides, CHOSEN, bench)
        self._draw([each for each in sides if CHOSEN in each.answers], REJECTED, bench)
        for each in sides:
            if missing := next((side for side in (CHOSEN, REJECTED) if side not in each.answers), ""):
                bench.drop(NOT_FOLLOWED if missing == CHOSEN else FOLLOWED)
                continue
            pair = (each.answers[CHOSEN], each.answers[REJECTED])
            item = bench.item(
                PAIR,
                [each.parent],
                answers=pair,
                messages=each.prompts[CHOSEN],
                responses=tuple(answer.text for answer in pair),
                metadata={**each.parent.metadata, **each.columns, "relaxed": each.relaxed.kind},
            )
            if bench.keep(item):
                yield item

    def _draw(self, sides: Sequence[_Sides], side: str, bench: Workbench) -> None:
        """Draw answers of one side, until each prompt has a complete one that fits."""
        for number in range(self.tries):
            waiting = [each for each in sides if side not in each.answers]
            answers = bench.ask([bench.chat(each.prompts[side], number) for each in waiting])
            for each, answer in zip(waiting, answers, strict=True):
                if not lost(answer) and each.fits(side, answer.text):
                    each.answers[side] = answer


CHOSEN, REJECTED = "chosen", "rejected"


class _Sides:
    """A prompt with its instructions, and without one of them."""

    def __init__(self, parent: Item, constraints: Sequence[Constraint], bench: Workbench) -> None:
        self.parent = parent
        self.relaxed = bench.random("relaxed", parent.id).choice(constraints)
        others = [each for each in constraints if each != self.relaxed]
        self.prompts = {CHOSEN: _with_instructions(parent, constraints), REJECTED: _with_instructions(parent, others)}
        text = self.prompts[CHOSEN][-1].content
        self.columns = instruction_columns(Prompt(parent.messages), text, constraints)
        self.answers: dict[str, Answer] = {}

    def fits(self, side: str, text: str) -> bool:
        """Return whether an answer follows all instructions, or violates the one that was left out."""
        if side == CHOSEN:
            return all(follows(self.columns, text))
        relaxed = {"instruction_id_list": [self.relaxed.kind], "kwargs": [self.relaxed.settings]}
        return not any(follows(relaxed, text))


def _has_instructions(parent: Item) -> bool:
    return "instruction_id_list" in parent.metadata or "instructions" in parent.metadata


def _with_instructions(parent: Item, constraints: Sequence[Constraint]) -> tuple[Message, ...]:
    """Return the messages of a prompt with instructions after its last one."""
    *before, last = parent.messages
    wording = " ".join(each.wording for each in constraints)
    text = f"{last.content.strip()}\n\n{wording}" if wording else last.content
    return (*before, replace(last, content=text))
