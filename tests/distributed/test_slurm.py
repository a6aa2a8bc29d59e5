"""Jobs of Slurm: what is submitted, recorded and asked, with stand-ins for its commands."""

import json
import os
import shlex
import time

import pytest
from slurm_cluster import Cluster

from align.config import build
from align.distributed import slurm
from align.errors import InputError, RunError

SCRIPT = "#!/usr/bin/env bash\n"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    made = Cluster(tmp_path / "cluster", monkeypatch)
    monkeypatch.setattr(slurm, "QUEUE_POLL_S", 0.05)
    monkeypatch.setattr(slurm, "LOOK_S", 0.02)
    monkeypatch.setattr(slurm, "VISIBLE_S", 0.5)
    yield made
    made.close()


@pytest.fixture
def working(tmp_path):
    folder = tmp_path / "100% mine"
    folder.mkdir()
    return folder


def submit(working, script=SCRIPT, *arguments, options=()):
    path = working / "job.sbatch"
    path.write_text(script)
    settings = slurm.SlurmSettings(script=str(path), options=list(options))
    return slurm.submit(settings, arguments, dict(os.environ), log=working / "launch.log", step="sft")


def until_there(path):
    """A script that waits for a file."""
    return f"until [ -e {shlex.quote(str(path))} ]; do sleep 0.05; done\n"


def wait(job, *, is_complete=lambda: False):
    notes = []
    state = slurm.wait(job, "sft", is_complete=is_complete, look=lambda: None, note=notes.append)
    return state.name, [note.removeprefix(f"sft: Slurm job {job}: ") for note in notes]


def test_a_job_has_its_options_arguments_log_and_record(cluster, working):
    job = submit(working, 'echo "$@"\n', "RECIPE", "a b", options=["--nodes=2", "--hold"])
    assert wait(job, is_complete=lambda: True)[0] == "COMPLETED"
    assert (working / "launch.log").read_text() == "RECIPE a b\n"  # % in a path is no pattern of Slurm
    assert cluster.of(job, "options").startswith("--parsable= --nodes=2 --hold= --job-name=align-sft-")
    assert slurm.recorded_job(working) == job


def test_a_refused_submission_shows_what_sbatch_says(cluster, working):
    said = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed"
    cluster.fault("sbatch", said)
    with pytest.raises(RunError, match="^sft: sbatch exited with status 1: " + said.replace("\n", " ") + "$"):
        submit(working)
    assert slurm.recorded_job(working) is None


def test_a_job_of_which_only_the_name_was_recorded_is_found(cluster, working):
    """As after a kill between the two records, or where sbatch gave up on a job that was accepted."""
    cluster.hold()
    job = submit(working)
    record = working / slurm.JOB_FILE
    record.write_text(json.dumps({"name": json.loads(record.read_text())["name"]}))
    assert slurm.recorded_job(working) == job
    record.write_text(json.dumps({"name": "align-sft-other"}))
    assert slurm.recorded_job(working) is None
    cluster.fault("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(RunError, match="^squeue: slurm_load_jobs error: Unable to contact"):
        slurm.recorded_job(working)  # it may be there


def test_every_state_of_a_job_is_noted_with_its_requeue(cluster, working):
    job = submit(working, until_there(working / "go"))
    notes = []

    def act(note):
        notes.append(note.removeprefix(f"sft: Slurm job {job}: "))
        if notes[-1] == "running" and notes.count("running") == 1:
            cluster.hold()
            cluster.call("scontrol", "requeue", job)
        elif notes[-1].startswith("requeued"):
            cluster.hold(False)
        elif notes[-1] == "running":
            (working / "go").touch()

    state = slurm.wait(job, "sft", is_complete=lambda: True, look=lambda: None, note=act)
    assert state.name == "COMPLETED"
    own = notes[1:] if notes[0].startswith("pending") else notes
    assert own == ["running", "requeued, pending (Priority)", "running", "ended as COMPLETED"]


def test_while_slurm_does_not_answer_a_job_is_waited_for(cluster, working):
    job = submit(working, until_there(working / "go"))
    line = "slurm_load_jobs error: Socket timed out on send/recv operation"
    cluster.fault("squeue", line)
    with pytest.raises(RunError, match=f"^squeue: {line}$"):
        slurm.job_state(job)
    notes = []

    def act(note):
        notes.append(note.removeprefix(f"sft: Slurm job {job}: "))
        if notes[-1].startswith("state unknown"):
            cluster.fault("squeue", "")
        elif notes[-1] == "running":
            (working / "go").touch()

    state = slurm.wait(job, "sft", is_complete=lambda: False, look=lambda: None, note=act)
    assert notes[0] == f"state unknown, asking again every 0.05 s: squeue: {line}"
    assert (state.name, notes[-1]) == ("COMPLETED", "ended as COMPLETED")


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "UNKNOWN"])
def test_of_a_job_that_has_left_the_queue_accounting_knows_the_state(cluster, working, state):
    cluster.hold()
    job = submit(working)
    if state == "CANCELLED":
        cluster.call("scancel", job)
    elif state == "UNKNOWN":
        cluster.fault("sacct", "Slurm accounting storage is disabled")
    else:
        (cluster.folder / job / "state").write_text("FAILED")
    (cluster.folder / job / "forgotten").touch()
    assert slurm.job_state(job) == (state, "")
    assert slurm.job_state(job).is_ended


@pytest.mark.parametrize("is_visible", [True, False])
def test_what_a_finished_job_has_written_may_become_visible_late(cluster, working, monkeypatch, is_visible):
    monkeypatch.setattr(slurm, "VISIBLE_S", 1e6 if is_visible else 0.5)
    job, looks = submit(working), []
    began = time.monotonic()
    state, _ = wait(job, is_complete=lambda: looks.append(job) or is_visible and len(looks) == 3)
    assert state == "COMPLETED"
    if is_visible:
        assert len(looks) == 3
    else:
        assert time.monotonic() - began > slurm.VISIBLE_S


@pytest.mark.parametrize("state", [*slurm.ENDED, "PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE_HOLD"])
def test_only_jobs_that_will_not_run_again_have_ended(state):
    assert slurm.JobState(state).is_ended == (state in slurm.ENDED)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-N2", "write an option of sbatch as --name=value or --name, not '-N2'"),
        ("x", "write an option of sbatch as --name=value or --name, not 'x'"),
        ("--output=x.log", "--output=x.log: align decides --output of the job; leave it out"),
        ("--arr=0-3", "--arr=0-3: align decides --arr of the job; leave it out"),
        ("--wait", "--wait: align decides --wait of the job; leave it out"),
    ],
)
def test_an_option_that_would_hide_the_job_is_an_error(option, message):
    with pytest.raises(InputError) as error:
        build(slurm.SlurmSettings, {"options": ["--nodes=2", option]}, ("slurm",))
    assert str(error.value) == f"slurm.options.1: {message}"


@pytest.mark.parametrize("option", ["--nodes=2", "--account=a,b=c", "--exclusive", "--export-file=f", "--time=1:00:00"])
def test_other_options_are_accepted(option):
    assert build(slurm.SlurmSettings, {"options": [option]}).options == [option]


def test_a_job_that_is_submitted_from_a_job_does_not_inherit_what_slurm_set_for_that(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CONF", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "1")
    assert {"SLURM_CONF", "SBATCH_ACCOUNT"} <= slurm.submission_environment().keys()
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS"} & slurm.submission_environment().keys()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert slurm.submission_environment() == dict(os.environ)
