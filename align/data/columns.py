"""Columns with other names than a format's, and values nested in columns."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from align.errors import InputError, one_line

Row = Mapping[str, Any]
Keys = tuple[str | int, ...]  # from a row to a value in it: columns and keys of objects, and indices of lists

INDEX = re.compile(r"-?\d{1,9}")
MAX_COLUMNS_SHOWN = 12  # in an error
MAX_COLUMN_NAME = 40  # characters of a column's name in an error


class Renamed(NamedTuple):
    """A row with the names of the format, and what these have replaced."""

    row: dict[str, Any]
    replaced: dict[str, Any]  # columns of the same names, and what is left of columns with a nested value


def renamed(row: Row, columns: Mapping[str, str]) -> Renamed:
    """Return the row with columns renamed: new name -> column of the file or dotted path, where the row has it.

    >>> renamed({"chat": [{"text": "Hi", "id": 1}], "good": "Yes"}, {"prompt": "chat.0.text", "chosen": "good"})
    Renamed(row={'prompt': 'Hi', 'chosen': 'Yes'}, replaced={'chat': [{'id': 1}]})
    """
    found = {name: _found(row, column) for name, column in columns.items()}
    read = {name: value for name, value in found.items() if isinstance(value, _Found)}
    others = cast("dict[str, Any]", _without(row, [each.keys for each in read.values()]))
    nested = {column.partition(".")[0] for column in columns.values() if column not in row}
    replaced = {name: others.pop(name) for name in [*others] if name in columns or name in nested}
    return Renamed({**others, **{name: each.value for name, each in read.items()}}, replaced)


def missing_column(row: Row, columns: Mapping[str, str], names: Iterable[str]) -> InputError | None:
    """Return the error for the first of the names whose column the row lacks; None if it has them all."""
    for name in names:
        if isinstance(lack := _found(row, columns[name]), str):
            return InputError(f"columns.{name} names {columns[name]!r}, and {lack}")
    return None


class _Found(NamedTuple):
    """A value in a row, and where it is."""

    keys: Keys
    value: Any


def _found(row: Row, column: str) -> _Found | str:
    """Return the value of a column, or of a dotted path in columns; where there is none, what there is instead."""
    keys = list[str | int]()
    value = cast("Any", row)
    for part in [column] if column in row else column.split("."):
        key = _key(value, part)
        if key is None:
            return _description(value, keys)
        keys.append(key)
        value = value[key]
    return _Found(tuple(keys), value)


def _key(value: Any, part: str) -> str | int | None:  # noqa: ANN401 - any JSON type
    """Return the key of an object, or the index of a list, that a part of a path names; None if there is none."""
    if isinstance(value, Mapping):
        return part if part in value else None
    if not isinstance(value, list) or not INDEX.fullmatch(part):
        return None
    length = len(cast("list[Any]", value))
    return int(part) % length if -length <= int(part) < length else None


def _description(value: Any, keys: Sequence[str | int]) -> str:  # noqa: ANN401 - any JSON type
    """Return what a value in a row has, for an error."""
    at = ".".join(map(str, keys))
    if not keys:
        return f"the row has {describe_columns(value)}"
    if isinstance(value, Mapping):
        return f"{at!r} has the keys {_names(value)}"
    if isinstance(value, list):
        return f"{at!r} is a list of {len(value)}"
    return f"{at!r} is of type {type(value).__name__}"


def _without(value: Any, paths: Collection[Keys]) -> Any:  # noqa: ANN401 - any JSON type
    """Return an object or a list without the values at these paths, and without what is then empty."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    kept = dict[Any, Any]()
    for key, inner in items:
        below = [path[1:] for path in paths if path[0] == key]
        rest = _without(inner, below) if below and () not in below else inner
        if not below or (() not in below and rest):
            kept[key] = rest
    return kept if isinstance(value, Mapping) else [*kept.values()]


def describe_columns(row: Row) -> str:
    """Return the names of a row's columns, for an error."""
    return f"the columns {_names(row)}" if row else "no columns"


def _names(keys: Iterable[str]) -> str:
    names = [
        name if len(name) <= MAX_COLUMN_NAME else f"{name[: MAX_COLUMN_NAME - 3]}..." for name in map(one_line, keys)
    ]
    more = len(names) - MAX_COLUMNS_SHOWN
    return ", ".join(names[:MAX_COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "")
