"""Caps on what a whole run may use. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

from pydantic import Field

from align.accounting.ledger import SECONDS_PER_HOUR, Ledger, sum_if_known
from align.accounting.settings import AccountingSettings
from align.config import Settings
from align.errors import BUDGET

WH_PER_KWH = 1000
UNITS = {"flops": "FLOPs", "hours": "hours", "money": "", "energy_wh": "Wh"}  # of each cap; money has its currency


class BudgetSettings(Settings):
    """Caps on what the whole run may use, earlier attempts included. A run that reaches one stops at a checkpoint."""

    flops: float | None = Field(
        default=None,
        gt=0,
        description="FLOPs, computed by formula. Those of a sampling step are counted when the step is finished.",
    )
    hours: float | None = Field(
        default=None, gt=0, description="Wall-clock hours of the steps, not multiplied by the number of devices."
    )
    money: float | None = Field(
        default=None,
        gt=0,
        description="Cost in `accounting.currency`, of the devices and of servers' tokens; needs "
        "`accounting.price_per_device_hour`, which may be 0. Answers under way when the run stops are not counted.",
    )
    energy_wh: float | None = Field(
        default=None, gt=0, description="Electricity in Wh; needs a meter (NVML for GPUs, else codecarbon)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What was used of each resource that can be capped; None for what is unknown."""

    flops: float | None = 0.0
    hours: float | None = 0.0
    money: float | None = 0.0
    energy_wh: float | None = 0.0

    @classmethod
    def of(
        cls,
        accounting: AccountingSettings,
        *,
        flops: float | None,
        seconds: float,
        devices: int,
        kwh: float | None,
        server_cost: float = 0.0,
    ) -> Self:
        """Return what `seconds` on so many devices used, with the price of servers' tokens."""
        hours = seconds / SECONDS_PER_HOUR
        price = accounting.price_per_device_hour
        return cls(
            flops=flops,
            hours=hours,
            money=None if price is None else price * hours * devices + server_cost,
            energy_wh=None if kwh is None else kwh * WH_PER_KWH,
        )

    @classmethod
    def of_ledger(cls, ledger: Ledger, accounting: AccountingSettings) -> Self:
        """Return what a finished step used; a step that ran before there was a price costs the price of now."""
        used = cls.of(
            accounting,
            flops=ledger.flops,
            seconds=ledger.seconds,
            devices=ledger.devices,
            kwh=ledger.energy_kwh,
        )
        return used if ledger.cost is None else replace(used, money=ledger.cost)

    def __add__(self, other: Self) -> Self:
        """Return the sums; unknown where either of them is."""
        names = [field.name for field in fields(self)]
        return type(self)(**{name: sum_if_known([getattr(self, name), getattr(other, name)]) for name in names})


@dataclass(frozen=True, slots=True)
class Allowance:
    """The caps of a run, and what it had used before this attempt of a step."""

    budget: BudgetSettings
    accounting: AccountingSettings
    before: Spent = Spent()

    def reached(self, now: Spent) -> str | None:
        """Return which cap is reached by what this attempt has used; None if none is."""
        return reached(self.budget, self.before + now, self.accounting.currency)


def reached(budget: BudgetSettings, spent: Spent, currency: str) -> str | None:
    """Return which cap is reached, with what was spent of it; None if none is.

    >>> reached(BudgetSettings(hours=2, money=5), Spent(hours=1.5, money=5.25), "EUR")
    'budget.money (5.25 of 5 EUR spent)'
    """
    for name, unit in UNITS.items():
        cap, used = getattr(budget, name), getattr(spent, name)
        if cap is not None and used is not None and used >= cap:
            return f"{BUDGET}{name} ({used:.4g} of {cap:.4g} {unit or currency} spent)"
    return None
