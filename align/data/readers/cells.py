"""Values of a row's columns as text, numbers, lists and objects. Raise `InputError` for a value of another type."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from align.data.columns import Row
from align.errors import InputError, one_line

MISSING = (None, "", "N/A")  # how datasets write a number that is missing
MAX_SHOWN = 60  # characters of a value in an error
MAX_NESTING = 3  # how often a list may be quoted: a Python literal may have been written as a JSON string
MAX_LITERAL = 1 << 20  # characters of a Python literal; parsing takes hundreds of times as many bytes of memory
FINISH_KEYS = ("finish", "finish_reason")
RATING_KEYS = ("score", "Rating")  # keys of the number in an object that has a rating and its rationale


def shortened(value: object) -> str:
    """Return `value` on one line, cut to the length that an error can show."""
    text = one_line(repr(value))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def as_text(content: Any, name: str) -> str:  # noqa: ANN401 - text, or parts of text
    """Return a string, or the joined text parts of a list as chat APIs write it.

    >>> as_text([{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}], "content")
    'Hello, world'
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{name} is {shortened(content)}; text is needed")
    parts = cast(list[Any], content)
    others = [part for part in parts if not isinstance(part, Mapping) or part.get("type") != "text"]
    if others:
        raise InputError(f"{name} has a part that is not text: {shortened(others[0])}")
    return "".join(as_text(part.get("text", part.get("value")), name) for part in parts)


def as_list(value: Any, name: str) -> list[Any]:  # noqa: ANN401 - a cell of any type
    """Return a list, also one that is written as JSON or as a Python literal: a CSV file contains nothing but text."""
    for _ in range(MAX_NESTING):
        if not isinstance(value, str):
            break
        value = _unquoted(value, name)
    if not isinstance(value, list):
        raise InputError(f"{name} is {shortened(value)}; a list is needed")
    return cast(list[Any], value)


def _unquoted(text: str, name: str) -> Any:  # noqa: ANN401 - any literal
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if len(text) > MAX_LITERAL:
            raise InputError(
                f"{name} has {len(text):,} characters and is not JSON; a Python literal may have {MAX_LITERAL:,}"
            ) from None
        with_commas = re.sub(r"\}\s*\n\s*\{", "}, {", text)  # NumPy prints the items of an array without commas
    try:
        return ast.literal_eval(with_commas)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(f"{name} is {shortened(text)}; a list is needed, as JSON or as a Python literal") from error


def as_object(value: Any, name: str) -> Row:  # noqa: ANN401 - a cell of any type
    """Return an object with named fields."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {shortened(value)}; an object with named fields is needed")
    return cast(Row, value)


def as_number(value: Any, name: str) -> float | None:  # noqa: ANN401 - a cell of any type
    """Return a finite number, also one that is written as text, or None for a missing one."""
    if value in MISSING:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} is {shortened(value)}; a number is needed") from error
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}; a finite number is needed; omit a missing one")
    return number


def as_finish(item: Mapping[str, Any]) -> str | None:
    """Return the finish reason of a response, or None if it has none."""
    value = next((item[key] for key in FINISH_KEYS if item.get(key) is not None), None)
    return None if value is None else as_text(value, "finish")


def as_ratings(values: Any) -> dict[str, float]:  # noqa: ANN401 - a cell of any type
    """Return the rated attributes. A rating is a number, or an object with the number and its rationale."""
    ratings: dict[str, float] = {}
    for name, value in as_object(values, "a set of ratings").items():
        rating = value
        if isinstance(value, Mapping):
            key = next((key for key in RATING_KEYS if key in value), None)
            if key is None:
                keys = " or a ".join(RATING_KEYS)
                raise InputError(f"{name} is {shortened(value)}; a number is needed, or an object with a {keys}")
            rating = value[key]
        number = as_number(rating, name)
        if number is not None:
            ratings[name] = number
    return ratings


def metadata_of(row: Row, used: Iterable[str]) -> dict[str, Any]:
    """Return the columns that are not used; the content of a `metadata` column is merged into them."""
    inner = row.get("metadata")
    taken = {*used, "metadata"} if isinstance(inner, Mapping) else {*used}
    outer = {name: value for name, value in row.items() if name not in taken}
    return {**outer, **cast(Row, inner)} if isinstance(inner, Mapping) else outer
