"""A step that its recipe has launched: two processes train it, the pipeline goes on as if it had run in place."""

import io
import json
import os
import re
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from small_runs import RECIPE, ROOT, Told, metrics, run, written

from align.cli import main
from align.distributed.progress import RESOURCES
from align.errors import RunError

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

LAUNCH = "steps.sft.launch=launch/ddp-cpu-2.yaml"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The recipe run in this process, and with its second step launched."""
    alone, launched = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("launched")
    return (alone, *run(alone)), (launched, *run(launched, LAUNCH))


def test_two_processes_leave_what_one_does(both):
    (alone, made, _), (launched, made_by_two, told) = both
    for step in ("sft", "dpo"):
        losses, losses_of_two = ([line["loss"] for line in metrics(folder, step)] for folder in (alone, launched))
        assert losses == pytest.approx(losses_of_two, rel=0, abs=2e-6)
    assert made_by_two["sft"].keys() == made["sft"].keys()
    assert made_by_two["sft"]["fingerprint"] == made["sft"]["fingerprint"]  # where it runs is no part of what it is
    kept = json.loads((launched / "runs/small/sft/manifest.json").read_text())
    assert kept == made_by_two["sft"]
    assert (kept["ledger"]["devices"], made["sft"]["ledger"]["devices"]) == (2, 1)
    num_weights = made["base"]["weights"]
    assert kept["ledger"]["wire_bytes"] == 6 * num_weights * 4  # six steps, each half of the gradient out and in
    assert made["sft"]["ledger"]["wire_bytes"] == 0
    names = {path.name for path in (launched / "runs/small/sft").iterdir()}
    assert names == {path.name for path in (alone / "runs/small/sft").iterdir()} | {"launch.log"}


def test_the_progress_of_the_children_is_passed_on(both):
    _, (launched, _, told) = both
    assert [line["step"] for line in told.steps] == [1, 2, 3, 4, 5, 6, 1, 2, 3]
    used = set(RESOURCES) - {"peak_memory_bytes"}
    steps = [{name: value for name, value in line.items() if name not in used} for line in told.steps[:6]]
    assert steps == metrics(launched, "sft")
    assert ("sft", "running") in told.states and ("sft", "finished") in told.states


@pytest.mark.usefixtures("forked_launches")
def test_a_child_that_fails_is_one_line_with_status_one_and_the_step_goes_on_later(tmp_path):
    path = written(tmp_path)
    broken = "steps.sft.train.learning_rate=1.0e+30"  # the loss is no number after a step or two
    stderr = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["align", "run", str(path), LAUNCH, broken])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    last = stderr.getvalue().splitlines()[-1]
    assert last.startswith("align: sft: accelerate launch exited with status 1: align: optimizer step ")
    assert "the weights are unchanged; see " in last and last.endswith("sft.partial/launch.log")
    assert "Traceback" not in stderr.getvalue()
    assert not (tmp_path / "runs/small/sft").exists()
    made, told = run(tmp_path)
    assert "sft: restarts because its unfinished attempt had other settings or inputs" in told.notes
    assert set(made) == {"base", "sft", "dpo"}


class Edits(Told):
    """A reporter that edits the recipe when a step begins."""

    def watch(self, step, state):
        super().watch(step, state)
        if (step, state) == ("sft", "running"):
            written(self.folder, RECIPE.replace("limit: 24", "limit: 20"))


def test_an_edit_of_the_recipe_before_a_launch_is_reported(tmp_path):
    told = Edits()
    told.folder = tmp_path
    with pytest.raises(RunError) as error:
        run(tmp_path, "steps.sft.launch=launch/cpu-1.yaml", told=told)
    reason = "align: step 'sft': the recipe, or a file that it names, has changed since the run began"
    assert f"exited with status 1: {reason}" in str(error.value)


class Stops(Told):
    """A reporter that has this process told to stop after the third optimizer step."""

    def advance(self, units, metrics=None):
        super().advance(units, metrics)
        if len(self.steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("forked_launches")
@pytest.mark.parametrize("launch", ["cpu-1", "ddp-cpu-2"])
def test_a_pipeline_that_is_told_to_stop_tells_its_children_who_keep_their_step(tmp_path, launch):
    longer = "steps.sft.train.epochs=40000"  # 240,000 steps, and no checkpoint is due before a quarter of an hour
    with pytest.raises(RunError, match="^sft: .*SIGTERM: saved a checkpoint after step") as stopped:
        run(tmp_path, f"steps.sft.launch=launch/{launch}.yaml", longer, told=Stops())
    step = re.search(r"after step (\d+) of 240000", str(stopped.value))[1]
    working = tmp_path / "runs/small/sft.partial"
    assert (working / f"checkpoint-{step}").is_dir()
    assert len((working / "metrics.jsonl").read_text().splitlines()) == int(step)


def test_what_a_child_has_finished_is_not_trained_again_when_its_pipeline_is_gone(tmp_path, both):
    """As after a kill of the pipeline whose child went on: the last file of that is there, and nothing is launched."""
    _, (launched, made, _) = both
    folder = tmp_path / "runs/small"
    run(tmp_path, "steps.sft.train.max_steps=1")  # for a base
    finished = launched / "runs/small/sft"
    os.rename(folder / "sft", folder / "sft.partial")
    for file in finished.iterdir():
        if file.name != "manifest.json":
            (folder / "sft.partial" / file.name).write_bytes(file.read_bytes())
    (folder / "sft.partial/manifest.json").write_text(json.dumps({"fingerprint": made["sft"]["fingerprint"]}))
    of_pipeline = ("step", "key", "inputs", "fingerprint", "build_id", "input_build_ids")
    content = {name: value for name, value in made["sft"].items() if name not in of_pipeline}
    (folder / "sft.partial/content.json").write_text(json.dumps(content))
    again, told = run(tmp_path, LAUNCH)
    assert not any("accelerate launch" in note for note in told.notes)
    assert {name: value for name, value in again["sft"].items() if name not in ("build_id", "input_build_ids")} == {
        name: value for name, value in made["sft"].items() if name not in ("build_id", "input_build_ids")
    }
    assert not (folder / "sft/content.json").exists()
