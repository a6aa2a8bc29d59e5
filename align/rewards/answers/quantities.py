"""Numbers with units: parsing and comparison."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from align.rewards.answers.number_words import SCALES, with_digits
from align.rewards.answers.unit_table import CURRENCY
from align.rewards.answers.units import Unit, conversions, known_unit, parse_unit, same_kind

TOLERANCE = Fraction(1, 2 * 10**6)  # as in math-verify: 0.333333 is a third
RELATIVE = Fraction(1, 10**6)

GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ ']\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"
QUANTITY = re.compile(
    rf"""(?P<currency>{CURRENCY}\s*)?(?P<sign>[-+])?\s*(?P<behind>{CURRENCY}\s*)?
    (?:(?:(?P<mixed>\d{{1,40}})(?:\s+|-))?(?P<top>\d{{1,40}})\s*/\s*(?P<bottom>\d{{1,40}})(?![\d.])
      |10\s*\^\s*\{{?(?P<power>[-+]?\d{{1,3}})\}}?
      |(?P<number>(?:{GROUPED}|\d{{1,40}})?(?:\.\d{{0,40}})?)
       (?:\s*(?:[xX*]|\\times|\\cdot)\s*10\s*\^\s*\{{?(?P<scientific>[-+]?\d{{1,3}})\}}?|[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w))?)
    (?P<space>\s*)(?P<unit>\D.*)?""",
    re.VERBOSE,
)
FRACTION = re.compile(
    r"(?P<mixed>(?<![\^_.\d])\d+\s*)?\\frac\s*(?:\{\s*(?P<top>-?\d+)\s*\}|(?P<digit>\d))\s*(?:\{\s*(?P<bottom>-?\d+)\s*\}|(?P<last>\d))"
)
PERCENT = re.compile(r"\s*(?:%|(?:percent|per cent|pct)\b)\s*", re.IGNORECASE)
SCALE = re.compile(rf"({'|'.join(SCALES)}|dozen|mn|bn|mil)s?(?![A-Za-z])\s*", re.IGNORECASE)
SHORT_SCALE = re.compile(r"([kKMB])(?![A-Za-z])\s*")  # of money
SHORT = {"mn": 10**6, "bn": 10**9, "mil": 10**6, "dozen": 12, "k": 10**3, "m": 10**6, "b": 10**9}
PART = re.compile(r"(\d+(?:\.\d+)?)\s*([^\W\d_]+|['\"])(?:\s*,?\s*(?:and\s+)?|$)")
BELOW_ZERO = re.compile(r"\s+below\s+zero$", re.IGNORECASE)
NO_UNIT = Unit((), Fraction(1), ())


class Quantity(NamedTuple):
    """A number with its unit; the unit of a plain number is `NO_UNIT`."""

    value: Fraction
    percent: bool
    unit: Unit


def parse_quantity(text: str) -> Quantity | None:
    r"""Return a plain text that is a number, perhaps with a unit, as a quantity; None for any other text.

    >>> parse_quantity("$3.5 million").value, parse_quantity("1 1/2 cups").value, parse_quantity("5x")
    (Fraction(3500000, 1), Fraction(3, 2), None)
    >>> parse_quantity("1.5e-3").value, parse_quantity(r"3\frac{1}{2}").value, parse_quantity("1 234").value
    (Fraction(3, 2000), Fraction(7, 2), Fraction(1234, 1))
    """
    text = " ".join(text.split())
    negative = BELOW_ZERO.search(text)
    text = FRACTION.sub(_slashed, with_digits(BELOW_ZERO.sub("", text)))
    found = _single(text) or _sum(text)
    return found._replace(value=-found.value) if found and negative else found


def _single(text: str) -> Quantity | None:
    match = QUANTITY.fullmatch(text)
    value = None if match is None else _value(match)
    if match is None or value is None:
        return None
    rest = match["unit"] or ""
    money = (match["currency"] or match["behind"] or "").strip()
    percent = PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    elif money and (scale := SHORT_SCALE.match(rest)):
        value *= SHORT[scale[1].lower()]
        rest = rest[scale.end() :]
    while scale := SCALE.match(rest):
        name = scale[1].lower()
        value *= SCALES.get(name) or SHORT[name]
        rest = rest[scale.end() :]
    if money and known_unit(rest.strip().rstrip(".")):
        rest = rest if rest.strip().lower() in ("usd", "dollars", "dollar") and money == "$" else f"{money}{rest}"
        unit = parse_unit(rest)
    else:
        unit = parse_unit(f"{money} {rest}", attached=bool(match["unit"]) and not match["space"] and not money)
    return None if unit is None else Quantity(value, bool(percent), unit)


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] == "-" else 1
    if match["top"]:
        if not int(match["bottom"]):
            return None
        return sign * (int(match["mixed"] or 0) + Fraction(int(match["top"]), int(match["bottom"])))
    if match["power"]:
        return sign * Fraction(10) ** int(match["power"])
    number = re.sub(r"[, ']", "", match["number"])
    if number in ("", "."):
        return None
    power = int(match["scientific"] or match["exponent"] or 0)
    return sign * Fraction(number.rstrip(".") if number[-1] == "." else number) * Fraction(10) ** power


def _sum(text: str) -> Quantity | None:
    """Return a measure in several units, as `2 hours 30 minutes`, in the first of them."""
    parts = list(PART.finditer(text))
    if len(parts) < 2 or "".join(part[0] for part in parts) != text:  # noqa: PLR2004 - several
        return None
    parsed = [(Fraction(part[1]), _part_unit(part[2])) for part in parts]
    units = [unit for _, unit in parsed if unit is not None and unit.dimensions and not unit.words]
    if len(units) < len(parts) or len({unit.dimensions for unit in units}) > 1:
        return None
    if any(larger.factor <= smaller.factor for larger, smaller in zip(units, units[1:], strict=False)):
        return None
    total = sum((value * unit.factor for (value, _), unit in zip(parsed, units, strict=True)), Fraction(0))
    return Quantity(total / units[0].factor, percent=False, unit=units[0])


def _part_unit(text: str) -> Unit | None:
    return parse_unit({"'": "feet", '"': "inches"}.get(text, text))


def _slashed(match: re.Match[str]) -> str:
    r"""Return `\frac{1}{2}` as `1/2`."""
    top, bottom = int(match["top"] or match["digit"]), int(match["bottom"] or match["last"])
    if match["mixed"]:
        return f"{match['mixed'].strip()} {top}/{bottom}" if top >= 0 < bottom else match[0]
    return f"{'-' if top * bottom < 0 else ''}{abs(top)}/{abs(bottom)}"


def same_quantity(given: Quantity, expected: Quantity) -> bool:
    """Return whether values are equal, and units where both have one; 50% is 0.5 and, as for math-verify, 50."""
    values = [{each.value, each.value / 100} if each.percent else {each.value} for each in (given, expected)]
    if NO_UNIT in (given.unit, expected.unit):
        if (given.percent and expected.unit != NO_UNIT) or (expected.percent and given.unit != NO_UNIT):
            return False  # 5% and 5 people
        return _any_close(values[0], values[1], Fraction(1))
    return any(
        same_kind(unit, other) and _any_close(values[0], values[1], unit.factor / other.factor)
        for unit in conversions(given.unit)
        for other in conversions(expected.unit)
    )


def _any_close(values: set[Fraction], others: set[Fraction], factor: Fraction) -> bool:
    return any(close(value * factor, other) for value in values for other in others)


def close(value: Fraction, other: Fraction) -> bool:
    """Return whether two numbers are equal to six decimals and six significant digits."""
    difference = abs(value - other)
    return difference <= TOLERANCE and difference <= RELATIVE * max(abs(value), abs(other))
