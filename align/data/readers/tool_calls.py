"""Tools, tool calls and thoughts of rows, in the forms in which datasets write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from align.data.columns import Row
from align.data.readers.cells import as_list, as_object, as_text, shortened
from align.data.strict_json import parse_json
from align.errors import InputError
from align.records import ToolCall, Tools

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
CLOSED_THOUGHT = "</think>"
TOOLS_COLUMN = "tools"
TOOLS_TAG = "<tools>"  # in a system message that has the tools as text
ARGUMENTS = ("arguments", "parameters", "args", "input")  # OpenAI; ToolACE; LangChain; Anthropic
CALL_KEYS = ("name", "id", "type", "index", "function", *ARGUMENTS)
TOOLS_TEXT = re.compile(r'\s*(?:\{|\[\s*(?:\{|"\s*\{))')  # JSON of objects, which may be texts of objects


def with_thought(fields: Mapping[str, Any], body: str) -> str:
    """Return the content of an assistant message after the thought that the message has beside it."""
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


def calls_of(fields: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """Return the tool calls of an assistant message, also one in OpenAI's older `function_call`."""
    calls = as_list(fields.get("tool_calls") or [], "tool_calls")
    return as_calls([*calls, fields["function_call"]] if fields.get("function_call") else calls)


def as_calls(value: Any) -> tuple[ToolCall, ...]:  # noqa: ANN401 - a cell of any type
    """Return one call or a list of them, also as JSON.

    A call is an object with a name and arguments, alone or as OpenAI's `function`; either may be JSON in a string.
    Raise `InputError` for a call whose arguments may be under a key that is not in `ARGUMENTS`.
    """
    found = parsed(value, "a tool call")
    return tuple(map(_call, cast(list[Any], found) if isinstance(found, list) else [found]))


def _call(item: Any) -> ToolCall:  # noqa: ANN401 - a cell of any type
    whole = as_object(parsed(item, "a tool call"), "a tool call")
    call = as_object(parsed(whole["function"], "a tool call"), "a tool call") if whole.get("function") else whole
    if not isinstance(call.get("name"), str):
        raise InputError(f"a tool call has the name {shortened(call.get('name'))}; text is needed")
    given = [key for key in ARGUMENTS if call.get(key) is not None]
    if len(given) > 1:
        raise InputError(f"a tool call has {' and '.join(given)}; keep one")
    fields = {**whole, **call}
    unknown = [key for key in fields if key not in CALL_KEYS and fields[key] is not None]
    if unknown and not any(key in call for key in ARGUMENTS):
        known = f"{', '.join(ARGUMENTS[:-1])} or {ARGUMENTS[-1]}"
        raise InputError(f"a tool call has {shortened(unknown[0])} and no {known}")
    value = parsed(call[given[0]] if given else None, "arguments of a tool call")
    arguments = as_object({} if value is None else value, "arguments of a tool call")
    call_id = None if whole.get("id") is None else as_text(whole["id"], "the id of a tool call")
    return ToolCall(call["name"], _json(arguments, "arguments of a tool call"), call_id or None)


def parsed(value: Any, name: str) -> Any:  # noqa: ANN401 - JSON holds any type
    """Return a value, also one that is written as JSON. Raise `InputError` for text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except InputError as error:
        raise InputError(f"{name} is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} contains {shortened(value)}, which is not JSON") from error


def _json(value: object, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} are {shortened(value)}, which JSON cannot represent") from error


def tools_of(row: Row) -> Tools:
    """Return the tools that the column `tools` of a row defines, in OpenAI's form; none where it defines none.

    The column is a list of objects, or JSON of one: functions in OpenAI's form, or alone, as in xLAM. Raise
    `InputError` for JSON that is malformed and for an object that is no definition.
    """
    return tool_definitions(row.get(TOOLS_COLUMN))


def tool_definitions(value: Any) -> Tools:  # noqa: ANN401 - a cell of any type
    """Return definitions of tools, also as JSON, in OpenAI's form; none for text and for a list of names."""
    if isinstance(value, str) and TOOLS_TEXT.match(value):
        value = parsed(value, "tools")
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list):
        return ()
    objects = [parsed(each, "a tool") if _is_object_text(each) else each for each in cast(list[Any], items)]
    if not objects or not all(isinstance(each, Mapping) for each in objects):
        return ()
    return tuple(_definition(cast("Mapping[str, Any]", each)) for each in objects)


def _is_object_text(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("{")


def _definition(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return one tool in OpenAI's form."""
    is_alone = not isinstance(tool.get("function"), Mapping)
    function: Mapping[str, Any] = tool if is_alone else tool["function"]
    if not isinstance(function.get("name"), str):
        raise InputError(f"a tool has the name {shortened(function.get('name'))}; text is needed")
    if not is_alone:
        return {"type": "function", **tool}
    parameters = function.get("parameters")
    if isinstance(parameters, Mapping) and _is_properties(cast("Mapping[str, Any]", parameters)):
        function = {**function, "parameters": {"type": "object", "properties": parameters}}
    return {"type": "function", "function": function}


def _is_properties(parameters: Mapping[str, Any]) -> bool:
    """Return whether parameters are given without the object of JSON Schema around them, as in xLAM."""
    return "properties" not in parameters and all(isinstance(each, Mapping) for each in parameters.values())
