"""Compare an answer with the known one: numbers, fractions, units, letters of a choice and words, or math-verify."""

from __future__ import annotations

import re

from align.rewards.answers.extraction import MAX_LENGTH, strip_markup
from align.rewards.answers.math_equality import equal_maths
from align.rewards.answers.quantities import parse_quantity, same_quantity

WORDS = re.compile(r"[^\W\d_][^\d_=<>+*^\\{}()\[\]|]{2,}")
CHOICE = re.compile(r"\(?(?P<letter>[A-J])(?:\)|[.:](?=\s|$)|$)", re.IGNORECASE)
LATEX = (  # pattern, replacement
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[,!;: ]|\{,\}|\\left\b|\\right\b"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]frac\b"), r"\\frac"),
)


def same_answer(given: str, expected: str) -> bool:
    """Return whether an answer is the expected one, however each is written; False where math-verify does not finish.

    >>> same_answer("$1,000", "1000.00"), same_answer("1/3", "0.333333"), same_answer("(B)", "C")
    (True, True, False)
    """
    maths = strip_markup(given), strip_markup(expected)
    given, expected = (_replace_latex(text) for text in maths)
    if not given or not expected:
        return False
    if _normalized(given) == _normalized(expected):
        return True
    if choice := CHOICE.fullmatch(expected):
        chosen = CHOICE.match(given)
        return chosen is not None and chosen["letter"].upper() == choice["letter"].upper()
    numbers = parse_quantity(given), parse_quantity(expected)
    if numbers[0] and numbers[1]:
        return same_quantity(numbers[0], numbers[1])
    if WORDS.fullmatch(given) and WORDS.fullmatch(expected):
        return False  # to math-verify, `listen` and `silent` are the same product of letters
    return max(map(len, maths)) <= MAX_LENGTH and equal_maths(*maths) is True


def _replace_latex(text: str) -> str:
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())
