"""A cap on the resources of a run stops it at a checkpoint, counts earlier attempts, and changes no number."""

import shutil
import sys
import time
from itertools import count

import pytest
from chat_server import serving
from forked import start_forked
from launching import LAUNCH, finish
from ledgers import TRAINED
from safetensors.torch import load_file
from small_runs import RECIPE, ROOT, SMALL_POLICY, metrics, run, written
from tiny_training import NOT_NUMBERS, same

from align.accounting import energy
from align.accounting.budget import Allowance, BudgetSettings, Spent, reached
from align.accounting.counters import NoCounter
from align.accounting.energy import EnergyReading
from align.accounting.ledger import step_ledger
from align.accounting.process_usage import ServersAndJudges
from align.accounting.settings import AccountingSettings
from align.artifacts import discard_attempt, read_json, write_json
from align.cli import main
from align.commands.check import check
from align.distributed.progress import SilentProgress
from align.distributed.signals import defer_stop
from align.errors import InputError, Stopped
from align.stages.costs import meter as module
from align.stages.costs.measured import Done
from align.stages.costs.meter import Meter, ProcessUse, spent_unfinished
from align.workflow.launcher import Command
from align.workflow.spending import allowance, energy_meter

PRICE = AccountingSettings(price_per_device_hour=36, currency="EUR")  # 0.01 EUR in a second


