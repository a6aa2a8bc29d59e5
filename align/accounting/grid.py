"""Carbon intensity of the electricity grid."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from align.accounting.settings import AccountingSettings
from align.errors import InputError


class GridIntensity(NamedTuple):
    """CO2 per kWh, and where the value is from, in words; None if it is unknown."""

    kg_per_kwh: float | None
    source: str


def grid_intensity(settings: AccountingSettings) -> GridIntensity:
    """Return the intensity from `grid_g_per_kwh`, else codecarbon's mean of the country.

    Raises `InputError` for a country that codecarbon does not know.
    """
    if settings.grid_g_per_kwh is not None:
        return GridIntensity(settings.grid_g_per_kwh / 1000, f"CO2 at {settings.grid_g_per_kwh:g} g/kWh, as set")
    if settings.country is None:
        return GridIntensity(None, "CO2 unknown: neither country nor grid_g_per_kwh is set")
    if importlib.util.find_spec("codecarbon") is None:
        return GridIntensity(None, "CO2 unknown: codecarbon, which has the countries' means, is not installed")
    from codecarbon.core.emissions import Emissions  # noqa: PLC0415 - optional
    from codecarbon.core.units import Energy  # noqa: PLC0415 - optional
    from codecarbon.external.geography import GeoMetadata  # noqa: PLC0415 - optional
    from codecarbon.input import DataSource  # noqa: PLC0415 - optional

    source = DataSource()
    if settings.country not in source.get_global_energy_mix_data():
        raise InputError(
            f"codecarbon has no grid for {settings.country!r}; give an ISO 3166 alpha-3 code such as FRA, or set "
            "grid_g_per_kwh",
            ("accounting", "country"),
        )
    place = GeoMetadata(country_iso_code=settings.country)
    kg_per_kwh = Emissions(source).get_country_emissions(Energy.from_energy(kWh=1), place)
    return GridIntensity(kg_per_kwh, f"CO2 at {1000 * kg_per_kwh:.0f} g/kWh, codecarbon's mean of {settings.country}")
