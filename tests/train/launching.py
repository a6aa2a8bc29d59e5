"""Starts scripts of tests as several processes, by the launch files of the project, and never waits for ever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}


def command(launch, *arguments):
    """The call of a launch file with arguments for accelerate and then for Python."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch), *map(str, arguments)]


def start(launch, *arguments, **environment):
    return subprocess.Popen(
        command(launch, *arguments),
        env=os.environ | QUIET | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launched, timeout_s=600):
    """What it wrote to stdout and stderr; a launch that does not end is ended, and fails the test."""
    try:
        return launched.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        launched.terminate()  # it ends its processes, which a kill would leave behind
        _, errors = launched.communicate(timeout=120)
        raise AssertionError(f"did not end within {timeout_s} s: {errors[-3000:]}") from None


def told(output):
    """The objects that the processes printed, a line each; two may have come into one line."""
    decoder, found = json.JSONDecoder(), []
    for line in output.splitlines():
        while line.startswith("{"):
            value, end = decoder.raw_decode(line)
            found.append(value)
            line = line[end:]
    return found


def fsdp_on_a_cpu(folder):
    """The launch file of FSDP2 for two processes; `ACCELERATE_TORCH_DEVICE` and `join_fsdp` bring it to a CPU."""
    values = yaml.safe_load((LAUNCH / "fsdp2-8gpu.yaml").read_text()) | {"num_processes": 2}
    path = folder / "fsdp2-cpu-2.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
