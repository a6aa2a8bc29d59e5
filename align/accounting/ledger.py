"""What a step has cost, in every unit that somebody pays in, and the sum of a run's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from align.accounting.energy import EnergyReading
from align.accounting.settings import AccountingSettings
from align.errors import InputError

SECONDS_PER_HOUR = 3600

ADDED = ("tokens_trained", "tokens_computed", "flops", "seconds", "wire_bytes", "energy_kwh", "co2_kg", "cost")
LARGEST = ("devices", "peak_flops", "peak_memory_bytes", "weights")  # peaks: of a run the largest of its steps
SAID = ("flops_source", "energy_source")
AND = " | "  # between the sources of a run's steps
RATIOS = ("mfu", "cost_per_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a step knows of itself; None is what it does not know."""

    tokens_trained: int  # through forward and backward, those of a shared prompt as often as they occur
    tokens_computed: int  # each distinct (prefix, token) of a group once
    flops: float | None  # of all devices
    flops_source: str  # the formula, or why none is known
    seconds: float
    devices: int
    peak_flops: float  # a second and device, measured in this process
    peak_memory_bytes: int | None  # of the device that holds most
    wire_bytes: int | None  # that one device sends
    weights: int | None  # of the model that the step trains or runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger(Usage):
    """What a step or a run has cost. Sums leave out what is not known; `unknown` says in how many steps that was."""

    energy_kwh: float | None
    energy_source: str
    energy_measured: bool  # all that is known of it, by counters in the hardware
    co2_kg: float | None
    cost: float | None
    currency: str
    flops_at_peak: float  # of all devices at their peak in the same time, where the operations are known
    steps: int
    unknown: Mapping[str, int]

    @property
    def mfu(self) -> float | None:
        """Share of the peak that the known operations reached in the time of the steps that they are known of."""
        return self.flops / self.flops_at_peak if self.flops is not None and self.flops_at_peak else None

    @property
    def cost_per_weight(self) -> float | None:
        """The known cost for each weight of the largest model."""
        return self.cost / self.weights if self.cost is not None and self.weights else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, the ratios among them."""
        return {**asdict(self), **{name: getattr(self, name) for name in RATIOS}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_json` wrote; the ratios are reckoned anew."""
        wanted = {field.name for field in fields(cls)}
        if odd := wanted.symmetric_difference(values.keys() - set(RATIOS)):
            raise InputError(
                f"a ledger has {'no ' if min(odd) in wanted else ''}{min(odd)!r}; an older version wrote it"
            )
        return cls(**{name: values[name] for name in wanted})


def entry(usage: Usage, energy: EnergyReading, settings: AccountingSettings) -> Ledger:
    """The ledger of one step."""
    device_seconds = usage.seconds * usage.devices
    price = settings.price_per_device_hour
    known: dict[str, Any] = {
        **asdict(usage),
        "energy_kwh": energy.kwh,
        "co2_kg": energy.co2_kg,
        "cost": None if price is None else price * device_seconds / SECONDS_PER_HOUR,
    }
    return Ledger(
        **known,
        energy_source=energy.source,
        energy_measured=energy.measured,
        currency=settings.currency,
        flops_at_peak=0.0 if usage.flops is None else usage.peak_flops * device_seconds,
        steps=1,
        unknown={name: 1 for name, value in known.items() if value is None},
    )


def total(ledgers: Sequence[Ledger]) -> Ledger:
    """The ledger of a run: sums of what is known, the largest of what is a peak, and ratios of sums."""
    if not ledgers:
        raise InputError("there is no ledger to add up")
    currencies = sorted({each.currency for each in ledgers})
    if len(currencies) > 1:
        raise InputError(
            f"costs in {' and '.join(currencies)} cannot be added up; accounting.currency must stay the same"
        )

    def known(name: str) -> list[Any]:
        return [value for each in ledgers if (value := getattr(each, name)) is not None]

    names = sorted({name for each in ledgers for name in each.unknown})
    values: dict[str, Any] = {name: sum(known(name)) if known(name) else None for name in ADDED}
    values |= {name: max(known(name), default=None) for name in LARGEST}
    sources = {name: [source for said in known(name) for source in said.split(AND)] for name in SAID}
    values |= {name: AND.join(dict.fromkeys(told)) for name, told in sources.items()}
    metered = [each.energy_measured for each in ledgers if each.energy_kwh is not None]
    return Ledger(
        **values,
        energy_measured=bool(metered) and all(metered),
        currency=currencies[0],
        flops_at_peak=sum(each.flops_at_peak for each in ledgers),
        steps=sum(each.steps for each in ledgers),
        unknown={name: sum(each.unknown.get(name, 0) for each in ledgers) for name in names},
    )
