"""Keep the rows of a source whose columns have certain values: the setting `where`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.readers.cells import shortened
from align.errors import InputError

Scalar = str | int | float | bool
Where = Mapping[str, Scalar | Sequence[Scalar]]  # column -> the value, or one of the values, that a row must have
MAX_SHOWN = 12  # values of a column in an error


class RowFilter:
    """Tell which rows have the wanted values, and remember the values that no row has had yet."""

    def __init__(self, where: Where) -> None:
        self._wanted = {name: _values(value) for name, value in where.items()}
        self._unmatched = {(name, place) for name, values in self._wanted.items() for place in range(len(values))}
        self._others: dict[str, dict[str, None]] = {name: {} for name in where}  # other values, in the order of rows

    @property
    def columns(self) -> set[str]:
        """Return the columns that are looked at."""
        return set(self._wanted)

    def excluding(self, row: Mapping[str, Any]) -> str | None:
        """Return the first column of the row with an unwanted value, or None. Columns that it lacks do not count.

        A number or a truth value is also found in its text, as CSV files have it.

        >>> RowFilter({"data_source": ["PRM800K", "ARB"]}).excluding({"data_source": "scibench"})
        'data_source'
        >>> RowFilter({"level": [3, 4]}).excluding({"level": "3"}) is None
        True
        """
        found = [name for name in self._wanted if name in row and not self._is_wanted(name, row[name])]
        return found[0] if found else None

    def check_known(self, columns: set[str]) -> None:
        """Raise `InputError` for a column that a row with these columns lacks."""
        unknown = sorted(self.columns - columns)
        if unknown:
            raise InputError(f"where names {unknown[0]!r}, and the row has {', '.join(sorted(columns))}")

    def check_found(self, path: str) -> None:
        """Raise `InputError` for a wanted value that no row of the whole source has had."""
        for name, place in sorted(self._unmatched):
            others = ", ".join([*self._others[name]][:MAX_SHOWN]) or "none"
            value = self._wanted[name][place]
            raise InputError(f"{path}: no row has {name} {value!r}, which where names; other values are: {others}")

    def _is_wanted(self, name: str, value: object) -> bool:
        for place, wanted in enumerate(self._wanted[name]):
            if _same(value, wanted):
                self._unmatched.discard((name, place))
                return True
        if len(self._others[name]) < MAX_SHOWN:
            self._others[name][shortened(value)] = None
        return False


def _values(value: Scalar | Sequence[Scalar]) -> Sequence[Scalar]:
    return [value] if isinstance(value, str | int | float) else value


def _same(value: object, wanted: Scalar) -> bool:
    if isinstance(value, str) and not isinstance(wanted, str):
        return value.casefold() == str(wanted).casefold()
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
