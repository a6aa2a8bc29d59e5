"""Dialogues that a teacher writes in one answer."""

from __future__ import annotations

import re

SPEAKER = re.compile(
    r"^[ \t]*[*_#\[]{0,3}(user|assistant)(?:\s+\d+)?[*_\]]{0,3}\s*:[*_]{0,2}\s*", re.IGNORECASE | re.MULTILINE
)


def script(text: str) -> list[tuple[str, str]]:
    r"""Return the turns of a dialogue, a user's message and its answer; none unless they alternate, the user first.

    A message without an answer at the end is left out.

    >>> script("User: Hi.\nAssistant: Hello!\n**User:** Who are you?\nAssistant: A bot.\nUser: Oh")
    [('Hi.', 'Hello!'), ('Who are you?', 'A bot.')]
    """
    marks = list(SPEAKER.finditer(text))
    if not marks:
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    said = [(mark[1].lower(), text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    if [speaker for speaker, _ in said] != [("user", "assistant")[place % 2] for place in range(len(said))]:
        return []
    texts = [each for _, each in said]
    turns = list(zip(texts[::2], texts[1::2], strict=False))
    return turns if all(user and answer for user, answer in turns) else []
