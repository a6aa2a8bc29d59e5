"""Search for regular expressions that rows contain, in limited time.

A pattern that can backtrack over many paths is searched by the package `regex`, which has a time limit and the same
syntax and meaning; any other by `re`, as in the published IFEval checker.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import regex

from align.errors import InputError

MAX_PATTERN = 1000  # characters
# Of all patterns of a row in one response. `regex` counts the CPU time of the process, so on a busy machine a search
# lasts longer by the clock. Of 3,045 random patterns on texts of 3,000 to 200,000 characters none exceeded its limit by
# more than 0.05 s (regex 2026.11.19, an EPYC).
SEARCH_S = 2.0
BACKTRACKS = re.compile(r"[*+?{|(]")

_ends_s: ContextVar[float | None] = ContextVar("_ends_s", default=None)  # process time at which a budget is used up


class SlowPatternError(InputError):
    """A pattern of a row takes too long on a response."""


def valid_pattern(pattern: str) -> str:
    """Return the pattern; raise `ValueError` where it is not a regular expression, or is too long to be searched."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern has at most {MAX_PATTERN} characters, not {len(pattern)}")
    try:
        re.compile(pattern.strip())
        regex.compile(pattern.strip())
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a valid regular expression ({error}); escape special characters") from error
    return pattern


@contextmanager
def shared_limit() -> Generator[None]:
    """Give all searches within the block `SEARCH_S` together instead of `SEARCH_S` each."""
    token = _ends_s.set(time.process_time() + SEARCH_S)
    try:
        yield
    finally:
        _ends_s.reset(token)


def is_found(
    pattern: str, text: str, *, around: tuple[str, str] = ("", ""), flags: re.RegexFlag = re.IGNORECASE
) -> bool:
    """Return whether a row's pattern, between the two parts of `around`, occurs in the text."""
    return _in_time("search", pattern, text, around, flags) is not None


def count_found(pattern: str, text: str) -> int:
    """Return how often a row's pattern occurs in the text, in any case."""
    return len(_in_time("findall", pattern, text, ("", ""), re.IGNORECASE))


def split(pattern: str, text: str, *, around: tuple[str, str]) -> list[str]:
    """Return the parts of a text between a row's pattern and, as in `re.split`, its groups."""
    return _in_time("split", pattern, text, around, re.RegexFlag(0))


def _in_time(method: str, pattern: str, text: str, around: tuple[str, str], flags: re.RegexFlag) -> Any:  # noqa: ANN401
    """Return what this function of `re` returns; raise `SlowPatternError` where it does not end in time."""
    whole = f"{around[0]}{pattern}{around[1]}"
    if not BACKTRACKS.search(pattern):
        plain: Callable[..., Any] = getattr(re, method)
        return plain(whole, text, flags=flags)
    limited: Callable[..., Any] = getattr(regex, method)
    ends_s = _ends_s.get()
    left_s = SEARCH_S if ends_s is None else max(0.0, ends_s - time.process_time())
    try:
        return limited(whole, text, flags=int(flags), timeout=left_s)
    except TimeoutError as error:
        raise SlowPatternError(
            f"the row's patterns take more than {SEARCH_S:g} s on a response, up to {pattern[:60]!r}; simplify them"
        ) from error
