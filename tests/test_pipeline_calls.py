"""Test several calls on one run folder: concurrent, consecutive, killed, and with reruns."""

import errno
import fcntl
import os
import platform
import random
import signal
import subprocess
import sys

import pytest

from align.artifacts import read_manifest
from align.errors import InputError, RunError
from align.pipeline import FINISHED, INTERRUPTED, WAITING, Step, dependents, locked, plan, run

HOLDING = """
import sys, time
from pathlib import Path
from align.pipeline import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds the lock of the run folder."""
    with subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_locked_folder_is_an_error_that_names_the_holder(tmp_path, holder):
    with pytest.raises(RunError) as caught, locked(tmp_path, print):
        raise AssertionError("two hold it")
    assert f"in use by PID {holder.pid} on {platform.node()};" in str(caught.value)
    assert "\n" not in str(caught.value)
    with (
        pytest.raises(RunError, match=f"PID {holder.pid} on"),
        locked(tmp_path, print),
    ):  # a failed attempt keeps the holder's name
        pass


def test_a_stale_lock_is_replaced_and_logged(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    messages = []
    with locked(tmp_path, messages.append):
        pass
    gone = f"PID {holder.pid} on {platform.node()}"
    assert messages == [f"{tmp_path}: replaced the stale lock of {gone}, which no longer runs"]
    with locked(tmp_path, messages.append):  # the stale name is gone
        pass
    assert len(messages) == 1


def test_an_error_releases_the_lock(tmp_path):
    with pytest.raises(InputError), locked(tmp_path, print):
        raise InputError("a step has failed")
    taken = "from pathlib import Path; from align.pipeline import locked\nwith locked(Path('.'), print): print('held')"
    other = subprocess.run([sys.executable, "-c", taken], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert other.stdout == "held\n"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_logged_and_used(tmp_path, monkeypatch, number):
    def no_locks(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    messages = []
    with locked(tmp_path, messages.append):
        messages.append("inside")
    with locked(tmp_path, messages.append):  # the first one leaves no stale lock
        pass
    without = f"{tmp_path}: this file system has no file locks; make sure that no other process writes to this folder"
    assert messages == [without, "inside", without]


def test_a_run_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file.*: Not a directory"), locked(tmp_path / "file" / "run", print):
        pass


# base -> code -> chat -> dpo; dpo also reads the reward model
CHAIN = {"base": (), "code": ("base",), "reward": ("base",), "chat": ("code",), "dpo": ("chat", "reward")}
STEPS = [Step(name, inputs, "k") for name, inputs in CHAIN.items()]


def ran(root, steps=STEPS, **options):
    """Run the steps and return the names of those executed; each writes its key and the content of its inputs."""
    executed = []

    def execute(step, working, inputs):
        executed.append(step.name)
        before = ",".join((folder / "letter").read_text() for folder in inputs.values())
        (working / "letter").write_text(f"{step.name}:{step.key}({before})")
        return {}

    run(steps, root, execute=execute, log=lambda _: None, **options)
    return executed


AGAIN = {
    "base": ["base", "code", "reward", "chat", "dpo"],
    "code": ["code", "chat", "dpo"],
    "reward": ["reward", "dpo"],
    "chat": ["chat", "dpo"],
    "dpo": ["dpo"],
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_rerun_covers_the_step_and_its_dependents_only(tmp_path, name):
    ran(tmp_path)
    assert dependents(STEPS, [name]) == set(AGAIN[name])
    assert ran(tmp_path, rerun=[name]) == AGAIN[name]
    assert ran(tmp_path) == []


def test_a_rerun_can_end_early_and_continue_later(tmp_path):
    ran(tmp_path)
    assert ran(tmp_path, rerun=["code"], until="chat") == ["code", "chat"]
    assert ran(tmp_path) == ["dpo"]


KILLED = """
import os, sys
from pathlib import Path
from align.pipeline import Step, run
root, last = Path(sys.argv[1]), sys.argv[2]
def execute(step, working, inputs):
    if step.name == last:
        os._exit(9)
    (working / "letter").write_text("of the second call")
    return {}
chain = {"base": (), "code": ("base",), "reward": ("base",), "chat": ("code",), "dpo": ("chat", "reward")}
run([Step(*each, "k") for each in chain.items()], root, execute=execute, log=print, rerun=["code"])
"""


@pytest.mark.parametrize("last", AGAIN["code"])
def test_an_interrupted_rerun_skips_nothing_later(tmp_path, last):
    ran(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path, last], capture_output=True)
    assert killed.returncode == 9
    assert ran(tmp_path) == AGAIN["code"][AGAIN["code"].index(last) :]


UNNAMED = """
import os, sys
from pathlib import Path
from align.pipeline import Step, run
root = Path(sys.argv[1])
def execute(step, working, inputs):
    (working / "letter").write_text("whole")
    return {"told": step.name}
rename = os.rename
os.rename = lambda old, new: os._exit(9) if Path(new).name == "code" else rename(old, new)
run([Step("base", (), "k"), Step("code", ("base",), "k")], root, execute=execute, log=print)
"""


def test_a_step_killed_before_its_rename_is_not_repeated(tmp_path):
    assert subprocess.run([sys.executable, "-c", UNNAMED, tmp_path], capture_output=True).returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "code.partial"]
    assert ran(tmp_path, STEPS[:2]) == []
    assert (tmp_path / "code" / "letter").read_text() == "whole"
    assert read_manifest(tmp_path / "code")["told"] == "code"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "code"]


def a_graph(draw):
    """Return up to nine steps, each of which reads some of the earlier ones."""
    names = [f"step-{number}" for number in range(draw.randint(1, 9))]
    return [
        Step(name, tuple(draw.sample(names[:at], draw.randint(0, min(at, 3)))), "k") for at, name in enumerate(names)
    ]


def changed(steps, draw):
    """Change some keys; return the steps and the names of all that are affected, found through their inputs."""
    chosen = {step.name for step in steps if draw.random() < 0.3}
    after = [Step(step.name, step.inputs, "other" if step.name in chosen else step.key) for step in steps]
    reads = {step.name: step.inputs for step in steps}

    def touched(name):
        return name in chosen or any(touched(needed) for needed in reads[name])

    return after, {name for name in reads if touched(name)}


def below(steps, name):
    """Return the step and all its dependents, found by recursion."""
    return {name}.union(*(below(steps, step.name) for step in steps if name in step.inputs))


@pytest.mark.parametrize("seed", range(40))
def test_the_plan_matches_the_run_and_covers_changes_and_dependents(tmp_path, seed):
    draw = random.Random(seed)
    steps = a_graph(draw)
    assert {each.state for each in plan(steps, tmp_path)} == {WAITING}
    assert ran(tmp_path, steps) == [step.name for step in steps]
    assert {each.state for each in plan(steps, tmp_path)} == {FINISHED}
    after, touched = changed(steps, draw)
    until = draw.choice([None, draw.choice(after).name])
    again = [step.name for step in draw.sample(after, draw.choice([0, 0, 1, min(2, len(after))]))]
    there = len(after) if until is None else [step.name for step in after].index(until) + 1
    expected = touched.union(*(below(after, name) for name in again))
    planned = plan(after, tmp_path, until=until, rerun=again)
    assert [each.step for each in planned] == after[:there]
    done = ran(tmp_path, after, until=until, rerun=again)
    assert done == [each.step.name for each in planned if each.state != FINISHED]
    assert set(done) == expected & {step.name for step in after[:there]}
    fresh = tmp_path / "from_config"
    ran(fresh, after, until=until)
    for each in planned:
        assert (tmp_path / each.step.name / "letter").read_text() == (fresh / each.step.name / "letter").read_text()


def test_a_plan_shows_interrupted_steps_and_changes_nothing(tmp_path):
    def fail(step, working, inputs):
        raise RunError("the loss is nan")

    with pytest.raises(RunError):
        run(STEPS[:1], tmp_path, execute=fail, log=lambda _: None)
    before = sorted(tmp_path.rglob("*"))
    assert [each.state for each in plan(STEPS, tmp_path)] == [INTERRUPTED, WAITING, WAITING, WAITING, WAITING]
    assert {each.state for each in plan(STEPS, tmp_path, rerun=["base"])} == {WAITING}
    other = [Step("base", (), "other")]
    assert plan(other, tmp_path)[0].reason == "restarts because its unfinished attempt had other settings or inputs"
    assert sorted(tmp_path.rglob("*")) == before
