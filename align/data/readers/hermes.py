"""Dialogues of Hermes's function calling: tools, calls and results as text between tags; Teknium et al. 2024."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from align.data.columns import Row
from align.data.readers.cells import as_list, as_object, as_text, shortened
from align.data.readers.demonstrations import dialogue
from align.data.readers.tool_calls import as_calls, parsed, tool_definitions, tools_of
from align.errors import InputError
from align.records import Demonstration, Message, Prompt, Record

OPENING = "You are a function calling AI model"  # of the part of a system message that templates write themselves
TOOLS = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
LAST_TAG = "</tool_call>"  # of the example of a call, which ends that part


def is_hermes(row: Row) -> bool:
    """Return whether the dialogue begins with a system message that defines tools between tags."""
    turns: Any = row["conversations"]
    first: Any = turns[0] if isinstance(turns, list) and turns else {}
    text = first.get("value") if isinstance(first, dict) else None
    return isinstance(text, str) and OPENING in text and TOOLS.search(text) is not None


def hermes(row: Row) -> Iterator[Record]:
    """Yield the dialogue with its tools and its tool calls; one that does not define tools is read as it is."""
    if not is_hermes(row):
        yield from dialogue(row)
        return
    system = as_text(as_object(as_list(row["conversations"], "conversations")[0], "a message")["value"], "system")
    match = TOOLS.search(system)
    assert match is not None  # `is_hermes`
    tools = tools_of(row) or tool_definitions(_literal(match[1], "the tools of the system message"))
    own = (system[: match.start()].partition(OPENING)[0], system[match.end() :].rpartition(LAST_TAG)[2])
    text = "\n\n".join(part.strip() for part in own if part.strip())
    for record in dialogue(row):
        assert isinstance(record, Demonstration | Prompt)
        first = (Message("system", text),) if text else ()
        later = (part for message in record.messages[1:] for part in _structured(message))
        yield replace(record, messages=(*first, *later), tools=tools)


def _structured(message: Message) -> Iterator[Message]:
    """Yield a message with its tool calls, or one message for each result of a tool."""
    if message.role == "assistant":
        content, *others = CALL.split(message.content)
        between = [text for text in others[1::2] if text.strip()]
        if between:
            raise InputError(f"an assistant message has text after a tool call: {shortened(between[0])}")
        calls = [call for text in others[::2] for call in as_calls(_literal(text, "a tool call"))]
        yield Message("assistant", content.strip() if calls else content, (*message.tool_calls, *calls))
    elif message.role == "tool" and (results := RESULT.findall(message.content)):
        yield from (Message("tool", text) for text in results)
    else:
        yield message


def _literal(text: str, name: str) -> Any:  # noqa: ANN401 - any literal
    """Return JSON, or a literal of Python, in which some rows are written."""
    try:
        return parsed(text, name)
    except InputError:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise InputError(f"{name} is {shortened(text)}; JSON is needed") from error
