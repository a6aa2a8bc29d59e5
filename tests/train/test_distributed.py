import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_runs import CASES, run_case
from safetensors.torch import load_file
from tiny_training import gap, metrics

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# What the cut into micro-batches of two processes decides, of training and of the held-out rows
WORK = ("tokens_computed", "pairs_attended", "targets")
CHANGING = {"seconds", "peak_memory_bytes", *WORK, *(f"held_out/{name}" for name in WORK)}

LAUNCH = Path(__file__).parents[2] / "launch" / "ddp-cpu-2.yaml"


def launch(folder):
    """Let two processes do the runs together."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH)]
    script = Path(__file__).with_name("distributed_runs.py")
    launched = subprocess.Popen(
        [*launcher, "--main_process_port", "0", str(script), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = launched.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        launched.terminate()  # it ends its processes, which a kill would leave behind
        _, errors = launched.communicate()
    assert launched.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    launch(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does(tmp_path, two_processes, name):
    run_case(tmp_path, name)
    lines, lines_of_two = metrics(tmp_path), metrics(two_processes / name)
    assert len(lines) == len(lines_of_two) == 10
    for line, line_of_two in zip(lines, lines_of_two, strict=True):
        assert line.keys() == line_of_two.keys()
        for part in line.keys() - CHANGING:
            if part == "rewards/accuracies" and line["step"] == 1:
                continue  # every margin is 0 but for rounding, and so its sign is chance
            assert line[part] == pytest.approx(line_of_two[part], rel=1e-5, abs=1e-5), part
        assert line["loss"] == pytest.approx(line_of_two["loss"], rel=0, abs=2e-6)
        if name == "alone":  # the rank without a group runs that of the other, for nothing
            assert line_of_two["tokens_computed"] == 2 * line["tokens_computed"]
    trained, trained_by_two = (load_file(folder / "trained.safetensors") for folder in (tmp_path, two_processes / name))
    assert gap(trained, trained_by_two) <= 5e-5
    assert name == "adapters" or max(line["grad_norm"] for line in lines) > 1  # clipped
