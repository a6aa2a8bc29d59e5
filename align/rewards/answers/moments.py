"""Dates, times of day, ratios and numerals in other bases: forms of an answer in which no number stands alone.

Each function returns whether two texts are the same; None if they are not both of this form.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MONTHS = re.findall(r"\w+", "january february march april may june july august september october november december")
_MONTH = "|".join(f"{name[:3]}(?:{name[3:]})?" for name in MONTHS) + "|sept"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?(?:the\s+)?"
_DAY = r"(?P<day>[0-3]?\d)(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s*(?P<year>\d{4}))?"
DATES = tuple(
    re.compile(_WEEKDAY + pattern, re.IGNORECASE)
    for pattern in (
        rf"(?P<name>{_MONTH})\.?\s+{_DAY}{_YEAR}",
        rf"{_DAY}\s+(?:of\s+)?(?P<name>{_MONTH})\.?{_YEAR}",
        r"(?P<year>\d{4})-(?P<month>[01]?\d)-(?P<day>[0-3]?\d)",
        r"(?P<month>[01]?\d)/(?P<day>[0-3]?\d)/(?P<year>\d{4})",
    )
)
TIME = re.compile(
    r"(?:(?P<hour>[012]?\d)(?:\s?[:.]\s?(?P<minute>[0-5]\d)(?::(?P<second>[0-5]\d))?)?)?"
    r"\s*(?P<half>(?<![a-z])(?:[ap]\.?\s?m\b\.?|noon|midnight)(?:\s+(?:in the|at)\s+\w+)?)?",
    re.IGNORECASE,
)
OCLOCK = re.compile(r"\s*o'clock\s*", re.IGNORECASE)
MINUTES_OF_HALF = {"am": 0, "pm": 12 * 60}
MINUTES_OF_HOUR, HALF_DAY = 60, 12 * 60
RATIO = re.compile(r"\d{1,12}(?:\.\d{1,6})?(?:\s*(?::|(?<=\s)to(?=\s))\s*\d{1,12}(?:\.\d{1,6})?){1,5}")
BASE = re.compile(
    r"(?P<digits>[0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?)\s*(?:_\s*\{?\s*(?P<base>\d{1,2}|[a-z]+)\s*\}?"
    r"|\(?\s*(?:in\s+)?base\s*-?\s*(?P<said>\d{1,2}|[a-z]+)\s*\)?)",
    re.IGNORECASE,
)
PREFIXED = re.compile(r"0(?P<kind>[xbo])(?P<digits>[0-9A-Fa-f]+)", re.IGNORECASE)
BASES = {
    "x": "16",
    "b": "2",
    "o": "8",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
} | {
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "twelve": "12",
    "sixteen": "16",
}


class _Time(NamedTuple):
    minutes: int  # since midnight, or of twelve hours where the half of the day is not given
    seconds: int
    has_half: bool


def same_date(text: str, other: str) -> bool | None:
    """Compare two dates; a missing year is any year.

    >>> same_date("June 20", "20th of June"), same_date("June 20, 2021", "2021-06-20"), same_date("May 5", "5")
    (True, True, None)
    """
    dates = _date(text), _date(other)
    if dates[0] is None or dates[1] is None:
        return None
    years = {dates[0][0], dates[1][0]} - {None}
    return dates[0][1:] == dates[1][1:] and len(years) <= 1


def _date(text: str) -> tuple[int | None, int, int] | None:
    match = next((match for pattern in DATES if (match := pattern.fullmatch(text))), None)
    if match is None:
        return None
    found = match.groupdict()
    name = found.get("name")
    month = (
        next(at for at, each in enumerate(MONTHS, 1) if each[:3] == name[:3].lower()) if name else int(found["month"])
    )
    day = int(found["day"])
    if month > len(MONTHS):
        month, day = day, month
    return (int(found["year"]) if found["year"] else None), month, day


def same_time(text: str, other: str) -> bool | None:
    """Compare two times of day, at least one with its half of the day; a missing half is any.

    >>> same_time("3:30 PM", "15:30"), same_time("12 noon", "12"), same_time("3:30 PM", "3:30 a.m.")
    (True, True, False)
    """
    one, two = _time(text), _time(other)
    if one is None or two is None or not (one.has_half or two.has_half):
        return None
    if one.has_half and two.has_half:
        return one == two
    with_half, bare = (one, two) if one.has_half else (two, one)
    if bare.seconds != with_half.seconds:
        return False
    if MINUTES_OF_HOUR <= bare.minutes < HALF_DAY + MINUTES_OF_HOUR:  # an hour from 1 to 12 may be of either half
        return (with_half.minutes - bare.minutes) % HALF_DAY == 0
    return with_half.minutes == bare.minutes


def _time(text: str) -> _Time | None:
    match = TIME.fullmatch(OCLOCK.sub(":00 ", text).strip())
    if match is None or not (match["hour"] or match["half"]):
        return None
    half = re.sub(r"[\s.]", "", match["half"] or "").lower()
    if match["hour"] is None:
        return _Time({"noon": HALF_DAY, "midnight": 0}[half], 0, True) if half in ("noon", "midnight") else None
    hour, minute, second = (int(match[name] or 0) for name in ("hour", "minute", "second"))
    if hour >= 24:  # noqa: PLR2004 - hours of a day
        return None
    if half in ("noon", "midnight"):
        half = "pm" if half == "noon" else "am"
    if half[:2] in MINUTES_OF_HALF and hour <= 12:  # noqa: PLR2004
        return _Time(MINUTES_OF_HALF[half[:2]] + 60 * (hour % 12) + minute, second, True)
    return _Time(60 * hour + minute, second, False)


def same_ratio(text: str, other: str) -> bool | None:
    """Compare two ratios, as `3:2` and `3 to 2`; what may be a time of day is not reduced.

    >>> same_ratio("3:2", "3 : 2"), same_ratio("3:2", "2:3"), same_ratio("2:4", "1:2"), same_ratio("10:30", "1:3")
    (True, False, True, False)
    """
    text, other = (OCLOCK.sub(":00", each) for each in (text, other))
    if not (RATIO.fullmatch(text) and RATIO.fullmatch(other)):
        return None
    terms, others = ([Fraction(term) for term in re.split(r"\s*:\s*|\s+to\s+", each)] for each in (text, other))
    if terms == others:
        return True
    if len(terms) != len(others) or _may_be_time(text) or _may_be_time(other):
        return False
    return all(a * others[-1] == b * terms[-1] for a, b in zip(terms, others, strict=True))


def _may_be_time(text: str) -> bool:
    return re.fullmatch(r"[012]?\d:[0-5]\d(:[0-5]\d)?", text) is not None


def same_numeral(text: str, other: str) -> bool | None:
    """Compare numerals of which one names its base; the same digits in another base or in none are another number.

    >>> same_numeral("52_8", "52_{8}"), same_numeral("101_2", "101"), same_numeral("0x1f", "1F (base 16)")
    (True, False, True)
    """
    numerals = [_numeral(each) for each in (text, other)]
    if numerals == [None, None]:
        return None
    decimal = [(each, "10") if each.isdecimal() else None for each in (text, other)]
    return (numerals[0] or decimal[0]) == (numerals[1] or decimal[1])


def _numeral(text: str) -> tuple[str, str] | None:
    if match := PREFIXED.fullmatch(text):
        return match["digits"].lower(), BASES[match["kind"].lower()]
    match = BASE.fullmatch(text)
    if match is None or not any(digit.isdigit() for digit in match["digits"]):
        return None
    base = (match["base"] or match["said"]).lower()
    return (match["digits"].lower(), BASES.get(base, base)) if base.isdigit() or base in BASES else None
