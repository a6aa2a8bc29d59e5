"""Units behind numbers: parsing, and whether two of them measure or count the same."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from align.rewards.answers.unit_table import NAMES, SYMBOLS, Known

MEANINGS = (({"GBP": 1}, Fraction(1)), ({"g": 1}, Fraction("453.59237")))  # of a pound
PHRASES = (  # before the text is cut into words
    (re.compile(r"°\s*([CF])(?![A-Za-z])"), r"°\1"),
    (re.compile(r"degrees?\s+(celsius|centigrade|c)(?![a-z])", re.IGNORECASE), "celsius"),
    (re.compile(r"degrees?\s+(fahrenheit|f)(?![a-z])", re.IGNORECASE), "fahrenheit"),
    (re.compile(r"(?:u\.?s\.?|american)\s+(?=dollars?|cents?)", re.IGNORECASE), ""),
    (re.compile(r"canadian\s+dollars?", re.IGNORECASE), "CAD"),
    (re.compile(r"australian\s+dollars?", re.IGNORECASE), "AUD"),
    (re.compile(r"(?:british\s+pounds?|pounds?\s+sterling)", re.IGNORECASE), "GBP"),
    (re.compile(r"watt[\s-]?hours?", re.IGNORECASE), "watthour"),
    (re.compile(r"(kilo|mega|giga)\s+(?=watt)", re.IGNORECASE), r"\1"),
    (re.compile(r"\\(?:cdot|times)(?![A-Za-z])"), "*"),
)
TOKEN = re.compile(
    r"°[CF](?![A-Za-z])|(?:US|AU|CA|NZ|HK|[ACSR])\$|[^\W\d_]+(?:['-][^\W\d_]+)*|\^\s*\{?\s*-?\d\s*\}?"
    r"|(?<=[A-Za-z])[23](?!\d)|['\"°%/*()¢$€£¥₹₩₽-]"
)
SQUARED = {"squared": 2, "sq": 2, "cubed": 3}
SQUARE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
SEPARATORS = set("*()-")
IGNORED = {"of", "the", "in", "a", "an", "total", "altogether", "all"}
# A text with one of them is no number with a unit
NOT_UNITS = re.compile(
    "and|arccos|arcsin|arctan|cos|exp|ln|log|mod|or|pi|sin|sqrt|tan|to|through|until|plus|minus|over|below|under|not|no|"
    "non|than|unless|except|if|is|are|was|equals|base"
)
ATTACHED = {"g", "h", "l", "m", "s", "L"}  # of one letter, also directly behind a number: elsewhere `5x` is a formula
PLACES = {"st", "nd", "rd", "th"}  # of an ordinal number
LONG = 4  # letters of a word directly behind a number: fewer are a product, as in `2ab`
VOWEL = re.compile("[aeiou]")
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "mice": "mouse"}


class Unit(NamedTuple):
    """A unit: what it is in base units, and the words for what is counted, as in `red apples`."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction
    words: tuple[str, ...]


def same_word(word: str, other: str) -> bool:
    """Return whether two words are equal, or one is the plural of the other.

    >>> same_word("cherries", "cherry"), same_word("boxes", "box"), same_word("planes", "plan")
    (True, True, False)
    """
    return bool(_forms(word) & _forms(other))


def _forms(word: str) -> set[str]:
    """Return a word and what it may be the plural of."""
    found = {word, IRREGULAR.get(word, word)}
    if word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
    if re.search(r"(?:s|x|z|ch|sh|o)es$", word):
        found.add(word[:-2])
    if word.endswith("ies"):
        found.add(word[:-3] + "y")
    if word.endswith("ves"):
        found |= {word[:-3] + "f", word[:-3] + "fe"}
    return found


def known_unit(word: str) -> Known | None:
    """Return a unit of measurement by its symbol or name; None for any other word."""
    for symbol in (word, word.lower()):
        if symbol in SYMBOLS and (symbol == word or len(word) > 1):
            return SYMBOLS[symbol]
    return next((NAMES[form] for form in sorted(_forms(word.lower()), key=len, reverse=True) if form in NAMES), None)


