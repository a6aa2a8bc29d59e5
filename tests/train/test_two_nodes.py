"""Two nodes do what one process does; one that is cut off ends both, and the next run goes on."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, told
from test_distributed import compare
from two_nodes import Loopback, Wire, finish_both, run_on_both, start_on_both, why_no_wire

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from small_runs import RECIPE, metrics, run

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CASES = ("rpo", "reward")
STEPS, CHECKPOINT_STEPS, CUT_AFTER = 60, 5, 8
LONG = ["steps.sft.train.epochs=10", f"steps.sft.train.checkpoint_steps={CHECKPOINT_STEPS}"]  # of six steps each


@pytest.fixture
def wire():
    reason = why_no_wire()
    if reason:
        pytest.skip(reason)
    with Wire() as nodes:
        yield nodes


@pytest.fixture
def two_nodes():
    with Loopback() if why_no_wire() else Wire() as nodes:
        yield nodes


def test_two_nodes_do_what_one_process_does(tmp_path, two_nodes):
    script = Path(__file__).with_name("distributed_runs.py")
    outputs = run_on_both(two_nodes, "zero3-cpu-2.yaml", script, tmp_path, ",".join(CASES))
    for output in outputs:
        seen = told(output)
        assert [one["case"] for one in seen] == [*CASES]
        assert {(one["processes"], one["wrapped"]) for one in seen} == {(2, "DeepSpeedEngine")}
    for case in CASES:
        compare(case, tmp_path / case)


def test_a_node_that_is_cut_off_ends_both_and_the_next_run_goes_on(tmp_path, wire):
    run(tmp_path / "alone", *LONG, until="sft")
    path, folder = tmp_path / "small.yaml", tmp_path / "runs/small"
    path.write_text(RECIPE.format(runs=tmp_path / "runs"))
    folder.mkdir(parents=True)
    os.symlink(tmp_path / "alone/runs/small/base", folder / "base")
    # They wait at half of their steps, so that they are cut off at work however late this process is
    train = [ROOT / "tests/held.py", "steps", STEPS // 2, path, "train", path, "--step", "sft", *LONG]

    launches = start_on_both(wire, "zero2-cpu-2.yaml", *train)
    log = folder / "sft.partial/metrics.jsonl"
    until = time.monotonic() + 300
    while num_lines(log) < CUT_AFTER and time.monotonic() < until and all(each.poll() is None for each in launches):
        time.sleep(0.02)
    wire.cut()
    written = finish_both(launches)
    done = num_lines(log)
    assert CUT_AFTER <= done < STEPS
    for node, (each, (_, errors)) in enumerate(zip(launches, written, strict=True)):
        assert each.returncode == 1
        said = [line for line in errors.splitlines() if line.startswith("align: process ")]
        there = rf"process {1 - node} on \S+ sent no heartbeat for \d+ s"
        found = [re.match(rf"align: process {node} of 2: step (\d+)(?:: writing \S+)?: {there}", line) for line in said]
        assert len(found) == 1 and int(found[0][1]) in (done, done + 1), errors[-3000:]

    _, resumes = run(tmp_path, *LONG, until="sft")
    resumed = re.search(rf"resumed after step (\d+) of {STEPS}", "\n".join(resumes.notes))
    assert done - CHECKPOINT_STEPS <= int(resumed[1]) <= done  # the last whole one, or it was cut while one was written
    of_one, of_two = (metrics(each, "sft") for each in (tmp_path / "alone", tmp_path))
    assert len(of_two) == STEPS
    assert [line["loss"] for line in of_one] == pytest.approx([line["loss"] for line in of_two], rel=0, abs=2e-6)


def num_lines(log):
    return len(log.read_text().splitlines()) if log.exists() else 0
