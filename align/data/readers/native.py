"""The native form of records: what `write` writes and every format can be converted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from align.data.columns import Row
from align.data.readers.demonstrations import dialogue, unread_in_dialogue
from align.data.readers.prompts import prompt_only
from align.data.readers.response_groups import group, unread_fields
from align.data.readers.tool_calls import TOOLS_COLUMN
from align.errors import InputError
from align.records import Demonstration, Message, Prompt, Record, Response


def native(row: Row) -> Iterator[Record]:
    """Yield the record of a row that `native_row` returned, with its tools among the metadata (`native_record`)."""
    if "responses" in row:
        return group(row)
    return dialogue(row) if "messages" in row else prompt_only(row)


def unread_in_native(row: Row) -> set[str]:
    """Return the fields of responses, or of the messages of a dialogue, that are not read."""
    return unread_in_dialogue(row) if "messages" in row and "responses" not in row else unread_fields(row)


def native_record(row: Row) -> Record:
    """Return the record of a row that `native_row` returned."""
    record = next(native({name: value for name, value in row.items() if name != TOOLS_COLUMN}))
    return replace(record, tools=tuple(row.get(TOOLS_COLUMN, ())))


def native_row(record: Record) -> dict[str, Any]:
    """Return the row that `native_record` reads back as the record.

    >>> native_row(Prompt((Message("user", "Hello"),)))
    {'prompt': [{'role': 'user', 'content': 'Hello'}], 'metadata': {}}
    """
    metadata = dict(record.metadata)
    tools: dict[str, Any] = {"tools": list(record.tools)} if record.tools else {}
    if isinstance(record, Prompt):
        return {"prompt": _chat(record.messages), **tools, "metadata": metadata}
    if isinstance(record, Demonstration):
        if record.messages[-1].role != "assistant":
            raise InputError("a demonstration that ends with a prompt would be read back as a prompt")
        return {"messages": _chat(record.messages), **tools, **_finish(record), "metadata": metadata}
    responses = [
        {
            **{name: value for name, value in one.message.to_json().items() if name != "role"},
            "reward": one.reward,
            "attributes": dict(one.attributes),
            **_finish(one),
        }
        for one in record.responses
    ]
    shown = {"prompt": _chat(record.prompt), **tools, "responses": responses, "chosen": record.chosen}
    return {**shown, "metadata": metadata}


def _finish(record: Demonstration | Response) -> dict[str, str]:
    return {} if record.finish is None else {"finish": record.finish}


def _chat(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [message.to_json() for message in messages]