class Energy:
    """A meter that reads what a test says."""

    kwh = 0.0

    @property
    def reading(self):
        return EnergyReading(kwh=self.kwh, co2_kg=None, source="a test", measured=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run without caps, and its manifests."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)[0]


def numbers(folder, step):
    return [{name: value for name, value in line.items() if name not in NOT_NUMBERS} for line in metrics(folder, step)]


def weights(folder, step):
    return load_file(folder / "runs/small" / step / "model.safetensors")


def test_a_run_stopped_at_two_caps_equals_an_uninterrupted_one(tmp_path, whole):
    reference, made = whole
    flops = {name: manifest["ledger"]["flops"] for name, manifest in made.items()}
    # More than half of the 6 optimizer steps of sft, which have about equally many tokens, and of the 3 of dpo
    for cap, step, done in (
        (0.55 * flops["sft"], "sft", "4 of 6"),
        (flops["sft"] + 0.55 * flops["dpo"], "dpo", "2 of 3"),
    ):
        for attempt in ("stops", "stops at once"):
            with pytest.raises(Stopped, match=r"stopped by budget\.flops .* raise budget\.flops and rerun") as stopped:
                run(tmp_path, f"budget.flops={cap}")
            assert stopped.value.exit_status == 3
            assert (f"saved a checkpoint after step {done}" in str(stopped.value)) == (attempt == "stops")
            assert [each.name for each in (tmp_path / f"runs/small/{step}.partial").glob("checkpoint-*")] == [
                f"checkpoint-{done[0]}"
            ]
    continued, _ = run(tmp_path)
    for name in ("sft", "dpo"):
        assert continued[name]["ledger"]["flops"] == flops[name]
        assert continued[name]["attempts"] == 2  # the attempt that stops at once does not begin
        assert numbers(tmp_path, name) == numbers(reference, name)
        assert same(weights(tmp_path, name), weights(reference, name))


def test_a_cap_that_the_run_does_not_reach_changes_nothing(tmp_path, whole):
    caps = ("budget.hours=1", "budget.flops=1e15", "budget.money=5", "accounting.price_per_device_hour=1")
    run(tmp_path, *caps)
    assert same(weights(tmp_path, "dpo"), weights(whole[0], "dpo"))


def test_finished_steps_count_and_the_cap_may_lie_before_a_step(tmp_path, whole):
    hours = run(tmp_path, until="base")[0]["base"]["ledger"]["seconds"] / 3600
    with pytest.raises(Stopped) as stopped:
        run(tmp_path, f"budget.hours={hours}")
    said = f"stopped by budget.hours ({hours:.4g} of {hours:.4g} hours spent); raise budget.hours and rerun"
    assert str(stopped.value).startswith(said)
    assert not (tmp_path / "runs/small/sft.partial/metrics.jsonl").exists()


def test_an_attempt_stops_between_two_items_once_money_is_spent_and_keeps_what_it_used(tmp_path, clock):
    allowed = Allowance(BudgetSettings(money=1.5), PRICE, Spent(money=1.0))
    meter = Meter(tmp_path, SilentProgress(), Energy(), allowed)
    with pytest.raises(Stopped, match=r"budget\.money \(1\.5 of 1\.5 EUR spent\); raise budget\.money"), meter:
        for number in range(10):
            clock.now = 100.0 + 10 * number
            meter.advance(1)
    assert number == 5  # 50 s
    clock.now = 0.0
    assert spent_unfinished(tmp_path, PRICE) == Spent(flops=0, hours=50 / 3600, money=0.5, energy_wh=0)
    assert Meter(tmp_path, SilentProgress(), Energy(), allowed).attempts == 2


def test_in_a_training_step_the_cap_asks_to_stop_and_does_not_raise(tmp_path, clock):
    used = Energy()
    meter = Meter(tmp_path, SilentProgress(), used, Allowance(BudgetSettings(energy_wh=3), PRICE, Spent(energy_wh=1)))
    with defer_stop() as stop:
        meter.advance(1, {"flops": 7.0})
        assert not stop.requested
        used.kwh, clock.now = 0.002, 102.0
        meter.advance(1, {"flops": 8.0})
    assert stop.by == "budget.energy_wh (3 of 3 Wh spent)"
    with meter:
        pass
    assert spent_unfinished(tmp_path, PRICE) == Spent(flops=15, hours=2 / 3600, money=0.02, energy_wh=2)


def test_the_display_is_told_what_the_run_has_used_and_nothing_of_what_is_unknown(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(module, "peak_memory", lambda device: 77)
    seen, used = [], Energy()

    class Told(SilentProgress):
        def advance(self, units, metrics=None):
            seen.append(metrics)

    allowed = Allowance(BudgetSettings(), PRICE, Spent(money=2.0, energy_wh=1.0))
    meter = Meter(tmp_path, Told(), used, allowed, peak_flops=1e3)
    used.kwh, clock.now = 0.5, 200.0
    meter.advance(1, {"flops": 900.0, "timed_flops": 600.0, "seconds": 2.0})
    meter.advance(1)
    used.kwh, clock.now = None, 300.0
    meter.advance(1, {"requests_per_s": 5.0})
    of_run = {"peak_memory_bytes": 77, "money": 3.0, "energy_wh": 501.0}
    assert seen[0] == {"flops": 900.0, "timed_flops": 600.0, "seconds": 2.0, "mfu": 0.3, **of_run}
    assert seen[1:] == [None, {"requests_per_s": 5.0, "peak_memory_bytes": 77, "money": 4.0}]


def test_what_an_attempt_has_used_outlasts_a_step_that_starts_anew(tmp_path, clock):
    for attempt in (1, 2, 3):
        meter = Meter(tmp_path, SilentProgress(), Energy(), Allowance(BudgetSettings(), PRICE))
        assert meter.attempts == attempt
        (tmp_path / "model.safetensors").touch()
        discard_attempt(tmp_path)
        with meter:
            clock.now += 10
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"spent-{attempt}.json" for attempt in (1, 2, 3)]
    assert spent_unfinished(tmp_path, PRICE).hours == pytest.approx(30 / 3600)


def test_the_peak_memory_of_a_step_is_the_largest_of_its_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "matrix_rate", lambda device, precision: 1e9)
    peaks = []
    for peak in (500, 900, 70):  # the last attempt only saves the model
        monkeypatch.setattr(module, "peak_memory", lambda device, peak=peak: peak)
        meter = Meter(tmp_path, SilentProgress(), Energy(), Allowance(BudgetSettings(), PRICE))
        with meter:
            peaks.append(meter.ledger(Done(), PRICE).peak_memory_bytes)
    assert peaks == [500, 900, 900]
    spent = read_json(tmp_path / "spent-1.json")  # as an earlier version has written it
    del spent["peak_memory_bytes"]
    write_json(tmp_path / "spent-1.json", spent)
    last = Meter(tmp_path, SilentProgress(), Energy(), Allowance(BudgetSettings(), PRICE))
    assert last.ledger(Done(), PRICE).peak_memory_bytes == 900
    last.add_elsewhere([ProcessUse(ServersAndJudges(), peak) for peak in (800, 1100)])  # of other processes
    assert last.ledger(Done(), PRICE).peak_memory_bytes == 1100


