"""Retries of a request with exponential backoff."""

from __future__ import annotations

import email.utils
import math
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from align.errors import RunError, one_line

FIRST_WAIT_S = 0.5  # before the first retry; each further wait is twice as long
MAX_WAIT_S = 60.0
MAX_RETRY_AFTER_S = 300.0  # if the server asks for a wait

T = TypeVar("T")


class TransientError(Exception):
    """A failure that a retry may resolve."""

    def __init__(self, message: str, retry_after_s: float | None = None, *, is_overload: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # wait requested by the server
        self.is_overload = is_overload  # whether the server has too many requests


def call_with_retries(request: Callable[[], T], *, retries: int, url: str, stopped: threading.Event) -> T:
    """Return the result of `request`, called again after each `TransientError`, up to `retries` times.

    Raises `RunError` after the last failure, or once `stopped` is set.
    """
    tries = 0
    while True:
        tries += 1
        try:
            return request()
        except TransientError as error:
            if tries > retries or stopped.wait(_wait_s(tries, error.retry_after_s)):
                raise RunError(
                    f"{url}: a request failed {tries} times, last with: {one_line(error)}; finished samples are kept, "
                    "rerun the same command to resume"
                ) from error


def parse_retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date; None if it is absent or invalid.

    >>> parse_retry_after("2.5")
    2.5
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        pass
    else:
        return None if math.isnan(seconds) else max(0.0, seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None


def _wait_s(tries: int, retry_after_s: float | None) -> float:
    """Return the wait after so many tries, with random jitter so that clients do not retry at the same time."""
    if retry_after_s:  # after 0 seconds the wait still grows
        return min(MAX_RETRY_AFTER_S, retry_after_s)
    return min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.5, 1)
