"""Format numbers for people; missing values become "unknown"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

UNKNOWN = "unknown"
RATE, NATS, PLAIN = "rate", "nats", "plain"  # units of a score
DECIMAL_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
MINUTE, HOUR, DAY = 60, 3600, 86400


def plain(value: float | None) -> str:
    """Return a number with four significant digits."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"


def fixed(value: float) -> str:
    """Return a number with three decimals, or three significant digits where it is very small or large."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def scaled(value: float | None, unit: str = "") -> str:
    """Return three significant digits with a decimal prefix, as in `1.23 M`."""
    if value is None:
        return UNKNOWN
    power = 0
    while abs(value) >= 999.5 and power < len(DECIMAL_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {DECIMAL_PREFIXES[power]}{unit}".strip()


def size(value: float | None) -> str:
    """Return a number of bytes with a binary unit."""
    if value is None:
        return UNKNOWN
    power = 0
    while abs(value) >= 1023.5 and power < len(BINARY_UNITS) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.3g} {BINARY_UNITS[power]}"


def duration(seconds: float | None) -> str:
    """Return the two largest of days, hours, minutes and seconds, as in `1 h 40 min`."""
    if seconds is None:
        return UNKNOWN
    if seconds < MINUTE:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    parts = {"d": whole // DAY, "h": whole % DAY // HOUR, "min": whole % HOUR // MINUTE, "s": whole % MINUTE}
    nonzero = [f"{number} {unit}" for unit, number in parts.items() if number]
    return " ".join(nonzero[:2])


def percent(value: float | None) -> str:
    """Return a fraction in [0, 1] as a percentage."""
    if value is None:
        return UNKNOWN
    return f"{value:.1%}" if value == 0 or abs(value) >= 0.001 else f"{100 * value:.2g}%"


def score_text(value: float, *, rate: bool) -> str:
    """Return a rate as a percentage, another score with three decimals."""
    return f"{value:.1%}" if rate else f"{value:.3f}"


def interval_text(score: Mapping[str, Any], *, rate: bool, signed: bool = False) -> str:
    """Return an interval as `69.0 to 77.5`, in percent for a rate; empty if it is unknown."""
    if score.get("low") is None or score.get("high") is None:
        return ""
    return " to ".join(_number(score[end], rate=rate, signed=signed) for end in ("low", "high"))


def change_text(value: float, *, rate: bool) -> str:
    """Return a signed difference, in percentage points for rates."""
    return _number(value, rate=rate, signed=True) + (" pp" if rate else "")


def _number(value: float, *, rate: bool, signed: bool) -> str:
    sign = "+" if signed else ""
    text = f"{100 * value:{sign}.1f}" if rate else f"{value:{sign}.3f}"
    return text.replace("-", "\N{MINUS SIGN}")
