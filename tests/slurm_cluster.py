"""A cluster of two nodes on this machine: stand-ins for Slurm's commands that run batch scripts in the background.

Answers and states are those of Slurm 22.05. A job is a folder with a file for each of its fields.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "srun", "scancel")
FIRST_JOB = 4000 + os.getpid() % 5000  # of which slurm.sbatch makes a port
STEP_S = 0.05


class Cluster:
    """The commands on PATH, and what the tests do to the jobs."""

    def __init__(self, folder, patch):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in COMMANDS:
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n')
            path.chmod(0o755)
        patch.setenv("CLUSTER", str(folder))
        patch.setenv("PATH", f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")

    @property
    def jobs(self):
        """The IDs of all jobs, in the order of their submission."""
        return sorted(path.name for path in self.folder.iterdir() if path.name.isdigit())

    def of(self, job, field):
        """A field of a job."""
        return read(self.folder / job, field)

    def fault(self, command, text):
        """Have a command fail with this line until it is told otherwise, by an empty text."""
        (self.folder / f"fault.{command}").write_text(text)

    def hold(self, is_held=True):
        """Keep jobs pending."""
        (self.folder / "hold").touch() if is_held else (self.folder / "hold").unlink()

    def call(self, *words):
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def close(self):
        """End the jobs that still run."""
        for job in self.jobs:
            self.call("scancel", job)


def read(job, field, default=""):
    path = job / field
    return path.read_text() if path.is_file() else default


def write(job, field, value):
    partial = job / f".{field}"
    partial.write_text(str(value))
    partial.rename(job / field)


def options(words):
    """The options at the start of a command, and the rest."""
    found = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0)[2:].partition("=")
        found[name] = value
    return found, words


def sbatch(root, words):
    given, (script, *arguments) = options(words)
    number = FIRST_JOB + sum(path.name.isdigit() for path in root.iterdir())
    job = root / str(number)
    job.mkdir()
    fields = {"name": given["job-name"], "call": shlex.join([script, *arguments]), "output": given["output"]}
    given_again = " ".join(f"--{name}={value}" for name, value in given.items())
    for field, value in {**fields, "options": given_again, "state": "PENDING", "restarts": 0}.items():
        write(job, field, value)
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.Popen([sys.executable, __file__, "node", job.name], start_new_session=True, **nowhere)
    print(number)


def node(root, words):
    """Run a job: the batch script, again after a requeue."""
    job = root / words[0]
    while True:
        while (root / "hold").exists() and read(job, "state") == "PENDING":
            time.sleep(STEP_S)
        if read(job, "state") != "PENDING":
            return
        environment = {
            **os.environ, "SLURM_JOB_ID": job.name, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_ON_NODE": "1", "SLURM_RESTART_COUNT": read(job, "restarts"),
        }  # fmt: skip
        with open(read(job, "output").replace("%%", "%"), "a") as output:
            call = ["bash", *shlex.split(read(job, "call"))]
            script = subprocess.Popen(call, env=environment, stdout=output, stderr=output, process_group=0)
            write(job, "group", script.pid)
            write(job, "state", "RUNNING")
            status = wait_for_all(script)
        if read(job, "state") == "CANCELLED":
            return
        if not (job / "requeue").exists():
            write(job, "state", "FAILED" if status else "COMPLETED")
            return
        (job / "requeue").unlink()
        write(job, "restarts", int(read(job, "restarts")) + 1)
        write(job, "state", "PENDING")
        time.sleep(float(os.environ.get("REQUEUE_S", "1")))


def squeue(root, words):
    given, _ = options(words)
    assert given["states"] == "all" and "noheader" in given
    if "name" in given:
        print(*(job.name for job in root.iterdir() if read(job, "name") == given["name"]), sep="\n")
        return
    job = root / given["jobs"]
    if not job.is_dir() or (job / "forgotten").exists():
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    assert given["format"] == "%T %r"
    print(read(job, "state"), "Priority" if read(job, "state") == "PENDING" else "None")


def sacct(root, words):
    given, _ = options(words)
    state = read(root / given["jobs"], "state")
    print("CANCELLED by 1000" if state == "CANCELLED" else state)


def scontrol(root, words):
    if words[0] == "show":
        print("127.0.0.1", "127.0.0.1", sep="\n")
        return
    (root / words[1] / "requeue").touch()
    stop(root / words[1])


def scancel(root, words):
    job = root / words[0]
    state = read(job, "state")
    if state in ("PENDING", "RUNNING"):
        write(job, "state", "CANCELLED")
    if state == "RUNNING":
        stop(job)


def stop(job):
    """Send SIGTERM to all processes of a job, as Slurm does."""
    with suppress(ProcessLookupError):
        os.killpg(int(read(job, "group")), signal.SIGTERM)


def wait_for_all(script):
    """Wait until all processes of a job have ended, and return the status of its batch script."""
    status = script.wait()
    with suppress(ProcessLookupError):
        while True:
            os.killpg(script.pid, 0)
            time.sleep(STEP_S)
    return status


def srun(_, words):
    given, words = options(words)
    assert given["ntasks-per-node"] == "1" and "kill-on-bad-exit" in given
    nodes = [subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(number)}) for number in range(2)]
    signal.signal(signal.SIGTERM, lambda *_: [each.terminate() for each in nodes])
    sys.exit(max(each.wait() for each in nodes))


if __name__ == "__main__":
    folder, name = Path(os.environ["CLUSTER"]), sys.argv[1]
    if fault := read(folder, f"fault.{name}"):
        sys.exit(fault)
    globals()[name](folder, sys.argv[2:])
