"""Dialogues and requests with an answer, to demonstrations."""

from __future__ import annotations

from collections.abc import Iterator

from align.data.columns import Row
from align.data.readers.cells import FINISH_KEYS, as_finish, as_list, as_object, metadata_of, shortened
from align.data.readers.messages import answer_messages, as_messages, chat_list, check_trained, unread_fields
from align.data.readers.prompts import SYSTEM_COLUMNS, check_not_half_a_pair, row_prompt, with_system
from align.data.readers.roles import role_of
from align.data.readers.tool_calls import as_calls
from align.errors import InputError
from align.records import Demonstration, Message, Prompt, Record

DIALOGUE_COLUMNS = ("messages", "conversations", "conversation", "conversation_json")
ANSWER_COLUMNS = {  # column of the request -> columns of the answer to it
    "prompt": ("completion", "response", "output", "code"),
    "instruction": ("output", "response", "generation"),
    "input": ("output",),
    "question": ("generated_solution", "answer"),
    "problem": ("generated_solution", "solution"),
    "query": ("response",),
    "text": ("code",),
}


def dialogue(row: Row) -> Iterator[Record]:
    """Yield a demonstration, or a prompt if the dialogue does not end with an assistant message."""
    check_not_half_a_pair(row)
    column = next(name for name in DIALOGUE_COLUMNS if name in row)
    turns = as_list(row[column], column)
    messages = with_system(row, as_messages(turns, column))
    metadata = metadata_of(row, {column, "mask", *SYSTEM_COLUMNS, *FINISH_KEYS})
    if not messages or messages[-1].role != "assistant":
        yield Prompt(messages, metadata)
        return
    check_trained(turns)
    if row.get("mask") and role_of(str(row["mask"])) != "user":  # NeMo-Aligner's name for who is not trained
        raise InputError(
            f"mask {shortened(row['mask'])} is not supported: "
            "the loss is computed on all messages of the assistant, and on no others"
        )
    yield Demonstration(messages, metadata, as_finish(row))


def unread_in_dialogue(row: Row) -> set[str]:
    """Return the fields of the dialogue's messages that are not read."""
    column = next((name for name in DIALOGUE_COLUMNS if name in row), "")
    return unread_fields(row.get(column), column)


def function_calls(row: Row) -> Iterator[Record]:
    """Yield a query with the function calls that answer it; Liu et al. 2024 (xLAM)."""
    prompt = row_prompt(row, ("query",))
    answer = Message("assistant", "", as_calls(row["answers"]))
    yield Demonstration((*prompt.messages, answer), metadata_of(row, {*prompt.columns, "answers"}))


def demonstration(row: Row) -> Iterator[Record]:
    """Yield a request with its answer."""
    pairs = [(name, key) for name, keys in ANSWER_COLUMNS.items() for key in keys if {name, key} <= row.keys()]
    if not pairs:
        raise InputError(f"no answer column found; columns: {shortened(list(row))}")
    request, reply = pairs[0]
    prompt = row_prompt(row, (request,))
    if not row.get("history") and any(message.role == "assistant" for message in prompt.messages):
        raise InputError(
            "the prompt contains assistant messages, which a demonstration would train; use a messages column"
        )
    messages = answer_messages(row[reply], reply)
    check_trained(chat_list(row[reply], reply) or [])
    metadata = metadata_of(row, {*prompt.columns, reply, *FINISH_KEYS})
    yield Demonstration((*prompt.messages, *messages), metadata, as_finish(row))


def seed_tasks(row: Row) -> Iterator[Record]:
    """Yield a demonstration for each instance of an instruction; Wang et al. 2022 (Self-Instruct)."""
    metadata = metadata_of(row, {"instances"})
    for instance in as_list(row["instances"], "instances"):
        yield from demonstration({**metadata, **as_object(instance, "an instance")})
