"""Prices and grid data that a recipe may set. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from align.config import Settings


class AccountingSettings(Settings):
    """Prices and the electricity grid at the site of the run; quantities without a setting are reported as unknown."""

    price_per_device_hour: float | None = Field(
        default=None, ge=0, description="Price of one device for one hour, in `currency`. Default: cost is unknown."
    )
    currency: str = Field(
        default="USD", pattern=r"^[A-Z]{3}$", examples=["EUR"], description="Currency of the price (ISO 4217)."
    )
    country: str | None = Field(
        default=None,
        pattern=r"^[A-Z]{3}$",
        examples=["DEU"],
        description="Country of the run (ISO 3166 alpha-3), whose mean grid intensity converts energy to CO2.",
    )
    grid_g_per_kwh: float | None = Field(
        default=None,
        ge=0,
        description="Grid intensity in grams of CO2-equivalent per kWh; takes precedence over `country`.",
    )
