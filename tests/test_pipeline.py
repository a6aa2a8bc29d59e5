import json
import random
import shutil
import signal
import subprocess
import sys

import pytest

from align.artifacts import read_manifest, working_folder
from align.errors import InputError, RunError
from align.pipeline import Cleanup, Step, fingerprints, order, run

# base -> code -> chat -> dpo -> rpo; the reward model branches off base
CHAIN = {
    "base": (),
    "code": ("base",),
    "reward": ("base",),
    "chat": ("code",),
    "dpo": ("chat",),
    "rpo": ("dpo", "reward"),
}


def chain(**keys):
    return [Step(name, inputs, keys.get(name, "k")) for name, inputs in CHAIN.items()]


def letter(step, working, inputs):
    """Execute a step that writes its key and the content of its inputs."""
    before = {name: (folder / "letter").read_text() for name, folder in inputs.items()}
    (working / "letter").write_text(f"{step.name}:{step.key}({','.join(before.values())})")
    return {"num_inputs": len(before)}


def ran(steps, root, until=None):
    """Run the steps and return the names of those executed, in order."""
    executed = []

    def execute(step, working, inputs):
        executed.append(step.name)
        return letter(step, working, inputs)

    run(steps, root, execute=execute, log=lambda _: None, until=until)
    return executed


def test_ordered_steps_keep_their_order():
    assert order(chain()) == chain()


@pytest.mark.parametrize("seed", range(20))
def test_each_step_follows_its_inputs(seed):
    steps = chain()
    random.Random(seed).shuffle(steps)
    placed = [step.name for step in order(steps)]
    assert sorted(placed) == sorted(CHAIN)
    for name, inputs in CHAIN.items():
        assert all(placed.index(needed) < placed.index(name) for needed in inputs)


WRONG = [
    ([Step("a", ("b",), ""), Step("b", ("a",), "")], ["cycle", "a -> b -> a"]),
    ([Step("a", ("a",), "")], ["cycle", "a -> a"]),
    ([Step("x", ("c",), ""), *(Step(n, (m,), "") for n, m in ["ab", "bc", "ca"])], ["cycle", "c -> a -> b -> c"]),
    ([Step("sft", (), ""), Step("dpo", ("sfft",), "")], ["'dpo'", "'sfft'", "did you mean 'sft'?"]),
    ([Step("a", (), ""), Step("a", (), "other")], ["two steps are called 'a'"]),
]


@pytest.mark.parametrize(("steps", "messages"), WRONG)
def test_invalid_graphs_are_errors_before_anything_runs(tmp_path, steps, messages):
    with pytest.raises(InputError) as caught:
        ran(steps, tmp_path)
    assert all(words in str(caught.value) for words in messages)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "a b", "a\n", "sft.partial"])
def test_a_step_name_must_be_a_folder_name(name):
    with pytest.raises(InputError, match="also a folder name"):
        Step(name, (), "k")


def test_a_step_reads_finished_inputs_and_writes_a_manifest(tmp_path):
    made = run(chain(), tmp_path, execute=letter, log=lambda _: None)
    assert (tmp_path / "rpo" / "letter").read_text() == "rpo:k(dpo:k(chat:k(code:k(base:k()))),reward:k(base:k()))"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CHAIN)
    assert made == {name: json.loads((tmp_path / name / "manifest.json").read_text()) for name in CHAIN}
    assert {name: told["num_inputs"] for name, told in made.items()} == {n: len(needs) for n, needs in CHAIN.items()}
    for name, inputs in CHAIN.items():
        assert made[name]["inputs"] == {needed: made[needed]["fingerprint"] for needed in inputs}


def test_finished_steps_are_skipped(tmp_path):
    run(chain(), tmp_path, execute=letter, log=lambda _: None)
    messages = []
    made = run(chain(), tmp_path, execute=None, log=messages.append)
    assert messages == [f"{name}: finished before, skipped" for name in CHAIN]
    assert made == {name: read_manifest(tmp_path / name) for name in CHAIN}


AFTER_A_CHANGE = [
    ("base", ["base", "code", "reward", "chat", "dpo", "rpo"]),
    ("code", ["code", "chat", "dpo", "rpo"]),
    ("reward", ["reward", "rpo"]),
    ("chat", ["chat", "dpo", "rpo"]),
    ("dpo", ["dpo", "rpo"]),
    ("rpo", ["rpo"]),
]


