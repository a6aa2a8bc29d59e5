"""What a recipe says about its costs."""

from __future__ import annotations

from pydantic import Field

from align.config import Settings


class AccountingSettings(Settings):
    """Prices and the electricity grid, as they are where the run is; what is left out is reported as not known."""

    price_per_device_hour: float | None = Field(default=None, ge=0)
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")  # ISO 4217
    country: str | None = Field(default=None, pattern=r"^[A-Z]{3}$")  # ISO 3166 alpha-3; says how clean the grid is
    grid_g_per_kwh: float | None = Field(default=None, ge=0)  # CO2-equivalent; comes before the country's mean
