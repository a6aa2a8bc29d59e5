import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_runs import CASES, run_case
from safetensors.torch import load_file
from tiny_training import gap, metrics

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# On a CPU accelerate starts several processes for MULTI_GPU alone; align itself then joins them over gloo.
LAUNCH = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
mixed_precision: 'no'
num_machines: 1
machine_rank: 0
num_processes: 2
main_process_ip: 127.0.0.1
main_process_port: 0
"""


def launch(folder, *, script="distributed_runs.py", text=LAUNCH):
    """Run a script of this folder in two processes and return what became of it."""
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    if accelerate is None:
        pytest.skip("the accelerate command is not beside this Python")
    (folder / "launch.yaml").write_text(text)
    command = [accelerate, "launch", "--config_file", str(folder / "launch.yaml")]
    return subprocess.run(
        [*command, str(Path(__file__).with_name(script)), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    told = launch(folder)
    assert told.returncode == 0, told.stderr[-3000:]
    assert told.stdout.count("MULTI_CPU 2 DistributedDataParallel") == 2
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does(tmp_path, two_processes, name):
    run_case(tmp_path, name)
    lines, lines_of_two = metrics(tmp_path), metrics(two_processes / name)
    assert len(lines) == len(lines_of_two) == 10
    for line, line_of_two in zip(lines, lines_of_two, strict=True):
        assert line.keys() == line_of_two.keys()
        for part in line.keys() - {"seconds", "peak_memory_bytes", "tokens_computed"}:
            if part == "rewards/accuracies" and line["step"] == 1:
                continue  # every margin is 0 but for rounding, and so its sign is chance
            assert line[part] == pytest.approx(line_of_two[part], rel=1e-5, abs=1e-5), part
        assert line["loss"] == pytest.approx(line_of_two["loss"], rel=0, abs=2e-6)
    trained, trained_by_two = (load_file(folder / "trained.safetensors") for folder in (tmp_path, two_processes / name))
    assert gap(trained, trained_by_two) <= 5e-5
    assert max(line["grad_norm"] for line in lines) > 1  # clipped
