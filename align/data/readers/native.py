"""The native form of records: what `write` writes and every format can be converted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from align.data.readers.demonstrations import dialogue
from align.data.readers.prompts import prompt_only
from align.data.readers.response_groups import group
from align.data.rows import Row
from align.errors import InputError
from align.records import Demonstration, Message, Prompt, Record, Response


def native(row: Row) -> Iterator[Record]:
    """Yield the record of a row that `native_row` returned."""
    if "responses" in row:
        return group(row)
    return dialogue(row) if "messages" in row else prompt_only(row)


def native_row(record: Record) -> dict[str, Any]:
    """Return the row that `native` reads back as the record.

    >>> native_row(Prompt((Message("user", "Hello"),)))
    {'prompt': [{'role': 'user', 'content': 'Hello'}], 'metadata': {}}
    """
    metadata = dict(record.metadata)
    if isinstance(record, Prompt):
        return {"prompt": _chat(record.messages), "metadata": metadata}
    if isinstance(record, Demonstration):
        if record.messages[-1].role != "assistant":
            raise InputError("a demonstration that ends with a prompt would be read back as a prompt")
        return {"messages": _chat(record.messages), **_finish(record), "metadata": metadata}
    responses = [
        {"content": one.content, "reward": one.reward, "attributes": dict(one.attributes), **_finish(one)}
        for one in record.responses
    ]
    return {"prompt": _chat(record.prompt), "responses": responses, "chosen": record.chosen, "metadata": metadata}


def _finish(record: Demonstration | Response) -> dict[str, str]:
    return {} if record.finish is None else {"finish": record.finish}


def _chat(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
