"""What the process that launches a step passes on of it."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from align.artifacts import append_line
from align.data.chat_clock import BEGAN
from align.distributed.progress import SilentProgress
from align.errors import RunError
from align.workflow.following import Follower, WrittenProgress, failure_in
from align.workflow.launcher import first_began


class Told(SilentProgress):
    """Remembers what it is told."""

    def __init__(self):
        self.phases, self.steps, self.units = [], [], 0

    def phase(self, name, total, done=0):
        self.phases.append((name, total, done))

    def advance(self, units, metrics=None):
        self.units += units
        self.steps += [] if metrics is None else [metrics["step"]]


def write_steps(folder, child, numbers):
    for number in numbers:
        append_line(folder / "metrics.jsonl", {"step": number})
        child.advance(1, {"step": number})


@pytest.mark.parametrize("looks_between", [True, False])
def test_phases_with_their_totals_and_every_optimizer_step_are_passed_on(tmp_path, looks_between):
    told = Told()
    follower, child = Follower(tmp_path, told), WrittenProgress(SilentProgress(), tmp_path)
    look = follower.look if looks_between else lambda: None
    look()
    child.phase("reference", 7)
    look()
    child.phase("train", 3)
    look()
    write_steps(tmp_path, child, [1, 2, 3])
    look()
    child.phase("grade", 5, 1)
    follower.look()
    follower.look()
    assert told.phases == [("reference", 7, 0), ("train", 3, 0), ("grade", 5, 1)]
    assert told.steps == [1, 2, 3]


def test_a_resumed_step_passes_on_only_the_steps_of_this_attempt(tmp_path):
    before = WrittenProgress(SilentProgress(), tmp_path)
    before.phase("train", 5)
    write_steps(tmp_path, before, [1, 2])
    told = Told()
    follower, child = Follower(tmp_path, told), WrittenProgress(SilentProgress(), tmp_path)
    child.phase("train", 5, 2)
    follower.look()
    write_steps(tmp_path, child, [3, 4])
    follower.look()
    assert (told.phases, told.steps) == ([("train", 5, 2)], [3, 4])


def test_a_requeued_job_passes_on_its_phases_again(tmp_path):
    told = Told()
    follower, child = Follower(tmp_path, told), WrittenProgress(SilentProgress(), tmp_path)
    child.phase("train", 5)
    write_steps(tmp_path, child, [1, 2])
    follower.look()
    child = WrittenProgress(SilentProgress(), tmp_path)  # as many phases before the follower looks
    child.phase("train", 5, 1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")  # since its checkpoint
    write_steps(tmp_path, child, [2, 3])
    follower.look()
    assert (told.phases, told.steps) == ([("train", 5, 0), ("train", 5, 1)], [1, 2, 2, 3])


def test_a_line_that_is_being_written_is_passed_on_when_it_is_whole(tmp_path):
    told = Told()
    follower, child = Follower(tmp_path, told), WrittenProgress(SilentProgress(), tmp_path)
    child.phase("train", 2)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step"')
    follower.look()
    assert told.steps == [1]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2}\n')
    follower.look()
    assert told.steps == [1, 2]


def test_the_resources_that_the_step_has_read_last_are_passed_on_with_its_metrics(tmp_path):
    seen = []
    told = SilentProgress()
    told.advance = lambda units, metrics=None: seen.append(metrics)
    follower, child = Follower(tmp_path, told), WrittenProgress(SilentProgress(), tmp_path)
    child.phase("train", 2)
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "peak_memory_bytes": 5})
    child._written_s = 0.0
    child.advance(1, {"step": 1, "loss": 2.0, "flops": 3.0, "energy_wh": 4.0, "peak_memory_bytes": 6})
    follower.look()
    assert seen == [{"step": 1, "peak_memory_bytes": 5, "energy_wh": 4.0}]


PROGRAMS = {
    "an exception": ("int('x')", "ValueError: invalid literal for int() with base 10: 'x'"),
    "an exception with its cause": (
        "try:\n    {}['a']\nexcept KeyError as error:\n    raise RuntimeError('no a') from error",
        "RuntimeError: no a",
    ),
    "an exception while another is handled": (
        "try:\n    {}['a']\nexcept KeyError:\n    int('x')",
        "ValueError: invalid literal for int() with base 10: 'x'",
    ),
    "a message of several lines": ("raise OSError('first\\nsecond')", "OSError: first"),
    "our own error": (
        "import sys; sys.stderr.write('align: step 2: the loss is nan\\n'); 1/0",
        "align: step 2: the loss is nan",
    ),
    "a word": ("print('Killed')", "Killed"),
    "nothing": ("", "no output"),
}
LAUNCHER = """
Traceback (most recent call last):
  File "launch.py", line 5, in <module>
    main()
subprocess.CalledProcessError: Command '['python', '-m', 'align']' returned non-zero exit status 1.
"""


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_failure_is_the_exception_of_the_step_and_not_that_of_the_launcher(case):
    code, said = PROGRAMS[case]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    log = f"a note\n{done.stderr}" if done.stderr else done.stdout
    assert failure_in(log) == said
    if done.stderr:
        assert failure_in(log + LAUNCHER) == said


def test_of_several_processes_the_first_traceback_counts():
    one = "Traceback (most recent call last):\n  File 'a'\nValueError: one".splitlines()
    two = "Traceback (most recent call last):\n  File 'b'\nKeyError: 'two'".splitlines()
    mixed = [line for pair in zip(two, one, strict=True) for line in (f"[rank1]: {pair[0]}", f"[rank0]: {pair[1]}")]
    assert failure_in("\n".join(mixed)) == "KeyError: 'two'"


def test_all_processes_of_a_launch_render_templates_with_the_time_of_the_first(tmp_path):
    """Whether there is nothing yet, or the time of an attempt that the first process removes."""
    working, prepared = tmp_path / "step.partial", []
    for old in (None, "2020-01-01T00:00:00"):
        if old is not None:
            (working / BEGAN).write_text(old)
            prepared.clear()
        with ThreadPoolExecutor() as pool:
            found = pool.submit(first_began, working, lambda: bool(prepared), print)
            time.sleep(0.2)
            assert not found.done()
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir()
            prepared.append(True)
            time.sleep(0.6)
            assert not found.done()  # the first process has not written its time yet
            (working / BEGAN).write_text("2026-07-01T12:00:00")
            assert found.result(timeout=300) == datetime(2026, 7, 1, 12)


def test_a_process_whose_launch_never_begins_says_what_it_waits_for_and_ends(tmp_path, clock, monkeypatch):
    """As on a machine that does not share the folder of the run."""
    noted = []

    def sleep(seconds):
        clock.now += 100 * seconds

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(RunError, match=rf"not begun the step after 60 minutes; do all machines share {tmp_path}\?"):
        first_began(tmp_path / "sft.partial", lambda: True, noted.append)
    assert noted == [f"waits for the first process of the launch, which begins the step in {tmp_path}"]
