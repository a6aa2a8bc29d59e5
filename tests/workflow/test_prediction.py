"""What `align check` predicts from planted ledgers equals what is computed by hand."""

import json
import re
from dataclasses import replace

import pytest
from ledgers import TRAINED
from small_runs import RECIPE, written

from align.accounting.energy import EnergyReading
from align.accounting.ledger import step_ledger
from align.accounting.settings import AccountingSettings
from align.commands.check import check
from align.models.loading.pretrained import default_device
from align.stages.costs.estimates import Estimate
from align.stages.costs.measured import matrix_rate
from align.stages.training.footprint import allocator_note
from align.workflow import prediction as module
from align.workflow.environment import environment
from align.workflow.launcher import Command
from align.workflow.prediction import Interval, earlier_ledgers, predict, total

HERE = {"host": "this", "device": "processor"}
HARDWARE = {"cpu": "processor", "cores": 4, "gpus": []}
OLDER = {"stage": "sft", "environment": HERE}
USED = replace(TRAINED, flops=1e12, seconds=100.0, devices=1, peak_memory_bytes=1000, wire_bytes=0, weights=10_000)


def ledger(kwh=None, **values):
    energy = EnergyReading(kwh=kwh, co2_kg=None, source="", measured=True)
    return step_ledger(replace(USED, **values), energy, AccountingSettings())


