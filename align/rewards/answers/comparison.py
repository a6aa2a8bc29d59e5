"""Compare an answer with the known one: forms that a program can decide, then math-verify."""

from __future__ import annotations

import re
from collections.abc import Callable

from align.rewards.answers.extraction import MAX_LENGTH, strip_markup
from align.rewards.answers.formulas import UndecidedError, begin_comparison, same_formula
from align.rewards.answers.lists import parts_of, same_parts
from align.rewards.answers.moments import same_date, same_numeral, same_ratio, same_time
from align.rewards.answers.notation import plain, squeezed, tidy
from align.rewards.answers.quantities import parse_quantity, same_quantity

CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\((?P<inside>[A-J])\)|(?P<letter>[A-J])(?:\)|[.:](?=\s|$)|$))\s*"
    r"(?P<text>(?!.*\([A-J]\)).*)",
    re.IGNORECASE,
)
DECIDED = re.compile(r"(yes|no|true|false)(?:[,.;:]|\s-)(?:\s.*)?", re.IGNORECASE)
ABOUT = re.compile(
    r"^(?:about|approximately|approx\.?|around|roughly|exactly|circa|nearly|\\approx|~|=)\s*(?=\S)", re.I
)
REMARK = re.compile(r"(?<=\S)\s+\((?!\s*(?:in\s+)?(?:base|mod)\b)[^()]*[^()\d\s][^()]*\)$")
EQUATION = re.compile(r"(?P<left>[^=<>]*[A-Za-z)}\]][^=<>]*)=\s*(?:[^=<>]+=\s*)*(?P<right>[^=<>]+)")


def same_answer(given: str | float, expected: str | float) -> bool:
    """Return whether an answer is the expected one, however each is written; False where math-verify does not finish.

    A unit may be missing on one side; two units must be of the same kind, and are converted.

    >>> same_answer("$1,000", "1000.00"), same_answer("1/3", "0.333333"), same_answer("(B)", "C")
    (True, True, False)
    >>> same_answer("12 inches", "1 foot"), same_answer("$20", "€20"), same_answer("52_8", "52")
    (True, False, False)
    """
    texts = [strip_markup(str(each)) for each in (given, expected)]
    if max(map(len, texts)) > MAX_LENGTH:
        return texts[0] == texts[1]
    begin_comparison()
    try:
        return _same(*map(tidy, texts))
    except UndecidedError:
        return False


def _same(given: str, expected: str) -> bool:
    """Compare two tidy texts."""
    texts = [ABOUT.sub("", plain(each)).strip() for each in (given, expected)]
    if not all(texts):
        return False
    if squeezed(texts[0]) == squeezed(texts[1]):
        return True
    for compare in FORMS:
        verdict = compare(*texts)
        if verdict is not None:
            return verdict
    verdict = _same_equation(given, expected)
    return same_formula(given, expected) if verdict is None else verdict


def _same_choice(text: str, other: str) -> bool | None:
    """Compare letters of a choice; where one side has no letter, the texts behind it."""
    choices = CHOICE.fullmatch(text), CHOICE.fullmatch(other)
    if choices[0] and choices[1]:
        letters = [(each["inside"] or each["letter"]).upper() for each in choices if each]
        return letters[0] == letters[1]
    for choice, bare in zip(choices, (other, text), strict=True):
        if choice and choice["text"] and not CHOICE.fullmatch(choice["text"]):
            return _same(choice["text"], bare)
    return None


def _same_decision(text: str, other: str) -> bool | None:
    """Compare yes and no, of which one may be explained: `Yes, because …`."""
    bare = [DECIDED.sub(r"\1", each).casefold() for each in (text, other)]
    return bare[0] == bare[1] if set(bare) & {"yes", "no", "true", "false"} else None


def _same_list(text: str, other: str) -> bool | None:
    lists = parts_of(text), parts_of(other)
    if lists[0] and not lists[1]:
        lists = lists[0], parts_of(other, split_numbers=True)
    if lists[1] and not lists[0]:
        lists = parts_of(text, split_numbers=True), lists[1]
    if lists[0] and lists[1]:
        return same_parts(lists[0], lists[1], _same_item)
    found = lists[0] or lists[1]
    if found is None:
        return None
    if len(found.items) > 1:
        return None if found.brackets or _has_equation(text, other) else False
    return _same(found.items[0], other if lists[0] else text) if found.items and found.items[0] else None


def _same_item(item: str, other: str) -> bool:
    """Compare items of lists; `(a) 3` is a part of the answer there, not a choice."""
    parts = CHOICE.fullmatch(item), CHOICE.fullmatch(other)
    return _same(item, other) and (not (parts[0] and parts[1]) or _same_text(parts[0]["text"], parts[1]["text"]))


def _same_text(text: str, other: str) -> bool:
    return text == other or _same(text, other)


def _has_equation(*texts: str) -> bool:
    return any("=" in text or r"\in" in text for text in texts)


def _same_number(text: str, other: str) -> bool | None:
    quantities = parse_quantity(text), parse_quantity(other)
    if quantities[0] and quantities[1]:
        return same_quantity(quantities[0], quantities[1])
    return None


def _same_without_remark(text: str, other: str) -> bool | None:
    """Compare without a remark in parentheses, as in `12 (not 15)`."""
    bare = [REMARK.sub("", each) for each in (text, other)]
    return _same(bare[0], bare[1]) if bare != [text, other] and all(map(parse_quantity, bare)) else None


def _same_case(text: str, other: str) -> bool | None:
    return True if squeezed(text).casefold() == squeezed(other).casefold() else None


# Each returns None if it cannot decide
FORMS: tuple[Callable[[str, str], bool | None], ...] = (
    _same_choice,
    _same_decision,
    same_numeral,
    same_date,
    same_time,
    same_ratio,
    _same_number,
    _same_case,
    _same_without_remark,
    _same_list,
)


def _same_equation(given: str, expected: str) -> bool | None:
    """Compare what an unknown is equal to with the other text."""
    equations = EQUATION.fullmatch(given), EQUATION.fullmatch(expected)
    if equations[0] and equations[1]:
        left, other = (squeezed(plain(each["left"])) for each in equations if each)
        return _same(equations[0]["right"], equations[1]["right"]) if left.casefold() == other.casefold() else None
    for equation, bare in zip(equations, (expected, given), strict=True):
        if equation and not re.search(r"[=<>]|\\(?:le|ge|neq|in)(?![a-z])", bare):
            return _same(equation["right"].strip(), bare) or None
    return None
