"""The prompt of a row, and its answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from align.data.columns import Row
from align.data.readers.cells import as_list, as_text, metadata_of
from align.data.readers.messages import Messages, answer_messages, prompt_messages
from align.errors import InputError
from align.records import Message, Prompt, Record

PROMPT_COLUMNS = (
    *("prompt", "conversations", "context_messages", "raw_text"),
    *("instruction", "question", "query", "problem", "user_input", "input", "context"),
)
SYSTEM_COLUMNS = ("system", "system_prompt", "system_instruction")
MATERIAL_COLUMNS = ("input", "context")  # what an instruction or a question refers to
HALVES_OF_A_PAIR = ("chosen", "rejected", "chosen_response", "rejected_response")
NUMBERED_RESPONSE = re.compile(r"(response|completion|output|generation|reply|conversation)[ _-]?(\d+|[a-d])", re.I)


class RowPrompt(NamedTuple):
    """The prompt of a row, and the columns it comes from."""

    messages: Messages
    columns: tuple[str, ...]


def row_prompt(row: Row, columns: Sequence[str] = PROMPT_COLUMNS) -> RowPrompt:
    """Return the prompt in the first of `columns` that the row has, or no messages if it has none of them.

    The row's system message and the turns of its `history` come first. The material of an instruction or a question
    (`input`, `context`) follows it after a blank line.
    """
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        return RowPrompt((), ())
    candidates = MATERIAL_COLUMNS if column in ("instruction", "question") else ()
    material, *unused = [name for name in candidates if row.get(name)] or [""]
    value = row[column]
    if material:
        value = f"{as_text(value, column)}\n\n{as_text(row[material], material)}".lstrip("\n")
    messages = prompt_messages(value, column)
    if not any(message.content.strip() for message in messages):
        raise InputError(f"{column} is empty")
    if messages[-1].role == "assistant":
        raise InputError(f"{column} ends with a message of the assistant, which a response cannot continue")
    used = (name for name in candidates if name not in unused)
    return RowPrompt(with_system(row, (*_history(row), *messages)), (column, *used, "history", *SYSTEM_COLUMNS))


def _history(row: Row) -> Messages:
    """Return the messages of the `history` column: a list of questions with their answers."""
    messages: list[Message] = []
    for turn in as_list(row.get("history") or [], "history"):
        texts = [as_text(text, "a text of the history") for text in as_list(turn, "a turn of the history")]
        if len(texts) != 2:
            raise InputError(f"a turn of the history has {len(texts)} texts; a question and its answer are needed")
        messages += (Message("user", texts[0]), Message("assistant", texts[1]))
    return tuple(messages)


def with_system(row: Row, messages: Messages) -> Messages:
    """Return the messages after the row's system message, if it has one that they do not repeat."""
    texts = {as_text(row[name], "the system message") for name in SYSTEM_COLUMNS if row.get(name)}
    own = {message.content for message in messages if message.role == "system"}
    if texts and len({text.strip() for text in texts | own}) > 1:
        raise InputError("the row has two system messages; keep one, in a column or as the first message")
    return (Message("system", texts.pop()), *messages) if texts and not own else messages


def split_answer(prompt: Messages, value: Any, name: str) -> tuple[Messages, Message]:  # noqa: ANN401 - any cell
    """Return the prompt and the message of an answer. A dialogue with a user message brings its own prompt."""
    messages = answer_messages(value, name)
    has_prompt = any(message.role == "user" for message in messages)
    system = tuple(message for message in prompt if message.role == "system" and message not in messages)
    before = system if has_prompt else prompt
    if has_prompt and before and any(message.role == "system" for message in messages):
        raise InputError(f"{name} has another system message than the row; keep one, in {name} or in a column")
    if not has_prompt and not before:
        raise InputError(f"no prompt, neither in a column nor in {name}")
    return (*before, *messages[:-1]), messages[-1]


def check_not_half_a_pair(row: Row) -> None:
    """Raise `InputError` for a row with one half of a pair, which would be read as something else."""
    half = next((name for name in HALVES_OF_A_PAIR if name in row), None)
    if half:
        raise InputError(f"the row has {half} without its counterpart; a pair needs both columns")


def has_no_responses(row: Row) -> bool:
    """Return whether no column is one of several responses, which a bare prompt would lose."""
    return not any(row[name] and NUMBERED_RESPONSE.fullmatch(name) for name in row)


def prompt_only(row: Row) -> Iterator[Record]:
    """Yield a prompt; its metadata holds what a verifier of its answers needs."""
    check_not_half_a_pair(row)
    prompt = row_prompt(row, ("prompt",))
    yield Prompt(prompt.messages, metadata_of(row, prompt.columns))
