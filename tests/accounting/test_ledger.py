import json
from dataclasses import replace

import pytest

from align.accounting.energy import EnergyReading
from align.accounting.ledger import Ledger, Usage, step_ledger, sum_ledgers
from align.accounting.settings import AccountingSettings
from align.config import build
from align.errors import InputError

SETTINGS = AccountingSettings(price_per_device_hour=3, currency="EUR")
TRAINED = Usage(
    tokens_trained=1000,
    tokens_computed=700,
    flops=6e12,
    flops_source="formula",
    seconds=1800,
    devices=4,
    peak_flops=1e10,
    peak_memory_bytes=500,
    wire_bytes=80,
    weights=2000,
)
SAMPLED = replace(TRAINED, tokens_trained=0, flops=None, flops_source="none for sampling", seconds=5400, devices=2)
METERED = EnergyReading(kwh=0.5, co2_kg=0.1, source="a counter", measured=True)
GUESSED = EnergyReading(kwh=0.25, co2_kg=None, source="a guess", measured=False)
LOST = EnergyReading(kwh=None, co2_kg=None, source="not measured: no meter", measured=False)


def test_a_step_costs_what_its_device_hours_cost_and_reaches_its_share_of_the_peak():
    step = step_ledger(TRAINED, METERED, SETTINGS)
    assert (step.cost, step.currency, step.cost_per_weight) == (2 * 3, "EUR", 6 / 2000)  # 4 devices for half an hour
    assert step.mfu == pytest.approx(6e12 / (4 * 1e10 * 1800))
    assert (step.energy_kwh, step.energy_source, step.co2_kg, step.unknown) == (0.5, "a counter", 0.1, {})


def test_a_runs_ratios_are_those_of_one_long_step():
    halves = [replace(TRAINED, flops=1e12, seconds=200), replace(TRAINED, flops=5e12, seconds=1600)]
    halves = [replace(each, tokens_trained=500, tokens_computed=350, wire_bytes=40) for each in halves]
    run = sum_ledgers([step_ledger(half, replace(METERED, kwh=0.25, co2_kg=0.05), SETTINGS) for half in halves])
    assert replace(run, steps=1) == step_ledger(TRAINED, METERED, SETTINGS)
    assert run.mfu == step_ledger(TRAINED, METERED, SETTINGS).mfu
    assert run.mfu != pytest.approx(sum(step_ledger(half, METERED, SETTINGS).mfu for half in halves) / 2)


def test_time_without_a_formula_does_not_dilute_the_share_of_the_peak():
    trained, sampled = step_ledger(TRAINED, METERED, SETTINGS), step_ledger(SAMPLED, METERED, SETTINGS)
    run = sum_ledgers([trained, sampled])
    assert (run.flops, run.mfu, sampled.mfu) == (trained.flops, trained.mfu, None)
    assert (run.seconds, run.devices, run.unknown) == (7200, 4, {"flops": 1})
    assert run.cost == trained.cost + sampled.cost == 3 * (0.5 * 4 + 1.5 * 2)
    assert run.flops_source == "formula | none for sampling"


def test_what_is_not_known_is_counted_not_added_as_nothing():
    free = AccountingSettings()
    run = sum_ledgers(
        [step_ledger(TRAINED, METERED, free), step_ledger(SAMPLED, GUESSED, free), step_ledger(SAMPLED, LOST, free)]
    )
    assert (run.energy_kwh, run.co2_kg, run.cost, run.cost_per_weight) == (0.75, 0.1, None, None)
    assert run.unknown == {"co2_kg": 2, "cost": 3, "energy_kwh": 1, "flops": 2}
    assert run.energy_source == "a counter | a guess | not measured: no meter"
    assert run.energy_measured is False
    assert sum_ledgers([step_ledger(TRAINED, METERED, free), step_ledger(TRAINED, LOST, free)]).energy_measured is True
    assert sum_ledgers([step_ledger(TRAINED, LOST, free)]).energy_measured is False


def test_peaks_are_the_largest_and_totals_can_be_totalled():
    small = replace(TRAINED, peak_memory_bytes=None, weights=900, peak_flops=5e9)
    steps = [
        step_ledger(TRAINED, METERED, SETTINGS),
        step_ledger(small, GUESSED, SETTINGS),
        step_ledger(SAMPLED, LOST, SETTINGS),
        step_ledger(replace(TRAINED, peak_memory_bytes=900), METERED, SETTINGS),
    ]
    run = sum_ledgers(steps)
    assert (run.peak_memory_bytes, run.weights, run.peak_flops, run.steps) == (900, 2000, 1e10, 4)
    assert sum_ledgers([sum_ledgers(steps[:3]), steps[3]]) == run == sum_ledgers([steps[0], sum_ledgers(steps[1:])])


@pytest.mark.parametrize("energy", [METERED, LOST])
@pytest.mark.parametrize("usage", [TRAINED, SAMPLED])
def test_a_ledger_comes_back_from_its_manifest(usage, energy):
    for ledger in [step_ledger(usage, energy, SETTINGS), sum_ledgers([step_ledger(usage, energy, SETTINGS)] * 2)]:
        written = json.loads(json.dumps(ledger.to_json(), allow_nan=False))
        assert Ledger.from_json(written) == ledger
        assert (written["mfu"], written["cost_per_weight"]) == (ledger.mfu, ledger.cost_per_weight)


def test_what_cannot_be_added_or_read_is_refused():
    with pytest.raises(InputError, match="EUR and USD"):
        sum_ledgers([step_ledger(TRAINED, METERED, SETTINGS), step_ledger(TRAINED, METERED, AccountingSettings())])
    with pytest.raises(InputError, match="no ledgers"):
        sum_ledgers([])
    written = step_ledger(TRAINED, METERED, SETTINGS).to_json()
    with pytest.raises(InputError, match="unknown field 'watts'"):
        Ledger.from_json({**written, "watts": 3})
    with pytest.raises(InputError, match="missing field 'cost'"):
        Ledger.from_json({name: value for name, value in written.items() if name != "cost"})


WRONG_SETTINGS = [
    ({"price_per_device_hour": -1}, "price_per_device_hour"),
    ({"country": "France"}, "country"),
    ({"currency": "€"}, "currency"),
    ({"grid_g_per_kwh": -3}, "grid_g_per_kwh"),
]


@pytest.mark.parametrize(("values", "said"), WRONG_SETTINGS)
def test_settings_that_cannot_be_meant_are_refused(values, said):
    with pytest.raises(InputError, match=said):
        build(AccountingSettings, values, "accounting")
