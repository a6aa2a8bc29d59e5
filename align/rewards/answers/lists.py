"""Answers of several parts: lists, sets and tuples."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from align.rewards.answers.quantities import GROUPED

OPENING, CLOSING = "([{", ")]}"
GROUPED_NUMBER = re.compile(rf"[-+$€£¥₹]*(?:{GROUPED})(?:\.\d+)?")
JOINED = re.compile(r",?\s+(?:and|or)\s+|,?\s*\\(?:quad|qquad)?\s*(?:and|or)\s+", re.IGNORECASE)
LABEL = re.compile(r"(?P<name>[A-Za-z](?:_\{?\w\}?)?)\s*(?:=|\\in(?![A-Za-z]))\s*(?=\S)")
WORDED = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
MAX_BRACKETS = 40  # in one answer; each pair is a level of recursion at most
SET = r"\{", r"\}"


class Parts(NamedTuple):
    """The parts of an answer, and whether their order counts."""

    items: tuple[str, ...]
    ordered: bool
    brackets: str  # "()", "[]", "[)", "(]", "{}", or "" for a bare list


def parts_of(text: str, *, split_numbers: bool = False) -> Parts | None:
    r"""Return the parts of a list, set or tuple; None for an answer that is one thing.

    `split_numbers`: `1,200` may be two numbers.

    >>> parts_of(r"\{1, 2\}"), parts_of("2 and 3").items, parts_of("1,200"), parts_of(r"\pm 1").items
    (Parts(items=('1', '2'), ordered=False, brackets='{}'), ('2', '3'), None, ('+ 1', '- 1'))
    """
    if sum(map(text.count, OPENING)) > MAX_BRACKETS:
        return None
    inner, brackets = _without_brackets(text)
    if r"\pm" in inner and inner.count(r"\pm") == 1 and not brackets and "," not in inner:
        return Parts(tuple(inner.replace(r"\pm", sign).strip() for sign in "+-"), False, "")
    items = _split(inner, split_numbers=split_numbers or (bool(brackets) and ", " not in inner))
    if brackets == "{}" or (len(items) > 1 and all(items)):
        joined = JOINED.search(inner) is not None
        ordered = brackets not in ("", "{}") or (not brackets and not joined and any(map(WORDED.search, items)))
        return Parts(tuple(items), ordered, brackets)
    return None


def _without_brackets(text: str) -> tuple[str, str]:
    r"""Return what is inside the brackets around a text, and the brackets."""
    if text.startswith(SET[0]) and text.endswith(SET[1]) and text.count(SET[0]) == 1:
        return text[2:-2].strip(), "{}"
    if len(text) > 1 and text[0] in OPENING and text[-1] in CLOSING and _closes_at_end(text):
        return text[1:-1].strip(), text[0] + text[-1]
    return text, ""


def _closes_at_end(text: str) -> bool:
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in OPENING) - (letter in CLOSING)
        if depth == 0 and index < len(text) - 1:
            return False
    return depth == 0


def _split(text: str, *, split_numbers: bool) -> list[str]:
    """Return the parts between separators that are in no brackets; a number's own commas do not separate."""
    if not split_numbers and GROUPED_NUMBER.fullmatch(text):
        return [text]
    depth = 0
    start = 0
    found = list[str]()
    index = 0
    spaced = re.search(r"\d,\d{3}(?!\d)", text) is not None and ", " in text
    while index < len(text):
        letter = text[index]
        depth += (letter in OPENING) - (letter in CLOSING)
        joined = JOINED.match(text, index) if depth == 0 else None
        in_number = spaced and text[index + 1 : index + 2].isdigit()
        if joined or (depth == 0 and (letter == ";" or (letter == "," and not in_number))):
            end = joined.end() if joined else index + 1
            found.append(text[start:index].strip())
            start = index = end
        else:
            index += 1
    return [*found, text[start:].strip()]


def same_parts(given: Parts, expected: Parts, same: Callable[[str, str], bool]) -> bool | None:
    """Compare part by part, in order where it counts; None if a bare list meets an interval."""
    if {given.brackets, expected.brackets} in ({"", "[]"}, {"", "[)"}, {"", "(]"}):
        return None
    if given.brackets and expected.brackets and given.brackets != expected.brackets:
        return False
    if len(given.items) != len(expected.items):
        return False
    items, others = _with_labels(given.items, expected.items)
    if given.ordered or expected.ordered:
        return all(map(same, items, others))
    return _matched(items, list(others), same)


def _matched(items: Sequence[str], others: list[str], same: Callable[[str, str], bool]) -> bool:
    """Return whether each item has a partner of its own, the first one that is equal to it."""
    for item in items:
        partner = next((index for index, other in enumerate(others) if same(item, other)), None)
        if partner is None:
            return False
        others.pop(partner)
    return True


def _with_labels(items: Sequence[str], others: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the items of both lists: without `x =` where it names nothing but the unknown."""
    labels = [{match["name"] for item in part if (match := LABEL.match(item))} for part in (items, others)]
    if max(map(len, labels)) <= 1 or not all(labels):
        return [LABEL.sub("", each, count=1) for each in items], [LABEL.sub("", each, count=1) for each in others]
    return items, others
