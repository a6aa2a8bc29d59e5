"""The settings of a trial: by its number and the seed, unless the search has drawn them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from align.workflow.search.settings import Range, SearchSettings

DIGITS = 4  # significant ones of a drawn value, so that a recipe can hold it exactly
RANDOM_BITS = 53  # of a number in [0, 1)


def point(search: SearchSettings, seed: int, trial: int) -> dict[str, Any]:
    """Return the searched settings of a trial, counted from 1, by key."""
    own = shares(search, seed, trial)
    return {key: value_at(each, share) for (key, each), share in zip(search.space.items(), own, strict=True)}


def shares(search: SearchSettings, seed: int, trial: int) -> list[float]:
    """Return the point of a trial, counted from 1, as a share of each range: what the search has drawn, if it has.

    Unless `points` is random, others are the points 0, 1, … of the Sobol sequence with Joe and Kuo's direction numbers,
    shifted modulo 1 by an amount for each key (Cranley & Patterson 1976). The dimensions are the keys in their order.
    """
    if trial <= len(search.drawn):
        return search.drawn[trial - 1]
    if search.points == "random":
        return [uniform(seed, key, trial) for key in search.space]
    own = _sobol(len(search.space), trial - 1)
    return [(share + uniform(seed, key, "shift")) % 1 for key, share in zip(search.space, own, strict=True)]


def value_at(values: Range, share: float) -> Any:  # noqa: ANN401 - a choice is any value
    """Return the value of a range below which it has this share, in [0, 1), of its probability.

    >>> value_at(Range(log=(1e-6, 1e-2)), 0.5), value_at(Range(choices=["dpo", "ipo"]), 0.5)
    (0.0001, 'ipo')
    """
    if values.choices is not None:
        return values.choices[int(share * len(values.choices))]
    bounds = values.log or values.linear
    assert bounds is not None
    low, high = bounds
    found = low * (high / low) ** share if values.log is not None else low + (high - low) * share
    if values.integer:
        return round(min(max(found, low), high))  # the bounds are whole numbers
    return min(max(float(f"{found:.{DIGITS}g}"), low), high)


def with_point(step: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a step with those at dotted keys replaced or added.

    >>> with_point({"loss": {"name": "dpo"}}, {"loss.settings.beta": 0.1})
    {'loss': {'name': 'dpo', 'settings': {'beta': 0.1}}}
    """
    found = dict(step)
    for key, value in values.items():
        name, _, below = key.partition(".")
        inner = found.get(name)
        found[name] = with_point(inner if isinstance(inner, Mapping) else {}, {below: value}) if below else value
    return found


def uniform(seed: int, *place: str | int) -> float:
    """Return a number in [0, 1) that depends on the seed and the place only."""
    digest = hashlib.sha256(repr((seed, "search", *place)).encode()).digest()
    return (int.from_bytes(digest[:8]) >> (64 - RANDOM_BITS)) / 2**RANDOM_BITS


def _sobol(dimensions: int, number: int) -> list[float]:
    """Return one point of the Sobol sequence, counted from 0, in [0, 1)."""
    import torch  # noqa: PLC0415 - recipes without a search are read without it

    engine = torch.quasirandom.SobolEngine(dimensions)
    return engine.fast_forward(number).draw(1, dtype=torch.float64)[0].tolist()