def test_the_work_of_judges_on_servers_is_unknown_and_not_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "matrix_rate", lambda device, precision: 1e9)
    meter = Meter(tmp_path, SilentProgress(), Energy(), Allowance(BudgetSettings(), PRICE))
    none = meter.ledger(Done(), PRICE)
    assert (none.flops, none.tokens_computed) == (0, 0)
    meter.add_elsewhere([ProcessUse(ServersAndJudges(served_answers=3), 0)])
    scored = meter.ledger(Done(), PRICE)
    assert (scored.flops, scored.unknown["flops"]) == (None, 1)
    assert (scored.tokens_computed, scored.unknown["tokens_computed"]) == (None, 1)
    meter.add_elsewhere([ProcessUse(ServersAndJudges(judge_tokens=2, judge_flops=7.0), 0)])  # of another judge
    both = meter.ledger(Done(), PRICE)
    assert both.flops == 7 and both.flops_source.endswith("; without judges on servers, whose FLOPs are unknown")
    assert both.tokens_computed == 2
    sampled = meter.ledger(Done.elsewhere(devices=1), PRICE)  # and judged by both
    assert (sampled.flops, sampled.tokens_computed) == (None, None)


@pytest.mark.parametrize(("machines", "is_known"), [(1, True), (2, False)])
def test_the_energy_of_a_launch_over_several_machines_is_unknown(tmp_path, monkeypatch, machines, is_known):
    class Counter(NoCounter):
        def kwh(self):
            return 1.0

    monkeypatch.setattr(energy, "machine_counter", lambda: Counter("a counter"))
    monkeypatch.setattr(energy, "gpu_counter", lambda gpus: Counter("a counter"))
    monkeypatch.setenv("WORLD_SIZE", str(4 * machines))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with energy_meter(Command(written(tmp_path)).loaded) as meter:
        assert (meter.reading.kwh == 1) == is_known
        if not is_known:
            why = "not measured: the step ran on several machines, and only the first one has a meter"
            assert (meter.reading.kwh, meter.reading.source, meter.reading.measured) == (None, why, False)


def test_what_was_used_for_steps_that_run_again_or_were_removed_counts(tmp_path):
    def used(*overrides):
        return allowance(Command(written(tmp_path), overrides).loaded).before

    first = {name: made["ledger"] for name, made in run(tmp_path)[0].items()}
    whole = sum(each["flops"] for each in first.values())
    assert used().flops == whole
    (tmp_path / "runs/small/sft").rename(tmp_path / "runs/small/kept")
    assert used().flops == whole
    shutil.rmtree(tmp_path / "runs/small/kept")  # by hand
    assert used().flops == whole
    restored = run(tmp_path, until="sft")[0]["sft"]["ledger"]
    whole, first["restored"] = whole + restored["flops"], restored
    assert used().flops == whole
    other = "steps.sft.train.learning_rate=2e-3"
    again = run(tmp_path, other, until="sft")[0]["sft"]["ledger"]
    assert used(other).flops == whole + again["flops"]
    assert used(other).hours == pytest.approx(sum(each["seconds"] for each in (*first.values(), again)) / 3600)
    # An attempt that is abandoned for other settings counts, too
    third = "steps.sft.train.learning_rate=3e-3"
    cap = f"budget.flops={whole + 1.5 * again['flops']}"
    with pytest.raises(Stopped):
        run(tmp_path, third, cap, until="sft")
    spent = used(third)
    assert spent.flops >= whole + 1.5 * again["flops"]
    with pytest.raises(Stopped):
        run(tmp_path, "steps.sft.train.learning_rate=4e-3", cap, until="sft")
    assert used(third).flops == spent.flops