@pytest.mark.parametrize(("changed", "expected"), AFTER_A_CHANGE)
def test_a_changed_step_reruns_with_its_dependents_only(tmp_path, changed, expected):
    assert ran(chain(), tmp_path) == list(CHAIN)
    assert ran(chain(**{changed: "other"}), tmp_path) == expected
    again = tmp_path / "from nothing"
    assert ran(chain(**{changed: "other"}), again) == list(CHAIN)
    for name in CHAIN:
        assert (tmp_path / name / "letter").read_text() == (again / name / "letter").read_text()


def test_a_new_step_runs_alone_and_a_new_input_is_a_change(tmp_path):
    ran(chain(), tmp_path)
    more = [*chain(), Step("rpo-2", ("rpo", "reward"), "k")]
    assert ran(more, tmp_path) == ["rpo-2"]
    assert ran([*chain(), Step("rpo-2", ("rpo",), "k")], tmp_path) == ["rpo-2"]


def test_the_given_order_does_not_matter(tmp_path):
    ran(chain(), tmp_path)
    assert ran(chain()[::-1], tmp_path) == []
    assert fingerprints(chain()) == fingerprints(chain()[::-1])


def test_a_run_can_end_at_a_step_and_continue_later(tmp_path):
    assert ran(chain(), tmp_path, until="reward") == ["base", "code", "reward"]
    assert ran(chain(), tmp_path) == ["chat", "dpo", "rpo"]
    with pytest.raises(InputError, match=r"no step is called 'rewart'; did you mean 'reward'\?"):
        ran(chain(), tmp_path, until="rewart")


def test_a_folder_that_no_step_made_is_not_overwritten(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").touch()
    with pytest.raises(InputError, match="code exists but was not made by a step"):
        ran(chain(), tmp_path)
    assert (tmp_path / "code" / "mine.py").exists()


@pytest.mark.parametrize("failing", CHAIN)
def test_a_failed_step_resumes_from_its_working_folder(tmp_path, failing):
    def execute(step, working, inputs):
        if step.name == failing and not (working / "checkpoint").exists():
            (working / "checkpoint").write_text("half way")
            raise RunError("the loss is nan")
        return letter(step, working, inputs)

    names = list(CHAIN)
    with pytest.raises(RunError, match="the loss is nan"):
        run(chain(), tmp_path, execute=execute, log=lambda _: None)
    whole = names[: names.index(failing)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*whole, f"{failing}.partial"])
    messages = []
    run(chain(), tmp_path, execute=execute, log=messages.append)
    assert messages[len(whole)] == f"{failing}: resumes where it was interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CHAIN)


def test_an_attempt_with_other_settings_is_cleared(tmp_path):
    def fail(step, working, inputs):
        (working / "checkpoint").write_text("of other settings")
        raise RunError("killed")

    with pytest.raises(RunError):
        run([Step("sft", (), "one")], tmp_path, execute=fail, log=lambda _: None)
    messages = []
    run([Step("sft", (), "two")], tmp_path, execute=letter, log=messages.append)
    assert messages == ["sft: restarts because its unfinished attempt had other settings or inputs"]
    assert sorted(path.name for path in (tmp_path / "sft").iterdir()) == ["letter", "manifest.json"]


def test_state_for_resuming_is_removed_after_the_manifest_is_written(tmp_path):
    def execute(step, working, inputs):
        (working / "checkpoint").write_text("half way")
        return letter(step, working, inputs)

    def cleanup(working):
        kills.append(read_manifest(working)["step"])
        if len(kills) == 1:
            raise KeyboardInterrupt
        (working / "checkpoint").unlink()

    kills = []
    with pytest.raises(KeyboardInterrupt):
        run([Step("sft", (), "k")], tmp_path, execute=execute, log=lambda _: None, cleanup=Cleanup(cleanup))
    assert (working_folder(tmp_path / "sft") / "checkpoint").exists()
    run([Step("sft", (), "k")], tmp_path, execute=pytest.fail, log=lambda _: None, cleanup=Cleanup(cleanup))
    assert kills == ["sft", "sft"]
    assert sorted(path.name for path in (tmp_path / "sft").iterdir()) == ["letter", "manifest.json"]


def test_restored_settings_do_not_restore_results_from_other_samples(tmp_path):
    drawn, messages = [], []

    def execute(step, working, inputs):
        drawn.append(step.name)  # a server's samples differ each time
        text = f"draw {len(drawn)}" if step.name == "samples" else (inputs["samples"] / "letter").read_text()
        (working / "letter").write_text(text)
        return {}

    def call(key, until=None):
        steps = [Step("samples", (), key), Step("rpo", ("samples",), "k")]
        run(steps, tmp_path, execute=execute, log=messages.append, until=until)
        return [(tmp_path / name / "letter").read_text() for name in ("samples", "rpo")]

    assert call("A") == ["draw 1", "draw 1"]
    assert call("B", until="samples") == ["draw 3", "draw 1"]
    assert call("A") == ["draw 4", "draw 4"]
    assert call("A") == ["draw 4", "draw 4"]
    assert messages[-2:] == ["samples: finished before, skipped", "rpo: finished before, skipped"]
    shutil.rmtree(tmp_path / "samples")  # a common way to force a rerun
    assert call("A") == ["draw 6", "draw 6"]


