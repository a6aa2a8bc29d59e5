"""Rows of Glaive's function calling: two columns of text, with marks before each turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from align.data.columns import Row
from align.data.readers.cells import as_text, metadata_of, shortened
from align.data.readers.tool_calls import as_calls, parsed, tool_definitions
from align.data.strict_json import parse_json_at, skip_space
from align.errors import InputError
from align.records import Demonstration, Message, Prompt, Record, Tools

MARKS = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
TURN = re.compile(rf"(?:\A|\n)\s*({'|'.join(MARKS)}):")
END = "<|endoftext|>"
CALL, CALL_END = "<functioncall>", "</functioncall>"
QUOTED_ARGUMENTS = re.compile(  # a JSON object whose arguments are JSON in single quotes
    r"""\{\s*"name":\s*(?P<name>"(?:[^"\\]|\\.)*"),\s*"arguments":\s*'(?P<arguments>.*)'\s*\}""", re.DOTALL
)
# How a system message introduces the functions after it; templates write an introduction of their own
INTRODUCTION = re.compile(r"\s*with access to the following functions\.?\s*(?:Use them if required)?\s*-?\s*\Z")


def glaive(row: Row) -> Iterator[Record]:
    """Yield the dialogue with the functions that its system message defines."""
    system, tools = _system(as_text(row["system"], "system"))
    before, *turns = TURN.split(as_text(row["chat"], "chat"))
    if before.strip() or not turns:
        raise InputError(f"chat begins with {shortened(before)}; one of {': '.join(MARKS)}: is needed")
    messages = [_message(MARKS[mark], text) for mark, text in zip(turns[::2], turns[1::2], strict=True)]
    if system:
        messages.insert(0, Message("system", system))
    metadata = metadata_of(row, ("system", "chat"))
    if messages[-1].role == "assistant":
        yield Demonstration(tuple(messages), metadata, tools=tools)
    else:
        yield Prompt(tuple(messages), metadata, tools)


def _system(text: str) -> tuple[str, Tools]:
    """Return the system message without its definitions of functions, and these."""
    text = text.strip().removeprefix("SYSTEM:").strip()
    start = text.find("{")
    if start < 0:
        return text, ()
    found = list[Any]()
    place = start
    while text.startswith("{", place):
        try:
            value, place = parse_json_at(text, place)
        except (ValueError, RecursionError) as error:
            raise InputError(f"a function of the system message is not JSON: {shortened(text[place:])}") from error
        found.append(value)
        place = skip_space(text, place)
    introduced = INTRODUCTION.sub(".", text[:start])
    return "\n\n".join(part for part in (introduced.strip(), text[place:].strip()) if part), tool_definitions(found)


def _message(role: str, text: str) -> Message:
    if role != "assistant":
        return Message(role, text.strip())
    content, *calls = text.replace(END, "").split(CALL)
    called = [call for each in calls for call in as_calls(_call(each.replace(CALL_END, "").strip()))]
    return Message(role, content.strip(), tuple(called))


def _call(text: str) -> Any:  # noqa: ANN401 - JSON of any type, checked later
    """Return a call as an object; its arguments may be JSON in single quotes, with escaped quotes inside."""
    match = QUOTED_ARGUMENTS.fullmatch(text)
    if match is None:
        return parsed(text, "a tool call")
    arguments = match["arguments"]
    value = parsed(arguments.replace("\\'", "'"), "arguments of a tool call")
    return {
        "name": parsed(match["name"], "a tool call"),
        "arguments": value if isinstance(value, Mapping) else arguments,
    }
