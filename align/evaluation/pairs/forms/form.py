"""What each form of files with judged pairs provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import InputError
from align.evaluation.pairs.table import JudgedGame, JudgedPair

Row = Mapping[str, Any]
VOID = "void"  # key for why a game is void, which other tools ignore; written where the form itself has no place for it


@dataclass(frozen=True, slots=True)
class Form:
    """A form of rows. `read` returns the games of a row, `write` the row of a pair.

    `write` raises `InputError` for a pair that the form cannot hold.
    """

    columns: frozenset[str]  # that identify it
    read: Callable[[Row], list[JudgedGame]]
    write: Callable[[JudgedPair], Row]

    def games(self, row: Row, place: str) -> list[JudgedGame]:
        """Return the games of a row; raise `InputError`, which begins with `place`, if it is not of this form."""
        if missing := sorted(self.columns - row.keys()):
            raise InputError(f"{place}: has no {missing[0]}; rows before it have {', '.join(sorted(self.columns))}")
        try:
            return self.read(row)
        except InputError as error:
            raise InputError(f"{place}: {error.message}") from error
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise InputError(f"{place}: is not in the form of its columns: {type(error).__name__} {error}") from error


def id_or_error(row: Row, name: str) -> str:
    """Return the id of a row; raise `InputError` if it is null."""
    if row[name] is None:
        raise InputError(f"has {name} null, which names no question")
    return str(row[name])


def text_or_error(row: Row, name: str) -> str:
    """Return a text of a row; raise `InputError` for anything else."""
    if not isinstance(row[name], str):
        raise InputError(f"has {name} {row[name]!r}, which is no text")
    return row[name]
