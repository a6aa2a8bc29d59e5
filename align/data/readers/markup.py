"""Text with turn markers to messages: SteerLM's markup, and the Human/Assistant markup of HH-RLHF."""

from __future__ import annotations

import re

from align.data.readers.roles import role_of
from align.records import Message

STEERLM = re.compile(r"(?:\A|\n)<extra_id_[01]>(System|User|Assistant)\n")
STEERLM_END = re.compile(r"\n?<extra_id_[12]>\s*\Z")
HUMAN_ASSISTANT = re.compile(r"\n\n(Human|Assistant):")  # Bai et al. 2022 (HH-RLHF)


def messages_from_markup(text: str) -> tuple[Message, ...]:
    r"""Return the messages of a text with SteerLM or Human/Assistant markup, or none if it has no such markup.

    The header of an unwritten answer at the end is left out, and so is an empty system message.

    >>> [message.content for message in messages_from_markup("\n\nHuman: Hi\n\nAssistant: Hello")]
    ['Hi', 'Hello']
    """
    before, *turns = STEERLM.split(without_end_marker(text) if STEERLM.search(text) else text)
    if not turns:
        before, *turns = HUMAN_ASSISTANT.split(text)
        if before or not turns:
            return ()
        turns = [turn.strip() for turn in turns]
    messages = [Message(role_of(name), content) for name, content in zip(turns[::2], turns[1::2], strict=True)]
    if before:
        messages.insert(0, Message("user", before))
    if messages[0] == Message("system", ""):
        messages.pop(0)
    if messages and messages[-1] == Message("assistant", ""):
        messages.pop()
    return tuple(messages)


def without_end_marker(text: str) -> str:
    """Return the text without SteerLM's marker at its end."""
    return STEERLM_END.sub("", text)
