import linecache
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress

import psutil
import pytest
import typer
from small_runs import ROOT, written
from tiny_training import Recorder, comparisons, loop, numbers, preference, same, weights

from align.commands.console import exit_status
from align.commands.console.exit_status import Commands, exit_with
from align.distributed.signals import Terminated, defer_stop, raise_on_sigterm
from align.errors import CTRL_C, SIGTERM, RunError, Stopped


class Told(Recorder):
    """A reporter that has signals sent to the process after some step."""

    def __init__(self, *signals):
        super().__init__()
        self.signals = signals

    def advance(self, units, metrics=None):
        super().advance(units, metrics)
        if metrics is not None and metrics["step"] == 3:
            for number in self.signals:
                os.kill(os.getpid(), number)


STOPS = {"twice SIGTERM": (SIGTERM, [signal.SIGTERM] * 2), "Ctrl-C": (CTRL_C, [signal.SIGINT])}


def made(folder, report, steps=6, **changes):
    train = comparisons(12)
    return loop(folder, preference("rpo_bwd_kl", beta=0.1), train, progress=report, epochs=steps / 2, **changes)


@pytest.mark.parametrize("what", STOPS)
@pytest.mark.parametrize("steps", [6, 3])
def test_a_run_that_is_told_to_stop_keeps_its_step_and_goes_on_bit_for_bit(tmp_path, steps, what):
    by, signals = STOPS[what]
    undisturbed = made(tmp_path / "undisturbed", Recorder(), steps)
    undisturbed.run()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    told = Told(*signals)
    with pytest.raises(
        Stopped, match=f"{by}: saved a checkpoint after step 3 of {steps}; rerun the same command"
    ) as end:
        made(tmp_path / "told", told, steps).run()
    assert isinstance(end.value, RunError) and end.value.by == by
    assert [note for note in told.notes if "Ctrl-C again" in note] == [told.notes[-1]] * (by == CTRL_C)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    again = made(tmp_path / "told", Recorder(), steps)
    again.run()
    assert f"resumed after step 3 of {steps}" in again.progress.notes
    assert numbers(tmp_path / "told") == numbers(tmp_path / "undisturbed")
    assert same(weights(again.policy), weights(undisturbed.policy))


@pytest.mark.parametrize(("every", "note"), [(2, "after its checkpoint of step 2 of 6"), (None, "from its start")])
def test_a_second_ctrl_c_ends_at_once_and_names_the_checkpoint(tmp_path, every, note):
    with pytest.raises(KeyboardInterrupt) as ended:
        made(tmp_path, Told(signal.SIGINT, signal.SIGINT), checkpoint_steps=every).run()
    assert ended.value.__notes__ == [note]


def test_a_process_of_a_launch_leaves_the_second_ctrl_c_to_its_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with defer_stop() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.by == CTRL_C


def test_sigterm_that_nothing_defers_interrupts_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), raise_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_whose_exception_python_discards_is_not_lost(number, raised):
    class Ends:
        def __del__(self):
            os.kill(os.getpid(), number)

    with pytest.raises(raised), raise_on_sigterm():
        Ends()
        time.sleep(100)


