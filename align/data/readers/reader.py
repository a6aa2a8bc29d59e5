"""The interface of a row format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from align.data.columns import Row
from align.records import Located, Record


@dataclass(frozen=True, slots=True)
class Reader:
    """How rows of one format become records.

    `read` returns the records of a row; it raises `InputError` for a row it cannot read. A reader of your own is an
    object of this class, named in a recipe as `module:name`.
    """

    # Alternatives: the columns that a row needs, separated by spaces; a tuple where a column's name has a space
    columns: tuple[str | tuple[str, ...], ...]
    read: Callable[[Row], Iterator[Record]]
    join: Callable[[Iterable[Located[Row]]], Iterator[Located[Row]]] | None = None  # joins rows before they are read
    merge: bool = False  # whether consecutive rows of one prompt become one comparison
    keeps: frozenset[str] = frozenset()  # columns that are used although they are kept in the metadata
    detects: Callable[[Row], bool] | None = None  # whether a row with the columns is of this format, by its values
    unread: Callable[[Row], Collection[str]] | None = None  # columns and fields inside columns that are not read

    @property
    def alternatives(self) -> list[tuple[str, ...]]:
        """The lists of columns, one of which a row needs."""
        return [tuple(columns.split()) if isinstance(columns, str) else columns for columns in self.columns]

    def matches(self, row: Row) -> bool:
        """Return whether the row has the columns that this format needs."""
        return any(set(columns) <= row.keys() for columns in self.alternatives)

    def found_columns(self, row: Row) -> tuple[str, ...]:
        """Return the columns of the row by which it matches; none if it does not."""
        return next((columns for columns in self.alternatives if set(columns) <= row.keys()), ())

    def describe(self) -> str:
        """Return the columns that this format needs, for an error."""
        return ", or ".join(" and ".join(columns) for columns in self.alternatives)
