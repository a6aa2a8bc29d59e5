r"""Final answers: found in a response, and compared with the known one.

A response states its answer as GSM8K does (`#### 42`), in `\boxed{...}`, in words ("the answer is 42"), or else ends
with it. Numbers, fractions, units, letters of a choice and words are compared here; all else is maths for math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from align.rewards.math_equality import equal_maths

LONGEST = 1000  # letters of an answer that is still read as maths
DECIMALS = 6  # numbers that are not whole agree to this many, as in math-verify: 0.333333 is a third

MARKER = re.compile(r"####[ \t]*(?P<said>\S.*)(?P<rest>\s*)")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
STATED = re.compile(
    r"\banswer\**\s*(?:is|are|=|:)\**:?\s*\**(?:(?:about|approximately|roughly)\s)?(?=\S)", re.IGNORECASE
)
AFTERTHOUGHT = re.compile(r"\n.*|(?<=\S)[.!](?:\s.*)?$|\*\*.*|\s(?:because|since|which|so that)\b.*", re.DOTALL)
FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$\n]+)\$(?!\w|\.\d)|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]",
    re.DOTALL,
)
NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−])?[$€£¥₹]?(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?(?![\d])%?|(?<![\w.,])\.\d+%?"
)
MOST_WORDS = 5  # of an answer without a number: "the answer is the red one"
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")

WORDS = re.compile(r"[^\W\d_][^\d_=<>+*^\\{}()\[\]|]{2,}")
CHOICE = re.compile(r"\(?(?P<letter>[A-J])(?:\)|[.:](?=\s|$)|$)", re.IGNORECASE)
QUANTITY = re.compile(
    r"""(?:USD|US|EUR|GBP)?\s*[$€£¥₹]?\s*(?P<sign>[-+−]?)\s*[$€£¥₹]?\s*
    (?:(?:(?P<mixed>\d{1,40})\s+)?(?P<top>\d{1,40})\s*/\s*(?P<bottom>\d{1,40})
      |(?P<whole>\d{1,3}(?:,\d{3})+|\d{1,40})?(?P<part>\.\d{1,40})?)
    \s*(?P<percent>%|percent\b)?(?P<unit>[^\d=<>+*^_\\{}()\[\],;|]*)""",
    re.VERBOSE | re.IGNORECASE,
)
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
LETTER_UNITS = {"g", "h", "l", "m", "s"}
NO_UNITS = {"and", "arccos", "arcsin", "arctan", "cos", "exp", "ln", "log", "mod", "or", "pi", "sin", "sqrt", "tan"}
MARKUP = (
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[,!;: ]|\{,\}|\\left\b|\\right\b"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]frac\b"), r"\\frac"),
)


def final_answer(text: str) -> str | None:
    """What a response gives as its answer, as it is written there; None where it gives none."""
    answer = _marked(text) or _last_boxed(text) or _stated(text)
    if answer:
        return answer
    if "\n" not in text.strip() and len(WORD.findall(text)) <= 1:
        return _bare(text) or None
    return _last_value(text)


def same_answer(given: str, expected: str) -> bool:
    """Whether a given answer is the expected one, however each is written. What cannot be decided in time is not."""
    maths = _bare(given), _bare(expected)
    given, expected = (_plain(text) for text in maths)
    if not given or not expected:
        return False
    if _folded(given) == _folded(expected):
        return True
    if choice := CHOICE.fullmatch(expected):
        picked = CHOICE.match(given)
        return picked is not None and picked["letter"].upper() == choice["letter"].upper()
    numbers = _quantity(given), _quantity(expected)
    if numbers[0] and numbers[1]:
        return _same_quantity(numbers[0], numbers[1])
    if WORDS.fullmatch(given) and WORDS.fullmatch(expected):
        return False  # as maths, `listen` is the product of its letters, and so is `silent`
    return max(map(len, maths)) <= LONGEST and equal_maths(*maths) is True


def _marked(text: str) -> str | None:
    """What follows `####`: a number alone, or the end of the text. Other such lines are headings."""
    for match in reversed(list(MARKER.finditer(text))):
        number = _quantity(_bare(match["said"]))
        if match.end() == len(text) or (number and not number.unit):
            return _bare(match["said"])
    return None


def _stated(text: str) -> str | None:
    """What is last said to be the answer, if it is short or has a number."""
    for match in reversed(list(STATED.finditer(text))):
        rest = text[match.end() : match.end() + LONGEST]
        formula = FORMULA.match(rest)
        said = _bare(_inside(formula) if formula else AFTERTHOUGHT.sub("", rest))
        if said and (re.search(r"[\d\\]", said) or len(said.split()) <= MOST_WORDS):
            return said
    return None


def _last_boxed(text: str) -> str | None:
    """What stands in the last box whose braces are closed."""
    for start in reversed(list(BOXED.finditer(text))):
        depth = 1
        for place in range(start.end(), min(len(text), start.end() + LONGEST)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return _bare(text[start.end() : place])
    return None


def _last_value(text: str) -> str | None:
    """The last number, or the whole of the formula that it is part of."""
    numbers, formulas = list(NUMBER.finditer(text)), list(FORMULA.finditer(text))
    if not numbers:
        return None
    if formulas and formulas[-1].start() <= numbers[-1].start() < formulas[-1].end():
        return _bare(_inside(formulas[-1]))
    return numbers[-1].group()


def _inside(formula: re.Match[str]) -> str:
    return formula[formula.lastgroup or 0]


def _bare(text: str) -> str:
    """The answer without the marks around it."""
    text = text.strip().strip("*").rstrip(".,;: ").strip()
    formula = FORMULA.fullmatch(text)
    text = _inside(formula).strip() if formula else text
    if (box := BOXED.match(text)) and text.endswith("}"):
        text = text[box.end() : -1].strip()
    return text


def _plain(text: str) -> str:
    for pattern, instead in MARKUP:
        text = pattern.sub(instead, text)
    return text.strip()


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


class _Quantity(NamedTuple):
    value: Fraction
    percent: bool
    unit: str


def _quantity(text: str) -> _Quantity | None:
    """The number that a text is, with its unit; None where it is more than that."""
    match = QUANTITY.fullmatch(" ".join(text.split()))  # else the ways to part a run of spaces are many
    if not match or not (match["whole"] or match["part"] or match["top"]):
        return None
    if match["top"]:
        if not int(match["bottom"]):
            return None
        value = int(match["mixed"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    else:
        value = Fraction((match["whole"] or "0").replace(",", "") + (match["part"] or ""))
    words = match["unit"].lower().replace(".", "").split()
    while words and words[0] in SCALES:
        value *= SCALES[words.pop(0)]
    if any(word in NO_UNITS or (len(word) == 1 and word.isalpha() and word not in LETTER_UNITS) for word in words):
        return None  # `5x` and `2 sin x` are maths
    return _Quantity(-value if match["sign"] in ("-", "−") else value, bool(match["percent"]), " ".join(words))


def _same_quantity(given: _Quantity, expected: _Quantity) -> bool:
    """Equal values; 50% is 0.5 and, as for math-verify, 50. Units count where both are there."""
    units = {given.unit.rstrip("s"), expected.unit.rstrip("s")} - {""}
    values = [{one.value, one.value / 100} if one.percent else {one.value} for one in (given, expected)]
    rounded = [{round(value, DECIMALS) for value in each} for each in values]
    return len(units) <= 1 and bool(rounded[0] & rounded[1])