def parse_unit(text: str, *, attached: bool = False) -> Unit | None:
    """Return a text after a number as a unit, None if it is none; `attached`: without a space between them.

    >>> parse_unit("km/h") == parse_unit("kilometers per hour"), parse_unit("square feet") == parse_unit("ft^2")
    (True, True)
    >>> parse_unit("red apples").words, parse_unit("x + 1")
    (('red', 'apples'), None)
    """
    for pattern, replacement in PHRASES:
        text = pattern.sub(replacement, text)
    text = text.replace(".", "")
    tokens = TOKEN.findall(text)
    if "".join(tokens).replace(" ", "") != re.sub(r"\s", "", text):
        return None
    product = _Product()
    for number, token in enumerate(tokens):
        begins = number == 0 and attached
        ends = number == len(tokens) - 1
        if product.read_operator(token.lower(), ends=ends) or product.read_power(token.lower()):
            continue
        known = known_unit(token)
        if known and not (begins and len(token) == 1 and token.isalpha() and token not in ATTACHED):
            product.multiply(known)
        elif not product.read_word(token.lower(), attached=begins):
            return None
    return product.unit()


class _Product:
    """The product of units that is read from left to right."""

    def __init__(self) -> None:
        self.dimensions: Counter[str] = Counter()
        self.factor = Fraction(1)
        self.words: list[str] = []
        self.last: Known | None = None
        self.sign = self.power = 1  # of the units that follow, and of the next one

    def read_operator(self, token: str, *, ends: bool) -> bool:
        """Read a division, or a power before its unit; return whether the token is one."""
        if token in ("/", "per") or (token in ("a", "an") and self.last and not ends):  # 60 miles an hour
            self.sign = -1
        elif token in SQUARE and not (self.last and ends):
            self.power = SQUARE[token]
        else:
            return token in SEPARATORS
        return True

    def read_power(self, token: str) -> bool:
        """Read a power behind its unit; return whether the token is one."""
        digits = re.fullmatch(r"\^?\s*\{?\s*(-?\d)\s*\}?", token)
        power = int(digits[1]) if digits else SQUARED.get(token)
        if power is None or self.last is None:
            return False
        self._multiply(self.last, self.sign * (power - 1))
        return True

    def multiply(self, known: Known) -> None:
        self._multiply(known, self.sign * self.power)
        self.last = known
        self.power = 1

    def _multiply(self, known: Known, power: int) -> None:
        for name, each in known.dimensions.items():
            self.dimensions[name] += power * each
        self.factor *= known.factor**power

    def read_word(self, word: str, *, attached: bool) -> bool:
        """Read a word for what is counted; return whether the token is one."""
        may_be = not attached or word in PLACES or not word.isascii() or (len(word) >= LONG and VOWEL.search(word))
        if not may_be or not word[0].isalpha() or NOT_UNITS.fullmatch(word) or (len(word) == 1 and word != "a"):
            return False
        if word not in IGNORED:
            self.words.append("th" if word in PLACES else word)
        return True

    def unit(self) -> Unit:
        dimensions = tuple(sorted((name, power) for name, power in self.dimensions.items() if power))
        return Unit(dimensions, self.factor, tuple(self.words))


def conversions(unit: Unit) -> list[Unit]:
    """Return what a unit can mean: a pound is a weight or money."""
    if ("pound", 1) not in unit.dimensions:
        return [unit]
    rest = [each for each in unit.dimensions if each[0] != "pound"]
    return [
        Unit(tuple(sorted([*rest, *dimensions.items()])), unit.factor * factor, unit.words)
        for dimensions, factor in MEANINGS
    ]


def same_kind(unit: Unit, other: Unit) -> bool:
    """Return whether two units measure or count the same; one of them may say more: `feet tall`, `red apples`."""
    if unit.dimensions != other.dimensions:
        return False
    short, long = sorted((unit.words, other.words), key=len)
    if not short:
        return bool(unit.dimensions) or not long
    pairs = [long[: len(short)], long[-len(short) :]]
    return any(all(map(same_word, short, part)) for part in pairs)
