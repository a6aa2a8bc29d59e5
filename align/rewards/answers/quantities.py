"""Numbers with units: parsing and comparison."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

DECIMALS = 6  # to which numbers must agree, as in math-verify: 0.333333 is a third

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


class Quantity(NamedTuple):
    """A number with its unit."""

    value: Fraction
    percent: bool
    unit: str


def parse_quantity(text: str) -> Quantity | None:
    """Return a text that is a number, perhaps with a unit, as a quantity; None for any other text.

    >>> parse_quantity("$3.5 million").value, parse_quantity("1 1/2 cups").unit, parse_quantity("5x")
    (Fraction(3500000, 1), 'cups', None)
    """
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
    return Quantity(-value if match["sign"] in ("-", "−") else value, bool(match["percent"]), " ".join(words))


def same_quantity(given: Quantity, expected: Quantity) -> bool:
    """Return whether values are equal, and units where both have one; 50% is 0.5 and, as for math-verify, 50."""
    units = {given.unit.rstrip("s"), expected.unit.rstrip("s")} - {""}
    values = [{each.value, each.value / 100} if each.percent else {each.value} for each in (given, expected)]
    rounded = [{round(value, DECIMALS) for value in candidates} for candidates in values]
    return len(units) <= 1 and bool(rounded[0] & rounded[1])
