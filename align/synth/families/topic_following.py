"""Dialogues that keep to the subject of a system instruction, with distractors that are turned down.

After CantTalkAboutThis (Sreedhar et al. 2024): a scenario has a system instruction and a dialogue, written in one
request; a list of distractors says after which turn of the assistant each one comes; the answer to a distractor is a
fixed kind of sentence. The wordings are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from align.records import Message
from align.synth.families.family import Calls, ChildFamily, builtin_template, lost, text_tokens
from align.synth.families.listing import LANGUAGE, speaks
from align.synth.items import DEMONSTRATION, TOPIC, Item
from align.synth.parsing.lists import TOO_FEW, items
from align.synth.parsing.scripts import script

if TYPE_CHECKING:  # imports torch
    from align.synth.requests import Answer
    from align.synth.workbench import Workbench

INSTRUCTION, DIALOGUE, DISTRACTORS = "topic_following", "topic_following_dialogue", "topic_following_distractors"
DEFLECTIONS = (
    "That is outside of what I can help with here. Shall we go on with what we were discussing?",
    "I'm sorry, I can only help with the subject of this conversation. Let us return to it.",
    "I have to keep to the subject I am here for, so I cannot answer that. What else would you like to know about it?",
)
PLACE = re.compile(r"^\[?\(?(?:turn\s*)?(\d{1,2})[\])]?\s*[:.\-–—]?\s*(.+)$", re.IGNORECASE | re.DOTALL)
NO_SCRIPT, NO_DISTRACTOR = "not a dialogue", "no distractor has a place"


class TopicFollowing(ChildFamily):
    """Dialogues under a system instruction, with distractors placed after named turns."""

    family: Literal["topic_following"] = "topic_following"
    turns: int = Field(default=5, ge=1, description="Turns of the dialogue, without distractors.")
    distractors: int = Field(default=5, ge=1, description="Distractors asked for, of each dialogue.")

    makes: ClassVar[str] = DEMONSTRATION
    reads: ClassVar[tuple[str, ...]] = (TOPIC,)

    def calls(self, parents: int, max_new_tokens: int) -> Calls:
        """Return three requests a topic."""
        tokens = text_tokens(builtin_template(DISTRACTORS).text, (DEMONSTRATION,))
        return Calls(parents, 3 * parents, 3 * parents * tokens, 3 * parents * max_new_tokens)

    def make(self, parents: Sequence[Item], bench: Workbench) -> Iterator[Item]:
        """Yield a dialogue for each topic."""
        bench.want_each(parents)
        template = builtin_template(INSTRUCTION)
        answers = bench.ask([bench.request(template.fill(topic=parent.prompt)) for parent in parents])
        told = self._kept(list(zip(parents, [(each,) for each in answers], strict=True)), bench)
        template = builtin_template(DIALOGUE)
        texts = [template.fill(instruction=asked[0].text.strip(), turns=self.turns) for _, asked in told]
        answers = bench.ask([bench.request(text) for text in texts])
        held = [(parent, (*asked, answer)) for (parent, asked), answer in zip(told, answers, strict=True)]
        spoken = [(parent, asked, script(asked[-1].text)) for parent, asked in self._kept(held, bench)]
        whole = [each for each in spoken if each[2]]
        bench.drop(NO_SCRIPT, len(spoken) - len(whole))
        template = builtin_template(DISTRACTORS)
        texts = [
            template.fill(instruction=asked[0].text.strip(), history=_numbered(turns), number=self.distractors)
            for _, asked, turns in whole
        ]
        for (parent, asked, turns), answer in zip(
            whole, bench.ask([bench.request(text) for text in texts]), strict=True
        ):
            placed = self._placed(answer, turns, bench)
            said = "\n".join([*(user for user, _ in turns), *(text for _, text in placed)])
            if not speaks(said, bench.language):
                bench.drop(LANGUAGE)
                continue
            if not placed:
                bench.drop(NO_DISTRACTOR)
                continue
            messages = _woven(asked[0].text.strip(), turns, placed, bench.random("deflection", parent.id))
            metadata = {"distractors": [{"bot turn": turn, "distractor": text} for turn, text in placed]}
            answered = [*asked, answer]
            item = bench.item(
                DEMONSTRATION, [parent], answers=answered, template=template.hash, messages=messages, metadata=metadata
            )
            if bench.keep(item):
                yield item

    def _kept(
        self, asked: Sequence[tuple[Item, tuple[Answer, ...]]], bench: Workbench
    ) -> list[tuple[Item, tuple[Answer, ...]]]:
        """Return those whose latest answer is of use, and count the others."""
        found: list[tuple[Item, tuple[Answer, ...]]] = []
        for parent, answers in asked:
            if reason := lost(answers[-1]):
                bench.drop(reason)
            else:
                found.append((parent, answers))
        return found

    def _placed(self, answer: Answer, turns: Sequence[tuple[str, str]], bench: Workbench) -> list[tuple[int, str]]:
        """Return the distractors, each with the number of the turn that it follows."""
        parsed = items(answer.text, self.distractors, finish=answer.finish)
        matches = [PLACE.match(text) for text in parsed.items]
        placed = [(int(match[1]), match[2].strip()) for match in matches if match and 1 <= int(match[1]) <= len(turns)]
        if len(placed) < self.distractors:
            bench.counts[f"distractors: {TOO_FEW}"] += self.distractors - len(placed)
        return sorted(placed)


def _numbered(turns: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(f"[{at + 1}]\nUser: {user}\nAssistant: {answer}" for at, (user, answer) in enumerate(turns))


def _woven(
    instruction: str, turns: Sequence[tuple[str, str]], placed: Sequence[tuple[int, str]], rng: Random
) -> tuple[Message, ...]:
    """Return the dialogue with each distractor after its turn, and an answer that turns it down."""
    messages = [Message("system", instruction)]
    for at, (user, answer) in enumerate(turns):
        messages += [Message("user", user), Message("assistant", answer)]
        for turn, distractor in placed:
            if turn == at + 1:
                messages += [Message("user", distractor), Message("assistant", rng.choice(DEFLECTIONS))]
    return tuple(messages)
