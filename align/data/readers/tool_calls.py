"""Thoughts, tool calls and tools as text, in the form of Hermes 2 Pro and of the templates of Qwen 2.5 and 3.

A message holds text only, so that judges, journals and servers see what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from align.data.readers.cells import as_list, as_object, as_text, shortened
from align.errors import InputError

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
CLOSED_THOUGHT = "</think>"
TOOLS_TAG = "<tools>"
TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_END = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def answer_text(fields: Mapping[str, Any], content: str) -> str:
    """Return the thought, the content and the tool calls of an assistant message as one text."""
    calls = fields.get("tool_calls") or []
    if fields.get("function_call"):
        calls = [*as_list(calls, "tool_calls"), fields["function_call"]]
    body = "\n".join(text for text in (content, calls_text(calls)) if text)
    return _with_thought(fields, body)


def _with_thought(fields: Mapping[str, Any], body: str) -> str:
    thoughts = {as_text(fields[name], name).strip("\n") for name in THOUGHT_FIELDS if fields.get(name)}
    if not thoughts:
        return body
    if len(thoughts) > 1:
        raise InputError("a message has two different thoughts; keep one")
    (thought,) = thoughts
    if CLOSED_THOUGHT in body:
        inside = body.partition(CLOSED_THOUGHT)[0].rpartition("<think>")[2]
        if inside.strip() != thought.strip():
            raise InputError("a message has a thought in its content and another one beside it; keep one")
        return body
    return f"<think>\n{thought}\n{CLOSED_THOUGHT}\n\n{body.lstrip(chr(10))}"


def calls_text(calls: Any) -> str:  # noqa: ANN401 - a cell of any type
    """Return tool calls as text. A call is an object with a name and arguments, alone or as OpenAI's `function`."""
    return "\n".join(f"<tool_call>\n{_call(each)}\n</tool_call>" for each in as_list(calls or [], "tool_calls"))


def _call(item: Any) -> str:  # noqa: ANN401 - a cell of any type
    call = as_object(_parsed(item), "a tool call")
    call = as_object(_parsed(call["function"]), "a tool call") if call.get("function") else call
    if not isinstance(call.get("name"), str):
        raise InputError(f"a tool call has the name {shortened(call.get('name'))}; text is needed")
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        as_object(_parsed(arguments), "arguments of a tool call")
    else:
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return f'{{"name": {json.dumps(call["name"], ensure_ascii=False)}, "arguments": {arguments}}}'


def _parsed(value: Any) -> Any:  # noqa: ANN401 - JSON holds any type
    """Return an object, also one that is written as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"a tool call contains {shortened(value)}, which is not JSON") from error


def function_call_text(value: Any) -> str:  # noqa: ANN401 - a cell of any type
    """Return the text of a ShareGPT turn of a function call: one call or a list of them, also as JSON."""
    found = _parsed(value)
    return calls_text(found if isinstance(found, list) else [found])


def tool_definitions(value: Any) -> list[Mapping[str, Any]]:  # noqa: ANN401 - a cell of any type
    """Return a `tools` column as a list of objects, also one that is written as JSON; empty for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    items = cast(list[Any], value) if isinstance(value, list) else []
    objects = [_object_or_none(each) for each in items]
    return [each for each in objects if each is not None] if None not in objects else []


def _object_or_none(item: Any) -> Mapping[str, Any] | None:  # noqa: ANN401 - a cell of any type
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = _parsed(item)
    return cast("Mapping[str, Any]", item) if isinstance(item, Mapping) else None


def system_text(system: str, tools: list[Mapping[str, Any]]) -> str:
    """Return the system message with the definitions of tools, unless it already has them."""
    if not tools or TOOLS_TAG in system:
        return system
    listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
    return "\n\n".join(text for text in (system, f"{TOOLS_HEAD}{listed}{TOOLS_END}") if text)
