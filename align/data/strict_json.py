"""Strict JSON: no duplicate keys, NaN, Infinity or unpaired surrogates, on which parsers disagree."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from align.errors import InputError

SPACE = re.compile(r"[ \t\n\r]*")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair, or unpaired
OF_TOOLS = ("tools", "tool_calls", "function_call")  # columns and fields with objects of any form
UNPAIRED = re.compile("[\ud800-\udfff]")  # in a parsed text, pairs are characters


class _NotFiniteError(Exception):
    """JSON contains NaN or Infinity."""


def parse_json(text: str) -> Any:  # noqa: ANN401 - JSON holds any type
    r"""Return the value. Raise `InputError` for JSON that is valid or nearly so and ambiguous.

    Raise `json.JSONDecodeError` for other malformed text, and `ValueError` or `RecursionError` for too long numbers
    and too deep nesting.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    align.errors.InputError: the key 'a' occurs twice in one object
    """
    value, end = parse_json_at(text, skip_space(text, 0))
    if (rest := skip_space(text, end)) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)
    return value


def parse_json_at(text: str, place: int) -> tuple[Any, int]:
    """Return the value that starts at `place`, and where it ends; raise as `parse_json` does."""
    try:
        value, end = STRICT.raw_decode(text, place)
    except _NotFiniteError:
        leaves = _leaves(json.JSONDecoder().raw_decode(text, place)[0])
        where, number = next(each for each in leaves if isinstance(each[1], float) and not math.isfinite(each[1]))
        raise InputError(
            f"{where or 'the value'} is {number}, which is not valid JSON; use null for a missing value"
        ) from None
    if SURROGATE_ESCAPE.search(text, place, end):
        _check_surrogates(value)
    return value, end


def skip_space(text: str, place: int) -> int:
    """Return the place of the first character from `place` on that is not JSON's white space."""
    match = SPACE.match(text, place)
    return match.end() if match else place


def _check_surrogates(value: Any) -> None:  # noqa: ANN401 - JSON holds any type
    for where, leaf in _leaves(value):
        if isinstance(leaf, str) and (found := UNPAIRED.search(leaf)):
            raise InputError(
                f"{where or 'the text'} contains {found[0]!r}, an unpaired surrogate; write the whole character or "
                "remove it"
            )


def from_columns(value: Any, *, of_tools: bool = False) -> Any:  # noqa: ANN401 - a row or a cell of any type
    """Return a row of a column file with None for NaN, which is how pandas writes a missing number.

    Objects inside tools and tool calls lose their null fields: in a column, every object has the fields of all rows.

    >>> from_columns({"score": math.nan, "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}]})
    {'score': None, 'tool_calls': [{'name': 'f', 'arguments': {'x': 1}}]}
    """
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        fields = {name: from_columns(each, of_tools=of_tools or name in OF_TOOLS) for name, each in value.items()}
        return {name: each for name, each in fields.items() if each is not None} if of_tools else fields
    return [from_columns(each, of_tools=of_tools) for each in value] if isinstance(value, list) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the key {repeated!r} occurs twice in one object")
    return fields


def _constant(name: str) -> NoReturn:
    raise _NotFiniteError(name)


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - JSON holds any type
    """Yield every key and every value that is no object or list, with its place."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield "a key", name
            yield from _leaves(each, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{where}.{number}".lstrip("."))
    else:
        yield where, value


STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
