r"""Find the final answer in a response, and compare it with the known one.

A response gives its answer as in GSM8K (`#### 42`), in `\boxed{...}`, in words ("the answer is 42"), or as its last
number. Numbers, fractions, units, letters of a choice and words are compared here; math-verify compares the rest.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from align.rewards.math_equality import equal_maths

MAX_LENGTH = 1000  # characters of an answer that math-verify is asked about
DECIMALS = 6  # to which numbers must agree, as in math-verify: 0.333333 is a third

MARKER = re.compile(r"####[ \t]*(?P<answer>\S.*)(?P<rest>\s*)")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
STATED = re.compile(
    r"\banswer\**\s*(?:is|are|=|:)\**:?\s*\**(?:(?:about|approximately|roughly)\s)?(?=\S)", re.IGNORECASE
)
EXPLANATION = re.compile(r"\n.*|(?<=\S)[.!](?:\s.*)?$|\*\*.*|\s(?:because|since|which|so that)\b.*", re.DOTALL)
FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$\n]+)\$(?!\w|\.\d)|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]",
    re.DOTALL,
)
NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-−])?[$€£¥₹]?(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?(?![\d])%?|(?<![\w.,])\.\d+%?"
)
MAX_WORDS = 5  # of an answer without a number: "the answer is the red one"
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
ONE_LETTER_UNITS = {"g", "h", "l", "m", "s"}
NOT_UNITS = {"and", "arccos", "arcsin", "arctan", "cos", "exp", "ln", "log", "mod", "or", "pi", "sin", "sqrt", "tan"}
LATEX = (  # pattern, replacement
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[,!;: ]|\{,\}|\\left\b|\\right\b"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]frac\b"), r"\\frac"),
)


def final_answer(text: str) -> str | None:
    r"""Return the answer that a response gives, as it is written there; None where it gives none.

    >>> final_answer(r"Half of 84 is \boxed{42}.")
    '42'
    """
    answer = _after_marker(text) or _last_boxed(text) or _stated(text)
    if answer:
        return answer
    if "\n" not in text.strip() and len(WORD.findall(text)) <= 1:
        return _strip_markup(text) or None
    return _last_value(text)


def same_answer(given: str, expected: str) -> bool:
    """Return whether an answer is the expected one, however each is written; False where math-verify does not finish.

    >>> same_answer("$1,000", "1000.00"), same_answer("1/3", "0.333333"), same_answer("(B)", "C")
    (True, True, False)
    """
    maths = _strip_markup(given), _strip_markup(expected)
    given, expected = (_replace_latex(text) for text in maths)
    if not given or not expected:
        return False
    if _normalized(given) == _normalized(expected):
        return True
    if choice := CHOICE.fullmatch(expected):
        chosen = CHOICE.match(given)
        return chosen is not None and chosen["letter"].upper() == choice["letter"].upper()
    numbers = _quantity(given), _quantity(expected)
    if numbers[0] and numbers[1]:
        return _same_quantity(numbers[0], numbers[1])
    if WORDS.fullmatch(given) and WORDS.fullmatch(expected):
        return False  # to math-verify, `listen` and `silent` are the same product of letters
    return max(map(len, maths)) <= MAX_LENGTH and equal_maths(*maths) is True


def _after_marker(text: str) -> str | None:
    """Return what follows `####`: a number, or the last line. Other lines with this marker are headings."""
    for match in reversed(list(MARKER.finditer(text))):
        number = _quantity(_strip_markup(match["answer"]))
        if match.end() == len(text) or (number and not number.unit):
            return _strip_markup(match["answer"])
    return None


def _stated(text: str) -> str | None:
    """Return the last text that follows "the answer is", if it is short or has a number."""
    for match in reversed(list(STATED.finditer(text))):
        rest = text[match.end() : match.end() + MAX_LENGTH]
        formula = FORMULA.match(rest)
        answer = _strip_markup(_inside(formula) if formula else EXPLANATION.sub("", rest))
        if answer and (re.search(r"[\d\\]", answer) or len(answer.split()) <= MAX_WORDS):
            return answer
    return None


def _last_boxed(text: str) -> str | None:
    """Return the content of the last box whose braces are balanced."""
    for start in reversed(list(BOXED.finditer(text))):
        depth = 1
        for index in range(start.end(), min(len(text), start.end() + MAX_LENGTH)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return _strip_markup(text[start.end() : index])
    return None


def _last_value(text: str) -> str | None:
    """Return the last number, or the formula that contains it."""
    numbers, formulas = list(NUMBER.finditer(text)), list(FORMULA.finditer(text))
    if not numbers:
        return None
    if formulas and formulas[-1].start() <= numbers[-1].start() < formulas[-1].end():
        return _strip_markup(_inside(formulas[-1]))
    return numbers[-1].group()


def _inside(formula: re.Match[str]) -> str:
    return formula[formula.lastgroup or 0]


def _strip_markup(text: str) -> str:
    """Return an answer without the Markdown, punctuation, dollar signs and box around it."""
    text = text.strip().strip("*").rstrip(".,;: ").strip()
    formula = FORMULA.fullmatch(text)
    text = _inside(formula).strip() if formula else text
    if (box := BOXED.match(text)) and text.endswith("}"):
        text = text[box.end() : -1].strip()
    return text


def _replace_latex(text: str) -> str:
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def _normalized(text: str) -> str:
    return " ".join(text.lower().split())


class _Quantity(NamedTuple):
    value: Fraction
    percent: bool
    unit: str


def _quantity(text: str) -> _Quantity | None:
    """Return a text that is a number, perhaps with a unit, as a quantity; None for any other text."""
    match = QUANTITY.fullmatch(" ".join(text.split()))  # the pattern would backtrack over runs of spaces
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
    if any(word in NOT_UNITS or (len(word) == 1 and word.isalpha() and word not in ONE_LETTER_UNITS) for word in words):
        return None  # `5x` and `2 sin x` are formulas
    return _Quantity(-value if match["sign"] in ("-", "−") else value, bool(match["percent"]), " ".join(words))


def _same_quantity(given: _Quantity, expected: _Quantity) -> bool:
    """Return whether values are equal, and units where both have one; 50% is 0.5 and, as for math-verify, 50."""
    units = {given.unit.rstrip("s"), expected.unit.rstrip("s")} - {""}
    values = [{each.value, each.value / 100} if each.percent else {each.value} for each in (given, expected)]
    rounded = [{round(value, DECIMALS) for value in candidates} for candidates in values]
    return len(units) <= 1 and bool(rounded[0] & rounded[1])
