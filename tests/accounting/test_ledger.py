import json
from dataclasses import replace

import pytest
from ledgers import TRAINED

from align.accounting.energy import EnergyReading
from align.accounting.ledger import Ledger, step_ledger, sum_ledgers
from align.accounting.settings import AccountingSettings
from align.config import build
from align.errors import InputError

SETTINGS = AccountingSettings(price_per_device_hour=3, currency="EUR")
SAMPLED = replace(TRAINED, tokens_trained=0, flops=None, flops_source="none for sampling", seconds=5400, devices=2)
MEASURED = EnergyReading(kwh=0.5, co2_kg=0.1, source="a counter", measured=True)
ESTIMATED = EnergyReading(kwh=0.25, co2_kg=None, source="an estimate", measured=False)
LOST = EnergyReading(kwh=None, co2_kg=None, source="not measured: no meter", measured=False)


def test_cost_and_mfu_of_a_step():
    step = step_ledger(TRAINED, MEASURED, SETTINGS)
    assert (step.cost, step.currency, step.cost_per_weight) == (2 * 3, "EUR", 6 / 2000)  # 4 devices for half an hour
    assert step.mfu == pytest.approx(6e12 / (4 * 1e10 * 1800))
    assert (step.energy_kwh, step.energy_source, step.co2_kg, step.unknown) == (0.5, "a counter", 0.1, {})


def test_a_runs_ratios_equal_those_of_one_long_step():
    halves = [replace(TRAINED, flops=1e12, seconds=200), replace(TRAINED, flops=5e12, seconds=1600)]
    halves = [replace(each, tokens_trained=500, tokens_computed=350, wire_bytes=40) for each in halves]
    run = sum_ledgers([step_ledger(half, replace(MEASURED, kwh=0.25, co2_kg=0.05), SETTINGS) for half in halves])
    assert replace(run, steps=1) == step_ledger(TRAINED, MEASURED, SETTINGS)
    assert run.mfu == step_ledger(TRAINED, MEASURED, SETTINGS).mfu
    assert run.mfu != pytest.approx(sum(step_ledger(half, MEASURED, SETTINGS).mfu for half in halves) / 2)


def test_steps_without_known_flops_do_not_dilute_mfu():
    trained, sampled = step_ledger(TRAINED, MEASURED, SETTINGS), step_ledger(SAMPLED, MEASURED, SETTINGS)
    run = sum_ledgers([trained, sampled])
    assert (run.flops, run.mfu, sampled.mfu) == (trained.flops, trained.mfu, None)
    assert (run.seconds, run.devices, run.unknown) == (7200, 4, {"flops": 1})
    assert run.cost == trained.cost + sampled.cost == 3 * (0.5 * 4 + 1.5 * 2)
    assert run.flops_source == "formula | none for sampling"


def test_unknown_values_are_counted_and_not_summed_as_zero():
    free = AccountingSettings()
    run = sum_ledgers(
        [step_ledger(TRAINED, MEASURED, free), step_ledger(SAMPLED, ESTIMATED, free), step_ledger(SAMPLED, LOST, free)]
    )
    assert (run.energy_kwh, run.co2_kg, run.cost, run.cost_per_weight) == (0.75, 0.1, None, None)
    assert run.unknown == {"co2_kg": 2, "cost": 3, "energy_kwh": 1, "flops": 2}
    assert run.energy_source == "a counter | an estimate | not measured: no meter"
    assert run.energy_measured is False
    assert sum_ledgers([step_ledger(TRAINED, MEASURED, free), step_ledger(TRAINED, LOST, free)]).energy_measured is True
    assert sum_ledgers([step_ledger(TRAINED, LOST, free)]).energy_measured is False


def test_the_currency_of_a_run_is_that_of_its_costs():
    free, priced = step_ledger(TRAINED, MEASURED, AccountingSettings()), step_ledger(TRAINED, MEASURED, SETTINGS)
    for ledgers in ([free, priced], [priced, free]):
        run = sum_ledgers(ledgers)
        assert (run.cost, run.currency, run.unknown) == (6, "EUR", {"cost": 1})
    assert sum_ledgers([free, free]).currency == "USD"


def test_peaks_are_maxima_and_sums_are_associative():
    small = replace(TRAINED, peak_memory_bytes=None, weights=900, peak_flops=5e9)
    steps = [
        step_ledger(TRAINED, MEASURED, SETTINGS),
        step_ledger(small, ESTIMATED, SETTINGS),
        step_ledger(SAMPLED, LOST, SETTINGS),
        step_ledger(replace(TRAINED, peak_memory_bytes=900), MEASURED, SETTINGS),
    ]
    run = sum_ledgers(steps)
    assert (run.peak_memory_bytes, run.weights, run.peak_flops, run.steps) == (900, 2000, 1e10, 4)
    assert sum_ledgers([sum_ledgers(steps[:3]), steps[3]]) == run == sum_ledgers([steps[0], sum_ledgers(steps[1:])])


@pytest.mark.parametrize("energy", [MEASURED, LOST])
@pytest.mark.parametrize("usage", [TRAINED, SAMPLED])
def test_a_ledger_round_trips_through_json(usage, energy):
    for ledger in [step_ledger(usage, energy, SETTINGS), sum_ledgers([step_ledger(usage, energy, SETTINGS)] * 2)]:
        written = json.loads(json.dumps(ledger.to_json(), allow_nan=False))
        assert Ledger.from_json(written) == ledger
        assert (written["mfu"], written["cost_per_weight"]) == (ledger.mfu, ledger.cost_per_weight)


def test_ledgers_that_cannot_be_summed_or_read_are_rejected():
    with pytest.raises(InputError, match="EUR and USD"):
        sum_ledgers(
            [step_ledger(TRAINED, MEASURED, each) for each in (SETTINGS, AccountingSettings(price_per_device_hour=2))]
        )
    with pytest.raises(InputError, match="no ledgers"):
        sum_ledgers([])
    written = step_ledger(TRAINED, MEASURED, SETTINGS).to_json()
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


@pytest.mark.parametrize(("values", "message"), WRONG_SETTINGS)
def test_invalid_settings_are_rejected(values, message):
    with pytest.raises(InputError, match=message):
        build(AccountingSettings, values, "accounting")
