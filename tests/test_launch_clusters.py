"""The many-node launches: what Slurm's and SkyPilot's machines are told, with stand-ins for the clusters' commands."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[1]
SLURM, SKYPILOT = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "skypilot.yaml"
JOB = 1234567
OVERRIDES = ["steps.rpo.train.reduce=each", "seed=1"]
WAIT_S = 300

# Each stand-in leaves its arguments in a file, a line each.
ACCELERATE = """#!/usr/bin/env bash
node=${SLURM_NODEID:-here}
{ printf '%s\\n' "OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@"; } > "$LEFT/accelerate.$node"
while [ -e "$LEFT/hold" ]; do sleep 0.05; done
exit "$(cat "$LEFT/status.$node" 2>/dev/null || echo 0)"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$*" = "show hostnames node[07-10]" ]; then printf 'node%s\\n' 07 08 09 10; exit; fi
printf '%s\\n' "$@" > "$LEFT/scontrol"
exit "$(cat "$LEFT/status.scontrol" 2>/dev/null || echo 0)"
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$LEFT/srun"
while [[ $1 == --* ]]; do shift; done
status=0
for node in 0 1 2 3; do SLURM_NODEID=$node "$@" || status=$?; done
exit $status
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with stand-ins, and the environment in which they are found first."""
    for name, text in {"accelerate": ACCELERATE, "scontrol": SCONTROL, "srun": SRUN}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    plain = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return tmp_path, {**plain, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LEFT": str(tmp_path)}


@pytest.fixture
def slurm(cluster):
    """The batch script, started as Slurm starts it on the first of four nodes with 8 GPUs and 96 cores each."""
    left, environment = cluster
    given = {"JOB_ID": JOB, "JOB_NODELIST": "node[07-10]", "JOB_NUM_NODES": 4, "GPUS_ON_NODE": 8, "CPUS_ON_NODE": 96}
    environment |= {f"SLURM_{key}": str(value) for key, value in given.items()}

    def start(*arguments):
        call = ["bash", str(SLURM), *arguments]
        return subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    return left, start


def lines(path):
    return path.read_text("utf-8").splitlines()


def ended(process):
    """The status of a script and what it said."""
    said = process.communicate(timeout=WAIT_S)[1]
    return process.returncode, said


def until_there(path):
    began = time.monotonic()
    while not path.is_file():
        assert time.monotonic() - began < WAIT_S, f"{path.name} did not come"
        time.sleep(0.02)


def test_the_batch_script_is_bash_and_asks_for_one_launcher_a_node():
    assert subprocess.run(["bash", "-n", str(SLURM)], capture_output=True, check=False).returncode == 0
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SLURM.read_text("utf-8"), re.MULTILINE))
    assert {"nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "8", "requeue": ""}.items() <= asked.items()
    assert not {"partition", "account", "qos", "constraint"} & asked.keys()  # another cluster has others


def test_under_slurm_each_node_is_told_its_rank_and_where_the_first_is(slurm):
    left, start = slurm
    assert ended(start("recipes/a recipe.yaml", "rpo-1", *OVERRIDES))[0] == 0
    for node in range(4):
        assert lines(left / f"accelerate.{node}") == [
            "OMP_NUM_THREADS=12",
            "launch",
            *("--machine_rank", str(node)),
            *("--config_file", "launch/zero3-4x8gpu.yaml"),
            *("--num_machines", "4", "--num_processes", "32"),
            *("--main_process_ip", "node07", "--main_process_port", "24567"),
            *("-m", "align", "train", "recipes/a recipe.yaml", "--step", "rpo-1", *OVERRIDES),
        ]
        parsed = launch_command_parser().parse_args(lines(left / f"accelerate.{node}")[2:])
        assert parsed.training_script_args[0] == "train"
    assert {"--ntasks-per-node=1", "--cpus-per-task=96", "--kill-on-bad-exit=1"} <= set(lines(left / "srun"))
    assert not (left / "scontrol").exists()  # not requeued


def test_the_batch_script_takes_another_launch_file(slurm):
    left, start = slurm
    assert ended(start("--config_file", "launch/fsdp2-8gpu.yaml", "RECIPE", "NAME", *OVERRIDES))[0] == 0
    given = lines(left / "accelerate.0")
    assert given[given.index("--config_file") + 1] == "launch/fsdp2-8gpu.yaml"
    assert given[given.index("-m") :] == ["-m", "align", "train", "RECIPE", "--step", "NAME", *OVERRIDES]


def test_a_slurm_job_ends_with_the_status_of_a_launcher_that_fails(slurm):
    left, start = slurm
    (left / "status.2").write_text("3")
    assert ended(start("RECIPE", "NAME"))[0] == 3


@pytest.mark.parametrize(("status", "queued"), [(0, 0), (7, 1)])
def test_before_its_time_is_up_a_slurm_job_is_queued_again_and_waits_for_the_launchers(slurm, status, queued):
    left, start = slurm
    (left / "hold").touch()
    (left / "status.3").write_text(str(status))
    (left / "status.scontrol").write_text(str(queued))
    process = start("RECIPE", "NAME")
    until_there(left / "accelerate.0")
    process.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@120` has Slurm do, to the script alone
    until_there(left / "scontrol")
    assert lines(left / "scontrol") == ["requeue", str(JOB)]
    assert process.poll() is None
    (left / "hold").unlink()
    returned, said = ended(process)
    assert returned == status
    assert "NAME resumes from its last checkpoint" in said
    assert ("requeue failed" in said) is (queued != 0)


def test_the_batch_script_says_what_it_needs(slurm):
    status, said = ended(slurm[1]("RECIPE"))
    assert status == 2
    assert "RECIPE STEP" in said


# The public keys of SkyPilot 0.14.1 (sky/utils/schemas.py: get_task_schema, get_resources_schema). That version's own
# `sky.Task.from_yaml` took the file, too; it is not needed to test the rest.
TASK = {
    "name", "workdir", "num_nodes", "resources", "file_mounts", "service", "pool", "setup", "run", "envs", "secrets",
    "managed_secrets", "inputs", "outputs", "config", "volumes", "volume_mounts", "event_callback", "api_server_access",
}  # fmt: skip
RESOURCES = {
    "infra", "cloud", "region", "zone", "accelerators", "accelerator_args", "cpus", "memory", "instance_type",
    "use_spot", "disk_size", "disk_tier", "network_tier", "local_disk", "image_id", "ports", "labels", "any_of",
    "ordered", "job_recovery", "autostop", "priority", "priority_class", "volumes", "max_hourly_cost",
}  # fmt: skip


def test_skypilot_is_given_keys_that_it_knows():
    task = yaml.safe_load(SKYPILOT.read_text("utf-8"))
    assert task.keys() <= TASK
    assert task["resources"].keys() <= RESOURCES
    assert (task["num_nodes"], task["resources"]["accelerators"].partition(":")[2]) == (4, "8")
    assert all(isinstance(value, str | None) for value in [*task["envs"].values(), *task["secrets"].values()])
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=False).returncode == 0


@pytest.mark.parametrize("rank", [0, 3])
def test_under_skypilot_each_machine_is_told_its_rank_and_where_the_first_is(cluster, rank):
    left, environment = cluster
    (left / "align" / "bin").mkdir(parents=True)
    (left / "align" / "bin" / "activate").write_text("export VIRTUAL_ENV=align\n")
    (left / "bin" / "nproc").write_text("#!/usr/bin/env bash\necho 64\n")
    (left / "bin" / "nproc").chmod(0o755)
    task = yaml.safe_load(SKYPILOT.read_text("utf-8"))
    given = {"NODE_RANK": rank, "NODE_IPS": "10.0.0.5\n10.0.0.6\n10.0.0.7\n10.0.0.8", "NUM_NODES": 4}
    environment |= {f"SKYPILOT_{key}": str(value) for key, value in (given | {"NUM_GPUS_PER_NODE": 8}).items()}
    environment |= task["envs"] | {"HOME": str(left), "OVERRIDES": " ".join(OVERRIDES)}
    (left / "status.here").write_text("5")
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, timeout=WAIT_S, check=False)
    assert done.returncode == 5  # the launcher's
    (mount,) = task["volumes"]
    assert lines(left / "accelerate.here") == [
        "OMP_NUM_THREADS=8",
        "launch",
        *("--config_file", "launch/zero3-4x8gpu.yaml"),
        *("--machine_rank", str(rank), "--num_machines", "4", "--num_processes", "32"),
        *("--main_process_ip", "10.0.0.5", "--main_process_port", "29500"),
        *("-m", "align", "train", task["envs"]["RECIPE"], "--step", task["envs"]["STEP"]),
        *(f"runs={mount}/runs", *OVERRIDES),
    ]
