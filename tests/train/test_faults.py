"""What goes wrong in one of several processes ends all of them, with its name, and the next launch goes on."""

import os
import re
import sys
from pathlib import Path

import pytest
from forked import start_forked
from launching import LAUNCH, finish, start
from tiny_training import NOT_NUMBERS

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from small_runs import RECIPE, metrics, run

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LONG, STEPS = ["steps.sft.train.epochs=2", "steps.sft.train.checkpoint_steps=2"], 12

# Way, what is said of it, the way of the next launch or one process alone (whoever goes on reads what it needs, however
# that was written), the step in which the fault comes, and the last one with a checkpoint
FAULTS = {
    "killed": ("zero3", r"process 0 of 2: step 8: process 1 has died", "zero1", 8, 6),
    "nan": ("ddp", r"optimizer step 8: the loss is nan on process 1 of 2; the weights are unchanged", "zero3", 8, 6),
    "torn": ("zero2", r"process 0 of 2: step 8: writing checkpoint-8: process 1 has died", "alone", 8, 6),
    "full": ("zero3", r"step 8: writing checkpoint-8: process 1 of 2: .*shard-00001.*: no space left on", "ddp", 8, 6),
    "silent": ("ddp", r"process 0 of 2: step 8: process 1 on .* sent no heartbeat for \d+ s", "zero2", 8, 6),
    "told": ("zero2", r"stopped by SIGTERM: saved a checkpoint after step 7 of 12", "ddp", 7, 7),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The run in one process, whose first step all others take over."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *LONG, until="sft")
    return folder


def file_of(way):
    return LAUNCH / f"{way}-cpu-2.yaml"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_process_is_named_and_the_next_launch_goes_on(tmp_path, base, fault):
    way, said, next_way, step, kept = FAULTS[fault]
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(runs=tmp_path / "runs"))
    (tmp_path / "runs/small").mkdir(parents=True)
    os.symlink(base / "runs/small/base", tmp_path / "runs/small/base")
    train = ["train", path, "--step", "sft", *LONG]

    begin = start if fault == "killed" else start_forked  # one of them from the command line
    script = Path(__file__).with_name("faulty.py")
    launched = begin(file_of(way), "--main_process_port", "0", script, fault, step, *train)
    _, errors = finish(launched)
    assert launched.returncode not in (None, 0)
    lines = [line for line in errors.splitlines() if line.startswith("align: ")]
    assert any(re.match(f"align: {said}", line) for line in lines), errors[-3000:]

    if next_way == "alone":
        _, told = run(tmp_path, *LONG, until="sft")
        notes = "\n".join(told.notes)
    else:
        again = start_forked(file_of(next_way), "--main_process_port", "0", "-m", "align", *train)
        _, notes = finish(again)
        assert again.returncode == 0, notes[-3000:]
    assert f"resumed after step {kept} of {STEPS}" in notes
    of_one, of_two = metrics(base, "sft"), metrics(tmp_path, "sft")
    assert len(of_one) == len(of_two) == STEPS
    assert [line["loss"] for line in of_one] == pytest.approx([line["loss"] for line in of_two], abs=2e-6)
    assert {name for name in of_one[0] if name not in NOT_NUMBERS} <= of_two[0].keys()