def test_what_was_used_for_steps_that_were_renamed_counts(tmp_path):
    recipe = Command(written(tmp_path)).loaded
    ledger = step_ledger(TRAINED, Energy().reading, AccountingSettings())
    attempt = {"flops": 5.0, "seconds": 90.0, "devices": 2, "kwh": None}
    for folder, name, content in (
        ("older", "manifest.json", {"stage": "sft", "ledger": ledger.to_json()}),
        ("begun.partial", "spent-1.json", attempt),
        ("references", "manifest.json", {}),
    ):
        (recipe.root / folder).mkdir(parents=True)
        write_json(recipe.root / folder / name, content)
    before = allowance(recipe).before
    assert (before.flops, before.hours) == (TRAINED.flops + 5, pytest.approx((1800 + 90) / 3600))


def test_a_price_may_be_set_later_and_its_currency_does_not_change(tmp_path):
    euros = ("accounting.price_per_device_hour=36", "accounting.currency=EUR")
    run(tmp_path, until="base")
    made, _ = run(tmp_path, *euros, until="sft")
    assert made["base"]["ledger"]["cost"] is None
    total = read_json(tmp_path / "runs/small/ledger.json")["total"]
    assert (total["cost"], total["currency"]) == (made["sft"]["ledger"]["cost"], "EUR")
    with pytest.raises(InputError) as refused:
        run(tmp_path, "accounting.price_per_device_hour=36")
    (error,) = refused.value.parts
    assert error.loc == ("accounting", "currency")
    assert str(error).endswith("step 'sft' has a cost in EUR; keep EUR, or start another run")
    assert not (tmp_path / "runs/small/dpo").exists()


def test_unknown_values_stay_unknown_in_sums_and_reach_no_cap():
    one, other = Spent(hours=1, flops=None), Spent(hours=2, money=None, energy_wh=4)
    assert one + other == Spent(hours=3, flops=None, money=None, energy_wh=4)
    assert reached(BudgetSettings(flops=1, money=1), one + other, "USD") is None


MESSAGES = {
    "money": ("budget.money=1", "budget.money: the cost of a run is unknown without a price"),
    "energy": ("budget.energy_wh=1", "budget.energy_wh: the energy of a run cannot be capped here: not measured: none"),
    "FLOPs": ("budget.flops=1", "budget.flops: the FLOPs of step 'base' cannot be capped: the model's configuration"),
    "zero": ("budget.hours=0", "budget.hours: Input should be greater than 0 (got 0)"),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_a_cap_on_what_cannot_be_measured_is_refused_in_one_line(tmp_path, monkeypatch, what):
    override, message = MESSAGES[what]
    monkeypatch.setattr(energy, "machine_counter", lambda: NoCounter("none"))
    text = RECIPE
    if what == "FLOPs":
        text = text.replace("model_type: llama", "model_type: mamba").replace("intermediate_size: 32, ", "")
        text = text.replace("num_attention_heads: 2, max_position_embeddings: 256, ", "")
    with pytest.raises(InputError) as refused:
        check(written(tmp_path, text), (override,))
    (error,) = refused.value.parts
    assert message in str(error) and "\n" not in str(error)


def test_energy_that_an_earlier_step_did_not_measure_is_not_taken_for_none(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(energy, "machine_counter", lambda: NoCounter("none"))
        run(tmp_path, until="base")
    with pytest.raises(InputError, match="step 'base' ran without a measurement of it"):
        run(tmp_path, "budget.energy_wh=1000")


def test_a_cap_is_not_part_of_what_a_step_is(tmp_path):
    path = written(tmp_path)
    keys = [[step.key for step in Command(path, caps).loaded.pipeline()] for caps in ((), ("budget.hours=1",))]
    assert keys[0] == keys[1]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_launches")
def test_two_processes_stop_together_and_continue_with_the_same_numbers(tmp_path, whole, monkeypatch, capsys):
    launch = "steps.sft.launch=launch/ddp-cpu-2.yaml"
    flops = whole[1]["sft"]["ledger"]["flops"]
    cap = f"budget.flops={0.55 * flops}"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["align", "run", str(written(tmp_path)), "--until", "sft", launch, cap])
        main()
    assert ended.value.code == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("align: sft: stopped by budget.flops (") and "checkpoint after step 4 of 6; raise" in said
    log = (tmp_path / "runs/small/sft.partial/launch.log").read_text()
    assert log.count("saved a checkpoint after step 4 of 6") == 2  # both processes
    straight = tmp_path / "straight"
    run(straight, until="base")
    for folder in (tmp_path, straight):
        train = ("train", folder / "small.yaml", "--step", "sft")
        launched = start_forked(LAUNCH / "ddp-cpu-2.yaml", "--main_process_port", "0", "-m", "align", *train)
        _, errors = finish(launched)
        assert launched.returncode == 0, errors[-3000:]
        assert ("resumed after step 4 of 6" in errors) == (folder == tmp_path)
    assert same(weights(tmp_path, "sft"), weights(straight, "sft"))


PAID = (
    SMALL_POLICY
    + """\
data:
  shown: {{path: "tasks:general"}}
steps:
  base: {{stage: import, vocab_size: 300}}
  samples:
    stage: generate
    data: shown
    models: [org/teacher]
    prompts: {{shown: 12}}
    sampling: {{num_responses: 2, max_new_tokens: 8}}
    engine: &paid
      server: {{base_url: URL, concurrency: 4, price: {{prompt: 100, response: 1000}}}}
    judges: [{{name: llm, settings: {{model: org/judge, mode: rating, engine: *paid}}}}]
"""
)
ANSWER = 10 * 100e-6 + 2 * 1000e-6  # of 10 tokens of a prompt and 2 of a response


NUMBERS = count()


def rated(handler):
    """An answer that judges give, too: one rating after the other."""
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    message = {"content": f"[[{next(NUMBERS) % 5 + 1}]]"}  # of simultaneous requests, too, each has another one
    handler.say(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})


