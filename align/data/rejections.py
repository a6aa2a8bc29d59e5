"""Rows that cannot be used: an error at the first one, or counts of the dropped ones by reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from align.errors import InputError, LimitExceeded, one_line
from align.records import at_place
from align.registry import pick

ON_ERROR = {"error": False, "skip": True}  # value of on_error -> whether rows are dropped
DROPPED = "dropped:"  # prefix of the counts of dropped rows, before the reason
MAX_REASONS = 20  # distinct reasons; a template can raise an error of its own for every row
MAX_REASON, MAX_WHOLE = 120, 200  # characters, without the row's own values and with them
OTHER = "other errors"


class Rejections:
    """Counts of a source's rows, and what becomes of a row with an error.

    >>> counts = Counter()
    >>> with Rejections("skip", counts).at("row 1"):
    ...     raise InputError("the row is empty: 'x' is missing")
    >>> dict(counts)
    {'dropped:the row is empty': 1}
    """

    def __init__(self, on_error: str = "error", counts: Counter[str] | None = None) -> None:
        self._skips = pick(ON_ERROR, on_error, "value of on_error")
        self.counts: Counter[str] = Counter() if counts is None else counts

    @contextmanager
    def at(self, place: str) -> Generator[None]:
        """Raise an `InputError` of this block with the place of its row, or leave the block and count the row."""
        try:
            with at_place(place):
                yield
        except InputError as error:
            if not self._skips or isinstance(error, LimitExceeded):
                raise
            count_reason(self.counts, error.message.removeprefix(f"{place}: "))


def count_reason(counts: Counter[str], message: str, *, prefix: str = DROPPED) -> None:
    """Add a dropped row to the counts, under its reason: the message without the row's own values."""
    count_limited(counts, re.split(r"[:;,]? ['\"{]", one_line(message))[0][:MAX_REASON], prefix=prefix)


def count_limited(counts: Counter[str], reason: str, *, prefix: str = "") -> None:
    """Add 1 to the count of a reason, cut to MAX_WHOLE characters; beyond MAX_REASONS reasons, to that of OTHER."""
    key = prefix + reason[:MAX_WHOLE]
    num_reasons = sum(name.startswith(prefix) for name in counts)
    counts[key if key in counts or num_reasons < MAX_REASONS else prefix + OTHER] += 1