@pytest.mark.parametrize("fails", [True, False])
def test_sigterm_does_not_hide_the_failure_that_is_ending_a_process(monkeypatch, capsys, fails):
    """A launcher ends the process that is about to say that another one has died."""
    app = typer.Typer(cls=Commands)

    @app.command()
    def train():
        try:
            if fails:
                raise RunError("process 1 has died")
        finally:
            with nullcontext():  # as of what is closed on the way
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)

    @app.command()
    def other(): ...

    monkeypatch.setattr(sys, "argv", ["align", "train"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(exit_status, "end", sys.exit)
        exit_with(app)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("align: process 1 has died" if fails else "align: stopped by SIGTERM; rerun"), said


def test_sigterm_at_any_line_of_an_ending_does_not_hide_the_failure(monkeypatch, capsys):
    app = typer.Typer(cls=Commands)
    left = [0]  # lines until the signal

    def trace(frame, event, arg):
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event != "line" or sys.exception() is None or line.startswith("except"):  # where no signal is handled
            return trace
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return trace

    @app.command()
    def train():
        try:
            raise RunError("process 1 has died")
        finally:
            frame = sys._getframe()
            sys.settrace(trace)
            while frame is not outermost:
                frame.f_trace, frame = trace, frame.f_back

    @app.command()
    def other(): ...

    outermost = sys._getframe()
    monkeypatch.setattr(sys, "argv", ["align", "train"])
    monkeypatch.setattr(exit_status, "end", sys.exit)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # what is in force again afterwards
    try:
        for line in range(1, 10_000):
            left[0] = line
            with pytest.raises(SystemExit) as ended:
                exit_with(app)
            sys.settrace(None)
            said = capsys.readouterr().err.split("\n")
            assert (ended.value.code, said[-2]) == (1, "align: process 1 has died"), line
            if left[0] > 0:
                break
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGTERM, before)
    assert line > 20


def test_outside_of_the_main_thread_the_signals_are_left_as_they_are():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def elsewhere():
        with defer_stop() as stop, raise_on_sigterm():
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def interrupted(folder, until, signals, *overrides):
    """The exit status and the last line of a run that is sent signals once `until` is true.

    Between two signals it cannot end, because the processes that train have been stopped.
    """
    command = [sys.executable, "-m", "align", "run", str(written(folder)), *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    # A shell's background job, as a test may be, is born with Ctrl-C ignored
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with (folder / "said").open("w") as said:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=said, stdout=subprocess.DEVNULL, preexec_fn=restore
        )
        deadline = time.monotonic() + 600
        while not until():
            assert child.poll() is None and time.monotonic() < deadline, (folder / "said").read_text()
            time.sleep(0.02)
        if len(signals) > 1:
            for each in psutil.Process(child.pid).children(recursive=True):
                if each.ppid() != child.pid:  # the launcher's
                    each.suspend()
        for number in signals[:-1]:
            child.send_signal(number)
            while "press Ctrl-C again" not in (folder / "said").read_text():
                assert child.poll() is None and time.monotonic() < deadline, (folder / "said").read_text()
                time.sleep(0.02)
        child.send_signal(signals[-1])
        status = child.wait(timeout=300)
    return status, (folder / "said").read_text().splitlines()[-1]


def cmdline(process):
    """The words of a process; of one that has ended, none."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def steps_taken(folder):
    file = folder / "runs/small/sft.partial/metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


LONG = ("steps.sft.train.epochs=40000", "--until", "sft")


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves_the_step_and_says_where_a_rerun_resumes(tmp_path):
    status, last = interrupted(tmp_path, lambda: steps_taken(tmp_path) > 2, [signal.SIGINT], *LONG)
    told = re.fullmatch(r"align: .*stopped by Ctrl-C: saved a checkpoint after step (\d+) of 240000; rerun .*", last)
    assert told and status == 130, (status, last)
    assert (tmp_path / f"runs/small/sft.partial/checkpoint-{told[1]}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 1, "SIGTERM")]
)
def test_a_signal_before_the_training_loop_says_at_which_step_a_rerun_resumes(tmp_path, number, status, said):
    begun = tmp_path / "runs/small/base.partial/manifest.json"
    ended, last = interrupted(tmp_path, begun.is_file, [number])
    assert (ended, last.count("\n")) == (status, 0)
    assert said in last and "a rerun of the same command resumes at step 'base'" in last


@pytest.mark.slow
@pytest.mark.distributed
def test_ctrl_c_reaches_the_processes_of_a_launched_step_through_the_pipeline_alone(tmp_path):
    launch = "steps.sft.launch=launch/ddp-cpu-2.yaml"
    status, last = interrupted(tmp_path, lambda: steps_taken(tmp_path) > 2, [signal.SIGINT], launch, *LONG)
    told = re.fullmatch(r"align: sft: stopped by Ctrl-C: saved a checkpoint after step (\d+) of 240000; rerun .*", last)
    assert told and status == 130, (status, last)
    kept = int(told[1])
    status, last = interrupted(tmp_path, lambda: steps_taken(tmp_path) > kept, [signal.SIGINT] * 2, launch, *LONG)
    assert status == 130 and "a rerun of the same command resumes at step 'sft'" in last, (status, last)
    deadline = time.monotonic() + 100
    while left := [line for line in map(cmdline, psutil.process_iter()) if str(tmp_path) in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
