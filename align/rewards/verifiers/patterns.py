"""Search for regular expressions that rows contain, in limited time.

A pattern that can backtrack over many paths is searched by the package `regex`, which has a time limit and the same
syntax and meaning; any other by `re`, as in the published IFEval checker.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import regex

from align.errors import InputError

MAX_PATTERN = 1000  # characters
SEARCH_S = 2.0  # for one pattern in one response
BACKTRACKS = re.compile(r"[*+?{|(]")


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
    try:
        return limited(whole, text, flags=int(flags), timeout=SEARCH_S)
    except TimeoutError as error:
        raise SlowPatternError(
            f"the pattern {pattern[:60]!r} takes more than {SEARCH_S:.0f} s on a response; simplify it"
        ) from error