def test_an_attempt_on_other_samples_is_cleared(tmp_path):
    def execute(step, working, inputs):
        if step.name == "rpo" and kills:
            (working / "checkpoint").write_text("half way")
            raise kills.pop()
        assert not (working / "checkpoint").exists()
        return letter(step, working, inputs)

    def call(key, until=None):
        steps = [Step("samples", (), key), Step("rpo", ("samples",), "k")]
        run(steps, tmp_path, execute=execute, log=lambda _: None, until=until)

    kills = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        call("A")
    call("B", until="samples")
    call("A")
    assert (tmp_path / "rpo" / "letter").exists()


@pytest.mark.parametrize("until", [None, "rpo"])
def test_an_interrupted_rerun_is_resumed_by_the_same_command(tmp_path, until):
    steps = [Step("general", (), "k"), Step("dpo", ("general",), "k"), Step("rpo", ("dpo",), "k")]
    ran, kills = [], []

    def execute(step, working, inputs):
        ran.append((step.name, (working / "checkpoint").exists()))
        (working / "checkpoint").write_text("half way")
        if step.name in kills:
            kills.remove(step.name)
            raise KeyboardInterrupt
        return {}

    def call(rerun=()):
        ran.clear()
        run(steps, tmp_path, execute=execute, log=lambda _: None, rerun=rerun, until=until)

    call()
    for command in (["dpo"], []):  # resuming works with and without --rerun-from
        kills[:] = ["rpo"]
        with pytest.raises(KeyboardInterrupt):
            call(rerun=["dpo"])
        assert ran == [("dpo", False), ("rpo", False)]
        call(rerun=command)
        assert ran == [("rpo", True)]
        call(rerun=["dpo"])  # the earlier rerun finished, so this is a new one
        assert ran == [("dpo", False), ("rpo", False)]
    kills[:] = ["dpo"]
    with pytest.raises(KeyboardInterrupt):
        call(rerun=["dpo"])
    run(steps, tmp_path, execute=execute, log=lambda _: None, until="dpo")  # finishes
    call(rerun=["dpo"])
    assert ran == [("dpo", False), ("rpo", False)]


def test_a_changed_step_keeps_its_old_folder_until_it_finishes(tmp_path):
    def look(step, working, inputs):
        assert (tmp_path / "sft" / "letter").read_text() == "sft:one()"
        return letter(step, working, inputs)

    ran([Step("sft", (), "one")], tmp_path)
    messages = []
    run([Step("sft", (), "two")], tmp_path, execute=look, log=messages.append)
    assert messages == ["sft: reruns because its settings or inputs changed"]
    assert (tmp_path / "sft" / "letter").read_text() == "sft:two()"


# A child process that counts to six in each of three steps and kills itself at a given total.
COUNTING = """
import os, signal, sys
from pathlib import Path
from align.artifacts import append_line
from align.pipeline import Cleanup, Step, run
root, last = Path(sys.argv[1]), int(sys.argv[2])
def execute(step, working, inputs):
    log = working / "counts.jsonl"
    for count in range(len(log.read_text().splitlines()) if log.exists() else 0, 6):
        append_line(log, [step.name, count])
        append_line(root / "all.jsonl", [step.name, count])
        if len((root / "all.jsonl").read_text().splitlines()) == last:
            os.kill(os.getpid(), signal.SIGKILL)
    return {}
steps = [Step("a", (), "k"), Step("b", ("a",), "k"), Step("c", ("a", "b"), "k")]
run(steps, root, execute=execute, log=print)
"""


@pytest.mark.parametrize("last", [1, 6, 9, 12, 18])
def test_a_kill_at_any_point_repeats_no_work(tmp_path, last):
    command = [sys.executable, "-c", COUNTING, tmp_path]
    killed = subprocess.run([*command, str(last)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert working_folder(tmp_path / "abc"[(last - 1) // 6]).is_dir()
    subprocess.run([*command, "0"], check=True, capture_output=True)
    everything = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert everything == [[name, count] for name in "abc" for count in range(6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "all.jsonl", "b", "c"]
