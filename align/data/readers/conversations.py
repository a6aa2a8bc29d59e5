"""Dialogues with what was noted beside them: moderation of each message, or distractors for some turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align.data.columns import Row
from align.data.readers.cells import as_list, as_object, as_text, shortened
from align.data.readers.demonstrations import dialogue
from align.data.readers.messages import as_messages, unread_fields
from align.errors import InputError
from align.records import Record

WITH_DISTRACTORS = "conversation_with_distractors"
DISTRACTOR_KEYS = ("bot turn", "distractor")


def moderated(row: Row) -> Iterator[Record]:
    """Yield a dialogue whose metadata says with `flagged` whether the moderation flagged any user message.

    `openai_moderation` has one entry for each message; Zheng et al. 2023 (LMSYS-Chat-1M), Zhao et al. 2024 (WildChat).
    """
    turns = as_list(row["conversation"], "conversation")
    verdicts = as_list(row["openai_moderation"], "openai_moderation")
    if len(verdicts) != len(turns):
        raise InputError(f"openai_moderation has {len(verdicts)} entries, and conversation has {len(turns)} messages")
    messages = as_messages(turns, "conversation")
    marks = [_flagged(as_object(verdict, "an entry of openai_moderation")) for verdict in verdicts]
    flagged = any(mark for mark, message in zip(marks, messages, strict=True) if message.role == "user")
    rest = {name: value for name, value in row.items() if name != "openai_moderation"}
    yield from dialogue({**rest, "flagged": flagged})


def _flagged(verdict: Row) -> bool:
    flagged = verdict.get("flagged")
    if not isinstance(flagged, bool):
        raise InputError(f"flagged of openai_moderation is {shortened(flagged)}; true or false is needed")
    return flagged


def topic_following(row: Row) -> Iterator[Record]:
    """Yield the dialogues in which the assistant stays on topic; Sreedhar et al. 2024 (CantTalkAboutThis).

    These are the dialogues of `conversation_with_distractors`, each with a distractor of the user; or, in a row without
    them, the dialogue alone. The metadata holds `distractors`: objects with a text of the user (`distractor`) and the
    text of the assistant's turn that it follows (`bot turn`).
    """
    found = dict(row)
    if row.get("distractors"):
        found["distractors"] = [_distractor(value) for value in as_list(row["distractors"], "distractors")]
    dialogues = as_list(found.pop(WITH_DISTRACTORS, None) or [], WITH_DISTRACTORS)
    if not dialogues:
        yield from dialogue(found)
        return
    if not isinstance(dialogues[0], list):  # one dialogue with all of the distractors
        dialogues = [dialogues]
    for turns in dialogues:
        yield from dialogue({**found, "conversation": turns})


def unread_in_topic_following(row: Row) -> set[str]:
    """Return the fields of the dialogue's messages that are not read."""
    return unread_fields(row.get("conversation"), "conversation")


def _distractor(value: Any) -> dict[str, str]:  # noqa: ANN401 - an item of a column
    fields = as_object(value, "a distractor")
    return {key: as_text(fields.get(key), f"{key} of a distractor") for key in DISTRACTOR_KEYS}