def plant(runs, run, step, stage, found, **environment):
    folder = runs / run / step
    folder.mkdir(parents=True)
    manifest = {"stage": stage, "environment": {**HERE, **environment}, "ledger": found.to_json()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(module.platform, "node", lambda: HERE["host"])
    monkeypatch.setattr(module, "device_name", lambda: HERE["device"])
    monkeypatch.setattr(module, "hardware", lambda: HARDWARE)


@pytest.fixture
def recipe(tmp_path):
    return Command(written(tmp_path), ("accounting.price_per_device_hour=6",)).loaded


def test_only_steps_of_this_host_and_device_are_learned_from(tmp_path, here):
    plant(tmp_path, "a", "one", "sft", ledger())
    plant(tmp_path, "a", "two", "preference", ledger(seconds=7))
    plant(tmp_path, "b", "three", "sft", ledger(seconds=200), host="other")
    plant(tmp_path, "b", "four", "sft", ledger(seconds=300), device="other")
    for name, content in (("begun.partial", {"fingerprint": None}), ("older", {"ledger": {"seconds": 5}, **OLDER})):
        (tmp_path / "c" / name).mkdir(parents=True)
        (tmp_path / "c" / name / "manifest.json").write_text(json.dumps(content))
    found = earlier_ledgers(tmp_path)
    assert {stage: [each.seconds for each in ledgers] for stage, ledgers in found.items()} == {
        "sft": [100.0],
        "preference": [7.0],
    }
    assert earlier_ledgers(tmp_path / "nothing") == {}


def test_a_container_with_another_name_learns_from_steps_of_the_same_hardware_only(tmp_path, here):
    new = {"host": "container-2", "hardware": HARDWARE}
    plant(tmp_path, "a", "one", "sft", ledger(seconds=1), **new)
    plant(tmp_path, "a", "old", "sft", ledger(seconds=2))  # without hardware: by its host
    for number, other in enumerate(({"cpu": "slow"}, {"cores": 2}, {"gpus": ["H200"]})):
        changed = {"hardware": {**HARDWARE, **other}}  # the same host and device
        plant(tmp_path, f"b{number}", "other", "sft", ledger(seconds=9), **changed)
    assert sorted(each.seconds for each in earlier_ledgers(tmp_path)["sft"]) == [1, 2]


def test_a_manifest_records_the_hardware_that_the_prediction_compares(tmp_path, monkeypatch):
    plant(tmp_path, "a", "one", "sft", ledger(), **environment())
    monkeypatch.setattr(module.platform, "node", lambda: "another container")
    assert len(earlier_ledgers(tmp_path)["sft"]) == 1
    monkeypatch.setattr(module, "hardware", lambda: {**environment()["hardware"], "gpus": ["another"]})
    assert earlier_ledgers(tmp_path) == {}


def test_a_prediction_scales_what_earlier_steps_used_for_each_of_their_flops(recipe):
    earlier = [
        ledger(kwh=0.001, flops=1e12, seconds=100),  # 100 device-seconds and 1 Wh for 1e12 FLOPs
        ledger(kwh=0.004, flops=2e12, seconds=160),  # 80 and 2 Wh
        ledger(flops=1e12, seconds=75, devices=4),  # 300, and no meter
        ledger(flops=None, seconds=9e9),
        ledger(flops=0.0, seconds=9e9),
    ]
    found = predict(recipe, Estimate(name="sft", stage="sft", rows=1, flops=3e12, weights=10_000), earlier)
    assert found.num_earlier == 3
    assert found.seconds == pytest.approx((240, 300, 900))
    assert found.money == pytest.approx((6 * 240 / 3600, 0.5, 6 * 900 / 3600))  # 6 for a device-hour
    assert found.energy_wh == pytest.approx((3, 4.5, 6))
    assert (found.wire_bytes, found.peak_memory_bytes) == ((0, 0, 0), (1000, 1000, 1000))


def test_a_prediction_is_not_learned_from_models_of_another_size_or_precision(recipe):
    alike = [ledger(weights=5_000), ledger(weights=20_000, seconds=300), ledger(peak_flops=2.9e10, seconds=500)]
    other = [ledger(weights=4_900, seconds=9e9), ledger(weights=20_100, seconds=1), ledger(peak_flops=3.1e10)]
    estimate = Estimate(name="sft", stage="sft", rows=1, flops=2e12, seconds=7.0, weights=10_000, peak_flops=1e10)
    found = predict(recipe, estimate, [*alike, *other, ledger(flops=None)])
    assert (found.num_earlier, found.num_other) == (3, 3)
    assert found.seconds == pytest.approx((200, 600, 1000))
    found = predict(recipe, estimate, other)
    assert (found.num_earlier, found.num_other, found.seconds, found.money) == (0, 3, (7, 7, 7), None)


def test_a_launched_step_divides_the_time_and_learns_the_network_from_as_many_processes(recipe, tmp_path):
    launch = tmp_path / "four.yaml"
    launch.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 4\n")
    steps = {**recipe.steps, "sft": recipe.steps["sft"].model_copy(update={"launch": str(launch)})}
    four = ledger(flops=2e12, seconds=50, devices=4, wire_bytes=600, peak_memory_bytes=700)
    estimate = Estimate(name="sft", stage="sft", rows=1, flops=1e12, weights=9_999)
    found = predict(recipe.model_copy(update={"steps": steps}), estimate, [ledger(), four])
    assert found.seconds == pytest.approx((25, 25, 25))  # 100 device-seconds in both
    assert found.money == pytest.approx([6 * 100 / 3600] * 3)
    assert (found.wire_bytes, found.peak_memory_bytes) == ((300, 300, 300), (700, 700, 700))


def test_steps_without_a_model_count_as_equally_long_and_unknown_flops_predict_nothing(recipe):
    none = [ledger(flops=0.0, seconds=seconds, weights=None) for seconds in (2, 4, 9)]
    found = predict(recipe, Estimate(name="base", stage="import", rows=0), [*none, ledger()])
    assert (found.num_earlier, found.seconds) == (3, (2, 4, 9))
    unknown = predict(recipe, Estimate(name="sft", stage="sft", rows=1, flops=None, seconds=None), [ledger()])
    assert (unknown.num_earlier, unknown.seconds, unknown.money, unknown.energy_wh) == (0, None, None, None)


def test_totals_sum_the_steps_or_take_their_maximum_and_name_what_is_unknown(recipe):
    one = predict(recipe, Estimate(name="sft", stage="sft", rows=1, flops=1e12, weights=10_000), [ledger()])
    two = replace(one, name="dpo", seconds=Interval(1, 2, 3), peak_memory_bytes=Interval(500, 1500, 2500))
    three = replace(one, name="base", seconds=None, peak_memory_bytes=None)
    assert total([one, two, three], "seconds") == ((101, 102, 103), ["base"])
    assert total([one, two, three], "peak_memory_bytes") == ((1000, 1500, 2500), ["base"])
    assert total([three], "seconds") == (None, ["base"])


def shown(capsys, path, *overrides):
    check(path, overrides)
    whole = re.sub(r" +", " ", capsys.readouterr().out).partition("whole recipe")
    return whole[0], [line.strip() for line in whole[2].splitlines()[1:]]


def test_check_shows_the_whole_recipe_and_says_where_there_is_nothing_to_learn_from(tmp_path, here, capsys):
    path = written(tmp_path, RECIPE)
    steps, lines = shown(capsys, path)
    assert steps.count("on this machine, estimated from a matrix product") == 2
    assert "rows 0" not in steps and "imbalance" not in steps and "ZeRO" not in steps
    (flops,) = re.findall(r"FLOPs (\S+)\n", steps.partition("sft sft")[2].partition("dpo")[0])
    assert [line.split()[0] for line in lines] == ["compute", "time", "peak", *["allocator"] * bool(allocator_note())]
    assert lines[1].endswith(" s, estimated from a matrix product")
    own = {"flops": float(flops), "peak_flops": matrix_rate(default_device(), "fp32")}
    for number, seconds in enumerate((60, 120)):
        plant(tmp_path / "runs", f"earlier-{number}", "a", "sft", ledger(kwh=0.5, seconds=seconds, **own))
    plant(tmp_path / "runs", "larger", "a", "preference", ledger(**own, weights=10**6))
    steps, lines = shown(capsys, path, "accounting.price_per_device_hour=2", "accounting.currency=EUR")
    source = "from 2 earlier sft step(s) of similar model size on this machine"
    assert f"time 1 min 30 s (1 min 0 s to 2 min 0 s), {source}" in steps
    other = "1 earlier preference step(s) differ in model size, precision, threads or load"
    assert f"estimated from a matrix product; {other}" in steps
    assert re.fullmatch(
        r"time 1 min 3\d s \(1 min \d s to 2 min \d s\), . s of it estimated from a matrix product", lines[1]
    )
    assert "money 0.05 EUR (0.0333 to 0.0667), without base, dpo: unknown" in lines
    assert "energy 500 Wh, without base, dpo: unknown" in lines
    assert f"learned from 2 finished step(s) of these stages on this machine, below {tmp_path / 'runs'}" in lines
