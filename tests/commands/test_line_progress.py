"""Without a terminal, progress is a line every few seconds and a closing line for each step."""

import io
import re

import pytest
from rich.console import Console

from align.commands import progress as module
from align.commands.progress import FINISHED, RUNNING, LineProgress, TerminalProgress
from align.commands.run import shown_progress
from align.distributed.progress import RESOURCES
from align.redaction import add_secret

STEP_S = 2.0  # of the clock, for every unit


def printed(clock, *, units, every_s, total=None, held_out_at=()):
    """Return the lines of a training step of so many optimizer steps."""
    out = io.StringIO()
    shown = LineProgress(Console(file=out, width=40), every_s)
    shown.watch("sft", RUNNING)
    shown.phase("train", units if total is None else total)
    for number in range(1, units + 1):
        clock.now += STEP_S
        held_out = {"held_out/loss": 9.0 - number} if number in held_out_at else {}
        metrics = {"loss": 10.0 - number, "lr": 1e-5, "tokens_computed": 3000, "seconds": STEP_S, **held_out}
        shown.advance(1, metrics)
    shown.watch("sft", FINISHED)
    return out.getvalue().splitlines()


def test_a_line_has_step_loss_held_out_loss_learning_rate_speed_and_remaining_time(clock):
    lines = printed(clock, units=100, every_s=0, held_out_at=(1, 50))
    assert lines[1] == (
        "sft: train 2/100, loss 8.0000, held-out loss 8.0000, lr 1.00e-05, 1,500 tokens/s, ETA 3 min 16 s"
    )
    assert "held-out loss -41.0000" in lines[-2]  # the last one that is known
    assert "ETA" not in lines[99]


def test_lines_come_every_few_seconds_with_the_first_and_the_last_unit(clock):
    lines = printed(clock, units=100, every_s=10)
    numbers = [int(re.search(r"train (\d+)/100", line)[1]) for line in lines[:-1]]
    assert numbers == [1, *range(6, 100, 5), 100]


def test_the_last_line_of_a_step_says_how_long_it_took_and_where_it_ended(clock):
    lines = printed(clock, units=100, every_s=50, held_out_at=(100,))
    assert lines[-1] == (
        "sft: finished in 3 min 20 s, loss -90.0000, held-out loss -91.0000, lr 1.00e-05, 1,500 tokens/s"
    )


def test_the_remaining_time_counts_the_units_of_this_call_only(clock):
    out = io.StringIO()
    shown = LineProgress(Console(file=out), 0)
    shown.phase("sample", 100, 90)
    clock.now += 4
    shown.advance(2)
    assert out.getvalue() == "sample 92/100, ETA 16 s\n"


def test_a_phase_of_unknown_length_has_no_remaining_time(clock):
    assert printed(clock, units=2, every_s=0, total=0)[0].startswith("sft: train 1, loss")
    assert "ETA" not in printed(clock, units=2, every_s=0, total=0)[0]


def test_resources_stand_behind_the_metrics_with_a_dash_for_what_is_unknown(clock):
    assert set(module.RESOURCES) == set(RESOURCES)
    out = io.StringIO()
    shown = LineProgress(Console(file=out), 0)
    shown.watch("sft", RUNNING)
    shown.phase("train", 2)
    used = {"mfu": 0.3125, "peak_memory_bytes": 3 * 2**29, "energy_wh": 1234.5}
    shown.advance(1, {"loss": 1.0, "tokens_computed": 3000, "seconds": 2.0, **used})
    shown.advance(1, {"loss": 0.5, "tokens_computed": 4000, "seconds": 2.0})  # not read again
    shown.watch("sft", FINISHED)
    shown.watch("score", RUNNING)
    shown.phase("judge", 1)
    shown.advance(0)
    shown.advance(1, {"requests_per_s": 2.0, "money": 0.0})
    behind = "MFU 31.2%, peak memory 1.50 GiB, energy 1,234 Wh, cost so far –"
    assert out.getvalue().splitlines() == [
        f"sft: train 1/2, loss 1.0000, 1,500 tokens/s, {behind}, ETA 0 s",
        f"sft: train 2/2, loss 0.5000, 2,000 tokens/s, {behind}",
        f"sft: finished in 0 s, loss 0.5000, 2,000 tokens/s, {behind}",
        "score: judge 0/1, ETA 0 s",
        "score: judge 1/1, requests/s 2.0, MFU –, peak memory –, energy –, cost so far 0",
    ]


def test_the_terminal_shows_the_resources_below_the_bar():
    out = io.StringIO()
    shown = TerminalProgress(Console(file=out, width=120))
    shown.watch("sft", RUNNING)
    shown.phase("train", 2)
    shown.advance(1, {"loss": 1.0, "peak_memory_bytes": 2**30})
    shown.advance(1, {"loss": 1.0, "money": 0.25})
    shown.console.print(shown.live.get_renderable())
    *_, last = out.getvalue().splitlines()
    assert last.rstrip() == "MFU –  peak memory 1.00 GiB  energy –  cost so far 0.25"
    assert out.getvalue().count("loss 1.0000") == 2  # in the table and beside the bar


@pytest.mark.parametrize("display", [LineProgress, TerminalProgress])
@pytest.mark.parametrize(("currency", "expected"), [("", ("0.2500", "3")), ("EUR", ("0.2500 EUR", "3 EUR"))])
def test_a_cost_has_its_currency_where_it_is_known(display, currency, expected):
    out = io.StringIO()
    shown = display(Console(file=out, width=200), currency=currency)
    shown.watch("generate", RUNNING)
    shown.phase("sample", 2)
    shown.advance(1, {"cost": 0.25, "money": 3.0})
    if display is TerminalProgress:
        shown.console.print(shown.live.get_renderable())
    found = re.findall(r"(cost|cost so far) ([0-9.]+(?: [A-Z]{3})?)", out.getvalue())
    assert set(found) == set(zip(("cost", "cost so far"), expected, strict=True))


@pytest.mark.parametrize("display", [LineProgress, TerminalProgress])
def test_a_note_shows_no_secret_and_cannot_control_the_terminal(monkeypatch, display):
    monkeypatch.setattr("align.redaction._secrets", {})
    add_secret("tok-4711-0815")
    out = io.StringIO()
    display(Console(file=out)).note("\x1b[2Jserver: tok-4711-0815 is wrong\x1b]0;owned\x07")
    assert out.getvalue() == "server: *** is wrong\n"


def test_a_terminal_shows_a_bar_and_a_file_shows_lines(monkeypatch):
    assert isinstance(shown_progress(), LineProgress)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(shown_progress("EUR"), TerminalProgress)
    assert shown_progress("EUR").currency == "EUR"