@pytest.mark.parametrize("overrides", [[], ["accounting.price_per_device_hour=3.6"]])
def test_the_ledger_and_the_budget_have_the_price_of_servers_tokens(tmp_path, overrides):
    with serving(always=rated) as server:
        made, _ = run(tmp_path, *overrides, text=PAID.replace("URL", server.url))
    number, ledger = len(server.requests), made["samples"]["ledger"]
    assert 36 < number <= 2 * 12 * 2  # each response and its rating, equal ones of a prompt once
    assert ledger["cost"] == pytest.approx(number * ANSWER + 0.001 * ledger["seconds"] * bool(overrides))
    assert made["base"]["ledger"]["cost"] == (
        pytest.approx(0.001 * made["base"]["ledger"]["seconds"]) if overrides else None
    )


def test_what_a_replaced_step_has_paid_to_servers_stays_in_the_budget(tmp_path):
    free = "accounting.price_per_device_hour=0"
    with serving(always=rated) as server:
        text = PAID.replace("URL", server.url)
        run(tmp_path, free, text=text)
        run(tmp_path, free, "steps.samples.sampling.seed=1", text=text)
        command = Command(written(tmp_path, text), (free,))
        assert allowance(command.loaded).before.money == pytest.approx(len(server.requests) * ANSWER)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("forked_launches")
def test_all_processes_of_a_launch_pay(tmp_path):
    with serving(always=rated) as server:
        made, _ = run(tmp_path, "steps.samples.launch=launch/ddp-cpu-2.yaml", text=PAID.replace("URL", server.url))
        assert made["samples"]["ledger"]["cost"] == pytest.approx(len(server.requests) * ANSWER)


def test_a_cap_on_money_ends_the_requests_and_a_rerun_counts_them(tmp_path):
    caps = ["accounting.price_per_device_hour=0", f"budget.money={10.5 * ANSWER}"]

    def slowly(handler):
        time.sleep(0.2)
        rated(handler)

    with serving(always=slowly) as server:
        text = PAID.replace("URL", server.url)
        with pytest.raises(Stopped, match=r"budget\.money \(0\.0\d+ of 0\.0315 USD spent\)"):
            run(tmp_path, *caps, text=text)
        before = len(server.requests)
        assert 11 <= before < 24  # not all responses, and no rating
        with pytest.raises((Stopped, InputError), match=r"budget\.money"):
            run(tmp_path, *caps, text=text)
        made, _ = run(tmp_path, caps[0], text=text)
    paid = round(made["samples"]["ledger"]["cost"] / ANSWER)
    assert len(server.requests) - 8 <= paid <= len(server.requests)  # all but those under way at a stop
    assert paid > before
