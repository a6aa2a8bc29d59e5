"""The ledger of a step (tokens, FLOPs, time, memory, communication, energy, cost), and the sum over a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from align.accounting.energy import EnergyReading
from align.accounting.settings import AccountingSettings
from align.errors import InputError

SECONDS_PER_HOUR = 3600

SUMMED = ("tokens_trained", "tokens_computed", "flops", "seconds", "wire_bytes", "energy_kwh", "co2_kg", "cost")
MAXIMA = ("devices", "peak_flops", "peak_memory_bytes", "weights")  # a run has the maximum over its steps
SOURCES = ("flops_source", "energy_source")
SEPARATOR = " | "  # between the sources of a run's steps
RATIOS = ("mfu", "cost_per_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The resources that a step used; None for what is unknown."""

    tokens_trained: int  # forward and backward; a shared prompt counts once for each response
    tokens_computed: int | None  # each distinct (prefix, token) of a group counts once
    flops: float | None  # of all devices
    flops_source: str  # the formula, or why FLOPs are unknown
    seconds: float
    devices: int
    peak_flops: float  # per second and device, measured in this process
    peak_memory_bytes: int | None  # maximum over devices
    wire_bytes: int | None  # sent by each device
    weights: int | None  # number of weights of the model that the step trains or runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger(Usage):
    """The usage, energy and cost of a step or a run. Sums skip unknown values; `unknown` counts the steps with them."""

    energy_kwh: float | None
    energy_source: str
    energy_measured: bool  # all known energy comes from hardware counters
    co2_kg: float | None
    cost: float | None
    currency: str
    flops_at_peak: float  # what all devices could have computed in the time of the steps whose FLOPs are known
    steps: int
    unknown: Mapping[str, int]

    @property
    def mfu(self) -> float | None:
        """Return the model FLOPs utilization of the steps whose FLOPs are known; None if there are none.

        Chowdhery et al. 2022, sec. 4.1, with the peak measured instead of the data sheet's.
        """
        return self.flops / self.flops_at_peak if self.flops is not None and self.flops_at_peak else None

    @property
    def cost_per_weight(self) -> float | None:
        """Return the known cost divided by the number of weights of the largest model."""
        return self.cost / self.weights if self.cost is not None and self.weights else None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, including the ratios."""
        return {**asdict(self), **{name: getattr(self, name) for name in RATIOS}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `to_json` wrote; raise `InputError` if it has other fields."""
        expected = {field.name for field in fields(cls)}
        if different := expected.symmetric_difference(values.keys() - set(RATIOS)):
            name = min(different)
            problem = "missing" if name in expected else "unknown"
            raise InputError(f"the ledger was written by another version: {problem} field {name!r}")
        return cls(**{name: values[name] for name in expected})


def sum_if_known(values: Iterable[float | None]) -> float | None:
    """Return the sum of the values; None if any of them is None, which means unknown.

    >>> sum_if_known([1, 2.5]), sum_if_known([1, None])
    (3.5, None)
    """
    given = list(values)
    known = [value for value in given if value is not None]
    return sum(known) if len(known) == len(given) else None


def step_ledger(
    usage: Usage, energy: EnergyReading, settings: AccountingSettings, *, server_cost: float = 0.0
) -> Ledger:
    """Return the ledger of one step.

    Its cost is that of the devices and of servers' tokens, as far as they have a price; unknown where neither has.
    """
    device_seconds = usage.seconds * usage.devices
    price = settings.price_per_device_hour
    of_devices = None if price is None else price * device_seconds / SECONDS_PER_HOUR
    values: dict[str, Any] = {
        **asdict(usage),
        "energy_kwh": energy.kwh,
        "co2_kg": energy.co2_kg,
        "cost": server_cost + (of_devices or 0.0) if server_cost else of_devices,
    }
    return Ledger(
        **values,
        energy_source=energy.source,
        energy_measured=energy.measured,
        currency=settings.currency,
        flops_at_peak=0.0 if usage.flops is None else usage.peak_flops * device_seconds,
        steps=1,
        unknown={name: 1 for name, value in values.items() if value is None},
    )


def sum_ledgers(ledgers: Sequence[Ledger]) -> Ledger:
    """Return the ledger of a run: sums and maxima of known values, and ratios of sums.

    Raises `InputError` for an empty sequence or costs in more than one currency.
    """
    if not ledgers:
        raise InputError("there are no ledgers to sum")
    currencies = sorted({each.currency for each in ledgers if each.cost is not None}) or [ledgers[-1].currency]
    if len(currencies) > 1:
        raise InputError(
            f"costs in {' and '.join(currencies)} cannot be summed; keep accounting.currency the same for all steps"
        )

    def known(name: str) -> list[Any]:
        return [value for each in ledgers if (value := getattr(each, name)) is not None]

    names = sorted({name for each in ledgers for name in each.unknown})
    values: dict[str, Any] = {name: sum(known(name)) if known(name) else None for name in SUMMED}
    values |= {name: max(known(name), default=None) for name in MAXIMA}
    sources = {name: [source for text in known(name) for source in text.split(SEPARATOR)] for name in SOURCES}
    values |= {name: SEPARATOR.join(dict.fromkeys(found)) for name, found in sources.items()}
    measured = [each.energy_measured for each in ledgers if each.energy_kwh is not None]
    return Ledger(
        **values,
        energy_measured=bool(measured) and all(measured),
        currency=currencies[0],
        flops_at_peak=sum(each.flops_at_peak for each in ledgers),
        steps=sum(each.steps for each in ledgers),
        unknown={name: sum(each.unknown.get(name, 0) for each in ledgers) for name in names},
    )
