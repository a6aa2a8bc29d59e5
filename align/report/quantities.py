"""Numbers as people read them; what is not known is said to be unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

UNKNOWN = "unknown"
RATE, NATS, PLAIN = "rate", "nats", "plain"  # units of a score
THOUSANDS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
MINUTE, HOUR, DAY = 60, 3600, 86400


def plain(value: float | None) -> str:
    """Four significant digits."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"


def fixed(value: float) -> str:
    """Three decimals, or three digits of what is too small or too large for that."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def scaled(value: float | None, unit: str = "") -> str:
    """Three significant digits and a decimal prefix, `1.23 M`."""
    if value is None:
        return UNKNOWN
    power = 0
    while abs(value) >= 999.5 and power < len(THOUSANDS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {THOUSANDS[power]}{unit}".strip()


def size(value: float | None) -> str:
    """Bytes with a binary unit."""
    if value is None:
        return UNKNOWN
    power = 0
    while abs(value) >= 1023.5 and power < len(BINARY) - 1:
        value, power = value / 1024, power + 1
    return f"{value:.3g} {BINARY[power]}"


def duration(seconds: float | None) -> str:
    """The two largest of days, hours, minutes and seconds."""
    if seconds is None:
        return UNKNOWN
    if seconds < MINUTE:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    parts = {"d": whole // DAY, "h": whole % DAY // HOUR, "min": whole % HOUR // MINUTE, "s": whole % MINUTE}
    told = [f"{number} {unit}" for unit, number in parts.items() if number]
    return " ".join(told[:2])


def share(value: float | None) -> str:
    """A share in [0, 1] as per cent."""
    if value is None:
        return UNKNOWN
    return f"{value:.1%}" if value == 0 or abs(value) >= 0.001 else f"{100 * value:.2g}%"


def score_text(value: float, *, rate: bool) -> str:
    """A rate as per cent, anything else with three decimals."""
    return f"{value:.1%}" if rate else f"{value:.3f}"


def interval_text(score: Mapping[str, Any], *, rate: bool, signed: bool = False) -> str:
    """`69.0 to 77.5`, of a rate in per cent; empty where the interval is not known."""
    if score.get("low") is None or score.get("high") is None:
        return ""
    return " to ".join(_bare(score[end], rate=rate, signed=signed) for end in ("low", "high"))


def change_text(value: float, *, rate: bool) -> str:
    """A difference with its sign; of rates in percentage points."""
    return _bare(value, rate=rate, signed=True) + (" pp" if rate else "")


def _bare(value: float, *, rate: bool, signed: bool) -> str:
    sign = "+" if signed else ""
    text = f"{100 * value:{sign}.1f}" if rate else f"{value:{sign}.3f}"
    return text.replace("-", "\N{MINUS SIGN}")
