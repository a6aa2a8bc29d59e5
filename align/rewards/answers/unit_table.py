"""Known units of measurement and currencies: their symbols and names, and what each is in base units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

Dimensions = Mapping[str, int]  # base unit -> power


class Known(NamedTuple):
    """A known unit."""

    dimensions: Dimensions
    factor: Fraction  # base units in one of it


PREFIXES = {
    "n": ("nano", Fraction(1, 10**9)),
    "μ": ("micro", Fraction(1, 10**6)),
    "m": ("milli", Fraction(1, 10**3)),
    "c": ("centi", Fraction(1, 100)),
    "d": ("deci", Fraction(1, 10)),
    "k": ("kilo", Fraction(10**3)),
    "M": ("mega", Fraction(10**6)),
    "G": ("giga", Fraction(10**9)),
    "T": ("tera", Fraction(10**12)),
}
WITH_PREFIXES = (  # symbols, names, base units, factor
    ("m", "meter metre", "m", "1"),
    ("g", "gram gramme", "g", "1"),
    ("s", "second", "s", "1"),
    ("l L", "liter litre", "m3", "0.001"),
    ("J", "joule", "J", "1"),
    ("W", "watt", "J/s", "1"),
    ("Wh", "watthour", "J", "3600"),
    ("V", "volt", "V", "1"),
    ("A", "ampere amp", "A", "1"),
    ("N", "newton", "N", "1"),
    ("Pa", "pascal", "Pa", "1"),
    ("Hz", "hertz", "Hz", "1"),
    ("Ω", "ohm", "Ω", "1"),
    ("cal", "calorie", "cal", "1"),
    ("eV", "electronvolt", "eV", "1"),
    ("mol", "mole", "mol", "1"),
    ("B", "byte", "bit", "8"),
    ("bit", "bit", "bit", "1"),
)
OTHERS = (  # names, base units, factor
    ('inch inches in "', "m", "0.0254"),
    ("foot feet ft '", "m", "0.3048"),
    ("yard yd", "m", "0.9144"),
    ("mile mi", "m", "1609.344"),
    ("acre", "m2", "4046.8564224"),
    ("hectare ha", "m2", "10000"),
    ("gallon gal", "m3", "0.003785411784"),
    ("quart qt", "m3", "0.000946352946"),
    ("pint pt", "m3", "0.000473176473"),
    ("cup", "m3", "0.0002365882365"),
    ("tablespoon tbsp", "m3", "0.00001478676478125"),
    ("teaspoon tsp", "m3", "0.00000492892159375"),
    ("kilo", "g", "1000"),
    ("gm gms", "g", "1"),
    ("lb lbs", "g", "453.59237"),
    ("ounce oz", "g", "28.349523125"),
    ("tonne", "g", "1000000"),
    ("sec", "s", "1"),
    ("minute min mins", "s", "60"),
    ("hour hr hrs h", "s", "3600"),
    ("day", "s", "86400"),
    ("week wk", "s", "604800"),
    ("year yr yrs", "month", "12"),
    ("month", "month", "1"),
    ("mph", "m/s", "0.44704"),
    ("kph kmh kmph", "m/s", "1/3.6"),
    ("degree deg °", "°", "1"),
    ("radian rad", "rad", "1"),
    ("°c celsius", "°C", "1"),
    ("°f fahrenheit", "°F", "1"),
    ("kelvin", "K", "1"),
    ("dollar buck usd $ us$", "USD", "1"),
    ("cent cents ¢ penny pennies", "USD", "0.01"),
    ("euro eur €", "EUR", "1"),
    ("gbp £ sterling quid", "GBP", "1"),
    ("pence", "GBP", "0.01"),
    ("yen jpy ¥", "JPY", "1"),
    ("yuan rmb cny renminbi", "CNY", "1"),
    ("rupee inr rs ₹", "INR", "1"),
    ("won krw ₩", "KRW", "1"),
    ("ruble rouble rub ₽", "RUB", "1"),
    ("peso mxn", "MXN", "1"),
    ("real reais brl r$", "BRL", "1"),
    ("franc chf", "CHF", "1"),
    ("krona sek", "SEK", "1"),
    ("aud a$ au$", "AUD", "1"),
    ("cad c$ ca$", "CAD", "1"),
    ("nzd nz$", "NZD", "1"),
    ("sgd s$", "SGD", "1"),
    ("hkd hk$", "HKD", "1"),
    ("pound", "pound", "1"),  # of weight or of money: `MEANINGS`
)
CURRENCY = (
    r"(?:(?:US|AU|CA|NZ|HK|[ACSR])?\$|[€£¥₹₩₽¢]|Rs\.?(?=\s?\d)|"
    r"(?:USD|EUR|GBP|JPY|CNY|RMB|INR|KRW|RUB|MXN|BRL|CHF|SEK|AUD|CAD|NZD|SGD|HKD)(?![A-Za-z]))"
)


def _base(text: str) -> Dimensions:
    found: Counter[str] = Counter()
    for sign, part in zip((1, -1), text.split("/"), strict=False):
        found[part.rstrip("23")] += sign * (int(part[-1]) if part[-1] in "23" else 1)
    return dict(found)


def _symbols_and_names() -> tuple[dict[str, Known], dict[str, Known]]:
    """Return known units by symbol, whose case matters, and by name in lower case."""
    symbols: dict[str, Known] = {}
    names: dict[str, Known] = {}
    for short, long, base, factor in WITH_PREFIXES:
        dimensions = _base(base)
        size = Fraction(factor)
        symbols |= dict.fromkeys(short.split(), Known(dimensions, size))
        names |= dict.fromkeys(long.split(), Known(dimensions, size))
        for letter, (prefix, times) in PREFIXES.items():
            symbols |= dict.fromkeys((letter + each for each in short.split()), Known(dimensions, size * times))
            names |= dict.fromkeys((prefix + each for each in long.split()), Known(dimensions, size * times))
    symbols |= {"K": Known({"K": 1}, Fraction(1))} | {each: Known({f"°{each}": 1}, Fraction(1)) for each in "CF"}
    for long, base, factor in OTHERS:
        top, _, bottom = factor.partition("/")
        value = Fraction(top) / Fraction(bottom or 1)
        names |= dict.fromkeys(long.split(), Known({base: 1} if base[0] == "°" else _base(base), value))
    return symbols, names


SYMBOLS, NAMES = _symbols_and_names()
