"""Detection of a row's format by its columns."""

from __future__ import annotations

from difflib import SequenceMatcher
from itertools import islice

from align.data.columns import Row, describe_columns
from align.data.readers.reader import Reader
from align.data.readers.table import READERS
from align.errors import InputError
from align.records import Located

MAX_COLUMNS_COMPARED = 100
NUM_NEAREST = 3
SIMILAR = 0.6  # ratio of matching characters; names that are less similar have nothing in common
COMMON = ("preference", "messages", "prompt_completion")  # suggested where no format is near


def detect_format(first: Located[Row]) -> str:
    """Return the name of the first format whose columns the row has. Raise `InputError` if no format matches."""
    row = first.record
    for name, reader in READERS.items():
        if reader.matches(row) and (reader.detects is None or reader.detects(row)):
            return name
    nearest = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in nearest_formats(row).items())
    raise InputError(
        f"{first.place}: no format matches {describe_columns(row)}; the nearest formats need {nearest}; "
        "map your columns to theirs with `columns: {prompt: YOUR_COLUMN}`"
    )


def nearest_formats(row: Row) -> dict[str, tuple[str, ...]]:
    """Return the formats whose columns are the most similar to the row's, nearest first, with these columns."""
    present = [str(name).lower() for name in islice(row, MAX_COLUMNS_COMPARED)]
    scores: list[tuple[float, int, str, tuple[str, ...]]] = []
    for name, reader in READERS.items():
        if reader.detects is not None:  # its columns alone do not make a format
            continue
        scored = [(_nearness(columns, present), columns) for columns in reader.alternatives]
        nearness, columns = max(scored, key=lambda each: each[0])
        order = COMMON.index(name) if name in COMMON else len(COMMON)
        scores.append((-nearness, order, name, columns))
    return {name: columns for _, _, name, columns in sorted(scores)[:NUM_NEAREST]}


def _nearness(columns: tuple[str, ...], present: list[str]) -> float:
    """Return how similar a format's columns are to those of a row, from 0 to 1."""
    return sum(max((_similarity(name, other) for other in present), default=0.0) for name in columns) / len(columns)


def _similarity(name: str, other: str) -> float:
    ratio = SequenceMatcher(None, name, other).ratio()
    return ratio if ratio >= SIMILAR else 0.0


def mismatch(name: str, reader: Reader, row: Row) -> InputError:
    """Return the error for a row that lacks the columns of a format."""
    return InputError(f"{name} needs {reader.describe()}, and the row has {describe_columns(row)}")
