"""Numbers written as words, such as `twenty-one` and `two thirds`."""

from __future__ import annotations

import re

UNITS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
)
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
VALUES = {word: value for value, word in enumerate(UNITS)} | {word: 10 * (2 + at) for at, word in enumerate(TENS)}
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
ORDINALS = re.findall(
    r"\w+",
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth",
)
FRACTIONS = {"half": 2, "halves": 2, "quarter": 4} | {word: at for at, word in enumerate(ORDINALS, 1) if at > 2}

_VALUE = "|".join(sorted(VALUES, key=len, reverse=True))
_WORD = "|".join([_VALUE, *SCALES])
_FRACTION = "|".join(sorted(FRACTIONS, key=len, reverse=True))
_SCALE = "|".join(SCALES)
_AND = "|".join(rf"(?<={scale})\s+and\s+" for scale in SCALES)  # `five and six` are two numbers
CARDINAL = rf"(?:(?:an?\s+(?:{_SCALE})|{_VALUE})(?:(?:\s+|-|{_AND})(?:{_WORD})(?![a-z]))*)"
PHRASE = re.compile(
    rf"(?<![\w-])(?P<sign>(?:minus|negative)\s+)?"
    rf"(?:(?P<top>an?|{CARDINAL})(?:\s+|-)(?P<bottom>{_FRACTION})s?(?:\s+(?:of\s+)?an?(?=\s))?"
    rf"|(?P<number>{CARDINAL})(?P<half>\s+and\s+(?:a|one)(?:\s+|-)(?P<part>{_FRACTION}))?"
    rf"|(?P<alone>half)(?:\s+(?:of\s+)?an?(?=\s))?)(?![\w])",
    re.IGNORECASE,
)
DOZEN = re.compile(r"(?<![\w-])a\s+dozen(?!\w)", re.IGNORECASE)
SIGN = re.compile(r"^(?:minus|negative)\s+(?=\d)", re.IGNORECASE)
ORDINAL = re.compile(rf"(?:the\s+)?({'|'.join(ORDINALS)})", re.IGNORECASE)


def with_digits(text: str) -> str:
    """Return a text with its number words as digits; a word such as `third` alone is a place.

    >>> with_digits("one hundred and five"), with_digits("two thirds of a cup"), with_digits("three and a half hours")
    ('105', '2/3 cup', '3 1/2 hours')
    >>> with_digits("five and six"), with_digits("the third"), with_digits("none"), with_digits("minus 5")
    ('5 and 6', '3 th', 'none', '-5')
    """
    if place := ORDINAL.fullmatch(text):
        return f"{ORDINALS.index(place[1].lower()) + 1} th"
    return SIGN.sub("-", PHRASE.sub(_digits, DOZEN.sub("1 dozen", text)))


def _digits(match: re.Match[str]) -> str:
    sign = "-" if match["sign"] else ""
    if match["alone"]:
        return sign + "1/2"
    if match["bottom"]:
        top = 1 if match["top"].lower() in ("a", "an") else _cardinal(match["top"])
        return match[0] if top is None else f"{sign}{top}/{FRACTIONS[match['bottom'].lower()]}"
    value = _cardinal(match["number"])
    if value is None:
        return match[0]
    return f"{sign}{value} 1/{FRACTIONS[match['part'].lower()]}" if match["half"] else f"{sign}{value}"


def _cardinal(text: str) -> int | None:
    """Return the value of number words; None if they are not one number, as in `two three`."""
    total = 0
    current = 0
    smallest = 10**15
    last = ""
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in ("a", "an", "and"):
            continue
        if word == "hundred":
            if current >= 10**2:
                return None
            current = (current or 1) * 100
        elif word in SCALES:
            if SCALES[word] >= smallest:
                return None
            smallest = SCALES[word]
            total += (current or 1) * smallest
            current = 0
        else:
            if last in UNITS or (last in TENS and word not in UNITS[1:10]):
                return None
            current += VALUES[word]
        last = word
    return total + current
