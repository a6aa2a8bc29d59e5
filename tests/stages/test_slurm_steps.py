"""A step that `align run` submits to Slurm, with stand-ins for Slurm's commands (`slurm_cluster.py`)."""

import os
import re
import signal
import sys
import time
from contextlib import suppress

import pytest
from slurm_cluster import Cluster
from small_runs import ROOT, Told, metrics, run, written

from align.artifacts import working_folder, write_json
from align.distributed import slurm
from align.errors import InputError, RunError
from align.workflow.recipe.inputs import check_inputs
from align.workflow.recipe.load import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAUNCH = "steps.sft.launch=launch/ddp-cpu-2.yaml"
TWO_NODES = [LAUNCH, "steps.sft.slurm={}"]
LONG = ["steps.sft.train.epochs=20"]  # of six steps each
NUM_STEPS = 120
HELD = ROOT / "tests/held.py"
# In the place of slurm.sbatch: the step in one process, without a launcher
ONE_PROCESS = """\
test "$1" = --config_file; shift 2
echo "slurm.sbatch: job $SLURM_JOB_ID starts" >&2
recipe=$1 step=$2
shift 2
exec python {held} steps 60 "{file}" train "$recipe" --step "$step" "$@"
"""
# In the place of `accelerate`: the same launch of the step
ACCELERATE = """\
#!{python}
import os, sys
from pathlib import Path
words = sys.argv[1:]
at = words.index("-m")
words[at : at + 2] = ["{held}", "steps", "60", "{file}"]
real = str(Path(sys.executable).with_name("accelerate"))
os.execv(real, [real, *words])
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    made = Cluster(tmp_path / "cluster", monkeypatch)
    for name, seconds in {"QUEUE_POLL_S": 0.2, "LOOK_S": 0.05, "VISIBLE_S": 0.5}.items():
        monkeypatch.setattr(slurm, name, seconds)
    yield made
    made.close()


@pytest.fixture
def until_acted(tmp_path):
    """A file during whose life a job does not come to its end: it waits at half of its steps."""
    path = tmp_path / "until-acted"
    path.touch()
    return path


@pytest.fixture
def one_process(tmp_path, until_acted):
    path = tmp_path / "one.sbatch"
    path.write_text(ONE_PROCESS.format(held=HELD, file=until_acted))
    return [LAUNCH, f"steps.sft.slurm.script={path}"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of the step without a launch."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *LONG, until="sft")
    return [line["loss"] for line in metrics(folder, "sft")]


class Acting(Told):
    """A reporter that acts once, after the tenth optimizer step that it is told of."""

    def __init__(self, action):
        super().__init__()
        self._action = action

    def advance(self, units, metrics=None):
        super().advance(units, metrics)
        if len(self.steps) == 10:
            self._action()


def interrupt():
    """As Ctrl-C does."""
    raise KeyboardInterrupt


def losses(folder):
    return [line["loss"] for line in metrics(folder, "sft")]


def test_two_nodes_that_are_requeued_do_what_one_process_does_and_the_run_goes_on(
    tmp_path, cluster, alone, until_acted
):
    launcher = cluster.folder / "bin" / "accelerate"
    launcher.write_text(ACCELERATE.format(python=sys.executable, held=HELD, file=until_acted))
    launcher.chmod(0o755)

    def requeue():
        cluster.hold()
        cluster.call("scontrol", "requeue", cluster.jobs[0])

    class Requeuing(Acting):
        def note(self, text):
            super().note(text)
            if "requeued, pending" in text:
                until_acted.unlink()
                cluster.hold(False)

    told = Requeuing(requeue)
    made, _ = run(tmp_path, *TWO_NODES, *LONG, told=told)
    assert set(made) == {"base", "sft", "dpo"}
    assert losses(tmp_path) == pytest.approx(alone, rel=0, abs=2e-6)
    (job,) = cluster.jobs
    assert cluster.of(job, "restarts") == "1"
    said = [note.removeprefix(f"sft: Slurm job {job}: ") for note in told.notes if f"job {job}:" in note]
    states = [note for note in said if note != "completing"]
    assert [note for note in states if "pending (" not in note] == ["running", "running", "ended as COMPLETED"]
    assert "requeued, pending (Priority)" in states
    shown = [line["step"] for line in told.steps if "loss/preference" not in line]
    assert set(shown) == {*range(1, NUM_STEPS + 1)}
    assert made["sft"]["ledger"]["devices"] == 2
    finished = tmp_path / "runs/small/sft"
    assert not {"slurm.json", "content.json"} & {path.name for path in finished.iterdir()}
    log = (finished / "launch.log").read_text()
    assert re.findall(rf"job {job} starts on \S+, restart (\d)", log) == ["0", "1"]
    assert "SIGTERM" in log
    run(tmp_path, *TWO_NODES, *LONG)
    assert cluster.jobs == [job]  # a finished step is not submitted


def test_after_a_kill_and_after_ctrl_c_a_rerun_waits_for_the_same_job(
    tmp_path, cluster, one_process, alone, until_acted
):
    cluster.hold()
    run(tmp_path, *one_process, *LONG, until="base")
    child = os.fork()  # which computes nothing while the job is pending
    if not child:
        with suppress(BaseException):
            run(tmp_path, *one_process, *LONG, until="sft")
        os._exit(1)
    record, deadline = tmp_path / "runs/small/sft.partial" / slurm.JOB_FILE, time.monotonic() + 300
    while '"job"' not in (record.read_text() if record.exists() else ""):
        assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (job,) = cluster.jobs
    for overrides, reason in {
        (LAUNCH, *LONG): "Slurm job {} of an earlier call is pending, and this call does not wait for it",
        (*one_process, "steps.sft.train.epochs=1"): "cancel it first: scancel {}",
    }.items():
        with pytest.raises(RunError, match=reason.format(job)):
            run(tmp_path, *overrides)
    cluster.hold(False)
    told = Acting(interrupt)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        run(tmp_path, *one_process, *LONG, told=told, until="sft")
    assert interrupted.value.__notes__ == [
        f"which waits for Slurm job {job}; to cancel the job instead: scancel {job}",
        "a rerun of the same command resumes at step 'sft'",
    ]
    assert cluster.of(job, "state") == "RUNNING"
    until_acted.unlink()
    again = run(tmp_path, *one_process, *LONG, until="sft")[1]
    assert again.steps[-1]["step"] == NUM_STEPS
    assert cluster.jobs == [job]
    assert not any("submitted" in note for note in [*told.notes, *again.notes])
    assert losses(tmp_path) == alone


def test_a_failed_job_is_one_line_with_its_log(tmp_path, cluster):
    (tmp_path / "fails.sbatch").write_text('echo warning: no file\necho "align: no number; stop" >&2\nexit 3\n')
    with pytest.raises(RunError) as error:
        run(tmp_path, LAUNCH, f"steps.sft.slurm.script={tmp_path}/fails.sbatch")
    (job,) = cluster.jobs
    log = tmp_path / "runs/small/sft.partial/launch.log"
    assert str(error.value) == f"sft: Slurm job {job} ended as FAILED: align: no number; stop; see {log}"


def test_a_cancelled_job_says_so_and_a_rerun_submits_another_that_resumes(
    tmp_path, cluster, one_process, alone, until_acted
):
    with pytest.raises(RunError, match=r"sft: Slurm job \d+ ended as CANCELLED: align: .*SIGTERM: saved a checkpoint"):
        run(tmp_path, *one_process, *LONG, told=Acting(lambda: cluster.call("scancel", cluster.jobs[0])))
    until_acted.unlink()
    told = run(tmp_path, *one_process, *LONG, until="sft")[1]
    assert len(cluster.jobs) == 2
    assert told.steps[0]["step"] > 1
    assert losses(tmp_path) == alone


def test_a_recipe_that_has_changed_while_its_job_was_pending_is_an_error(tmp_path, cluster, one_process):
    class Editing(Told):
        def note(self, text):
            super().note(text)
            if "pending" in text:
                path = tmp_path / "small.yaml"
                path.write_text(path.read_text().replace("prompts_per_step: 4", "prompts_per_step: 8"))
                cluster.hold(False)

    cluster.hold()
    reason = "step 'sft': the recipe, or a file that it names, has changed since the run began; rerun the same command"
    with pytest.raises(RunError, match=reason):
        run(tmp_path, *one_process, told=Editing())


def test_slurm_needs_a_launch_file_its_script_and_sbatch(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="steps.sft.slurm: a job of Slurm starts a launch file on each machine: set"):
        load_recipe(path, ["steps.sft.slurm={}"])
    monkeypatch.setenv("PATH", str(tmp_path))
    overrides = [LAUNCH, "steps.sft.slurm.script=other.sbatch"]
    with pytest.raises(InputError) as error:
        check_inputs(load_recipe(path, overrides), path, overrides)
    missing = [line.partition(": ")[2] for line in str(error.value).splitlines()]
    assert "steps.sft.slurm.script: other.sbatch: No such file or directory" in missing
    assert any(line.startswith("steps.sft.slurm: sbatch: no such command; run this where jobs are") for line in missing)


def test_where_a_step_runs_is_no_part_of_what_it_is(tmp_path):
    path = written(tmp_path)
    keys = [
        [step.key for step in load_recipe(path, overrides).pipeline()]
        for overrides in ([], [LAUNCH, "steps.sft.slurm.options=[--nodes=2]"])
    ]
    assert keys[0] == keys[1]


def test_what_this_machine_lacks_is_no_error_of_a_step_that_runs_on_others(tmp_path, monkeypatch):
    def refuse(device):
        raise InputError(f"not on this {device}")

    monkeypatch.setattr("align.train.sharding.products.check_products", refuse)
    path, overrides = written(tmp_path), [LAUNCH, "steps.sft.train.precision=bf16-products"]
    with pytest.raises(InputError, match="not on this cpu"):
        load_recipe(path, overrides).steps["sft"].check_machine()
    load_recipe(path, [*overrides, "steps.sft.slurm={}"]).steps["sft"].check_machine()


def test_a_recorded_job_whose_state_cannot_be_asked_is_one_line_that_names_its_record(tmp_path, monkeypatch):
    record = working_folder(load_recipe(written(tmp_path)).root / "sft") / slurm.JOB_FILE
    record.parent.mkdir(parents=True)
    monkeypatch.setenv("PATH", "/nowhere")
    write_json(record, {"name": "align-sft-1", "job": "17"})
    with pytest.raises(RunError) as caught:
        run(tmp_path, until="sft")
    assert str(caught.value) == (
        "sft: squeue: no such command, so that the state of a Slurm job is unknown; run this where Slurm is installed; "
        f"if its job has ended, delete {record}"
    )
