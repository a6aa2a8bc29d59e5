"""Compare formulas by math-verify, and texts with words piece by piece."""

from __future__ import annotations

import math
import re
from contextvars import ContextVar
from fractions import Fraction

from align.rewards.answers.math_equality import equal_maths
from align.rewards.answers.notation import plain
from align.rewards.answers.number_words import with_digits
from align.rewards.answers.quantities import NO_UNIT
from align.rewards.answers.units import Unit, parse_unit, same_kind

COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]*\}|\\[A-Za-z]+")
RUN = re.compile(r"[^\W\d_]{2,}")
ISOLATED = re.compile(r"(?<![^\W_])[^\W\d_]{2,}(?![^\W_])")  # not as in `2ab`
OPERATOR = re.compile(r"[+*/=<>^_(){}\[\]|\\!-]")
PIECE = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\s\w]")
SHORT_WORD = re.compile(
    "no|on|is|it|to|of|or|in|at|am|pm|by|if|as|an|so|do|go|up|us|we|he|me|my|be|ad|ox", re.IGNORECASE
)
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)")
FACTORIAL = re.compile(r"(?<![\d.])(\d{1,2})!(?!!)")
GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d])")
SPLIT_NUMBER = re.compile(r"(?<![\d_^.])\d+\s+\d+(?![\d/])")
RELATION = re.compile(r"[<>]|\\(?:le|ge)(?![A-Za-z])")
MOLECULE = re.compile(r"(?=.*\d)(?:[A-Z][a-z]?\d*){2,}")
IGNORED = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])|[.,](?!\d)|[;:'\"!?]|\b(?:an?|the)\b")
IN_TEXT = re.compile(
    r"(?P<value>.*\S)\s*\\(?:text|mathrm|mbox|textrm|rm)\s*\{\s*(?P<unit>[^{}]*)\}\s*(?P<power>\^\s*\{?-?\d\}?)?\.?"
)
BARE_UNIT = re.compile(r"(?P<value>.*(?:[}\d)]|\\[A-Za-z]+))\s*(?P<unit>[A-Za-z]{2}.*)")

MAX_CALLS = 16  # of math-verify in one comparison: a list has many pairs of parts, and each may take it seconds
CALLS: ContextVar[int] = ContextVar("calls", default=0)


class UndecidedError(Exception):
    """math-verify has not finished in time."""


def begin_comparison() -> None:
    """Allow `MAX_CALLS` calls of math-verify from here on."""
    CALLS.set(0)


def same_formula(given: str, expected: str) -> bool:
    """Compare texts and their units: piece by piece where there are words, else by math-verify.

    Neither handles the other's inputs: math-verify ignores units, and takes words for products of their letters.
    """
    (value, unit), (other, other_unit) = _split_unit(given), _split_unit(expected)
    if unit and other_unit and not (same_kind(unit, other_unit) and unit.factor == other_unit.factor):
        return False
    texts = [plain(each) for each in (value, other)]
    if any(map(_has_words, texts)) or all(map(MOLECULE.fullmatch, texts)):
        pieces = [PIECE.findall(IGNORED.sub(" ", with_digits(each).casefold())) for each in texts]
        return len(pieces[0]) == len(pieces[1]) and all(map(_same_piece, *pieces))
    return _same_maths(*map(_for_maths, texts))


def _same_piece(piece: str, other: str) -> bool:
    return piece == other or (piece[0].isdigit() and other[0].isdigit() and Fraction(piece) == Fraction(other))


def _has_words(text: str) -> bool:
    """Return whether a text has words: runs of letters that are not commands or products of variables."""
    bare = COMMAND.sub(" ", text)
    if not OPERATOR.search(text) and any(set(run) - set("xyz") for run in ISOLATED.findall(bare)):
        return True
    return any(not _may_be_product(run) for run in RUN.findall(bare))


def _may_be_product(run: str) -> bool:
    if len(run) == 2:  # noqa: PLR2004
        return SHORT_WORD.fullmatch(run) is None
    ascending = all(first < second for first, second in zip(run, run[1:], strict=False))
    return ascending or not set(run.lower()) & set("aeiou")


def _same_maths(given: str, expected: str) -> bool:
    if any(map(SPLIT_NUMBER.search, (given, expected))):
        return False  # math-verify reads `20 00` as 2000
    pairs = [(given, expected)]
    if bool(RELATION.search(given)) != bool(RELATION.search(expected)):
        pairs.append((expected, given))  # math-verify reads `x > 3` as an interval on one side only
    return any(_verified(*pair) for pair in pairs)


def _verified(given: str, expected: str) -> bool:
    CALLS.set(CALLS.get() + 1)
    if CALLS.get() > MAX_CALLS or (verdict := equal_maths(given, expected)) is None:
        raise UndecidedError
    return verdict


def _split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Return a formula and the unit behind it, as in `12\pi\text{ cm}^2`."""
    for pattern in (IN_TEXT, BARE_UNIT):
        if match := pattern.fullmatch(text):
            unit = parse_unit(match["unit"] + (match.groupdict().get("power") or ""))
            if unit and unit != NO_UNIT and (pattern is IN_TEXT or (unit.dimensions and not unit.words)):
                return match["value"].rstrip("~ "), unit
    return text, None


def _for_maths(text: str) -> str:
    text = GROUPS.sub(lambda match: match[0].replace(" ", ""), text)
    text = FACTORIAL.sub(lambda match: str(math.factorial(int(match[1]))), text)
    degree = r"\\cdot\\frac{\\pi}{180}" if TRIGONOMETRY.search(text) else ""
    return re.sub(r"(\d+)\s*°", rf"{{(\1{degree})}}" if degree else r"\1", text).replace("°", "")
