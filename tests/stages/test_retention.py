"""Policies whose weights are removed once nothing reads them: what stays, what comes back, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from forked import fork_launches
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from small_runs import RECIPE, ROOT, Told, run, written
from typer.testing import CliRunner

from align import artifacts
from align.cli import app
from align.errors import InputError
from align.models.hub import push_folder
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.report.run_folder import read_run
from align.workflow.recipe.retention import KeepBest

TASKS = "tasks: {{held: {{data: held, task: nll}}}}"
RECIPE = RECIPE.replace("steps:\n", '  held: {{path: "tasks:general", limit: 6}}\nsteps:\n')
EVALUATED = RECIPE + f"  evaluate: {{{{stage: evaluate, policies: [dpo], {TASKS}}}}}\n"
MORE = RECIPE + f"  evaluate: {{{{stage: evaluate, policies: [sft, dpo], {TASKS}}}}}\n"
ALL = RECIPE + f"  evaluate: {{{{stage: evaluate, policies: all, {TASKS}}}}}\n"
POLICIES = ("base", "sft", "dpo")


class EndsInSft(Told):
    """A reporter that ends the run in the second optimizer step of SFT, as an interrupt does."""

    def advance(self, units, metrics=None):
        super().advance(units, metrics)
        if metrics and metrics["step"] == 2:
            raise KeyboardInterrupt


def with_weights(folder):
    """The steps of a run whose folders hold weights."""
    return {path.parent.name for path in (folder / "runs/small").glob("*/*.safetensors")}


def ran(told):
    return [step for step, state in told.states if state == "running"]


def manifest(folder, step):
    return json.loads((folder / "runs/small" / step / "manifest.json").read_text())


def copied(folder, tmp_path):
    shutil.copytree(folder / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path / "runs/small"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that keeps all weights."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, text=ALL)
    return folder


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    """A run that keeps the last policy only."""
    folder = tmp_path_factory.mktemp("last")
    made, told = run(folder, "keep=last", text=EVALUATED)
    return folder, made, told


def test_only_weights_of_earlier_policies_are_removed(last, whole):
    folder, made, told = last
    assert with_weights(folder) == {"dpo"} and with_weights(whole) == set(POLICIES)
    for step in POLICIES:
        files = {path.name for path in (folder / "runs/small" / step).iterdir()}
        expected = {path.name for path in (whole / "runs/small" / step).iterdir()}
        assert files == (expected if step == "dpo" else expected - {"model.safetensors"})
    assert made["sft"]["removed"]["files"] == ["model.safetensors"] and "removed" not in made["dpo"]
    assert [note for note in told.notes if "removed" in note] == [
        "base: its weights were removed (keep: last)",
        "sft: its weights were removed (keep: last)",
    ]


def test_a_finished_run_stays_finished_and_is_verified_and_reported(last):
    folder = last[0]
    _, told = run(folder, "keep=last", text=EVALUATED)
    assert ran(told) == []
    assert "sft: finished before, skipped; its weights were removed (keep: last)" in told.notes
    root = folder / "runs/small"
    ended = CliRunner().invoke(app, ["verify", str(root)])
    assert ended.exit_code == 0, ended.output
    assert "sft: " in ended.output and "weights were removed (keep: last)" in ended.output
    assert CliRunner().invoke(app, ["report", str(root), "--markdown"]).exit_code == 0
    assert {step.state for step in read_run(root).steps} == {"finished"}
    assert set(json.loads((root / "ledger.json").read_text())["steps"]) == {*POLICIES, "evaluate-dpo"}
    assert set(json.loads((root / "table.json").read_text())) == {"dpo"}


def test_what_unfinished_steps_read_is_kept(tmp_path):
    run(tmp_path, "keep=last", text=EVALUATED, until="sft")
    assert with_weights(tmp_path) == {"sft"}  # dpo is still to read it; base has been read
    run(tmp_path, "keep=last", text=EVALUATED)
    assert with_weights(tmp_path) == {"dpo"}


def test_a_later_evaluation_makes_only_what_it_needs_again(last, whole, tmp_path):
    root = copied(last[0], tmp_path)
    before = manifest(tmp_path, "dpo")
    made, told = run(tmp_path, "keep=last", text=MORE)
    assert ran(told) == ["base", "sft", "evaluate-sft"]
    for step, reader in (("base", "sft"), ("sft", "evaluate-sft")):
        note = f"{step}: its weights were removed (keep: last); the step runs again because {reader!r} reads them"
        assert note in told.notes
    assert made["dpo"] == before and with_weights(tmp_path) == {"dpo"}
    scores = json.loads((whole / "runs/small/table.json").read_text())
    assert json.loads((root / "table.json").read_text())["sft"] == scores["sft"]
    assert ran(run(tmp_path, "keep=last", text=MORE)[1]) == []


@pytest.mark.slow
def test_other_weights_than_those_that_were_removed_make_the_readers_run_again(last, tmp_path):
    root = copied(last[0], tmp_path)
    known = manifest(tmp_path, "sft")
    known["files"]["model.safetensors"]["sha256"] = "0" * 64  # as if the step had run on another machine
    (root / "sft/manifest.json").write_text(json.dumps(known))
    _, told = run(tmp_path, "keep=last", text=MORE)
    assert "sft: differs from what was removed, so the steps that read it run again" in told.notes
    assert ran(told) == ["base", "sft", "evaluate-sft", "dpo", "evaluate-dpo"]
    assert with_weights(tmp_path) == {"dpo"}


def test_a_requested_rerun_makes_its_inputs_again(last, tmp_path):
    copied(last[0], tmp_path)
    recipe = str(written(tmp_path, EVALUATED))
    ended = CliRunner().invoke(app, ["run", recipe, "--rerun-from", "dpo", "keep=all"])
    assert ended.exit_code == 0, ended.output
    assert with_weights(tmp_path) == set(POLICIES)
    assert "removed" not in manifest(tmp_path, "sft")


def test_weights_that_were_removed_are_refused_outside_of_the_run_in_one_line(last, tmp_path):
    folder = last[0] / "runs/small/sft"
    message = "its weights were removed (keep: last); to get them back, make the step again"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Say a."}\n')
    generate = ["generate", "--policy", str(folder), "--data", str(rows), "--out", str(tmp_path / "out.jsonl")]
    for command in (generate, ["chat", str(folder)]):
        ended = CliRunner().invoke(app, command, input="hello\n")
        assert isinstance(ended.exception, InputError)
        assert message in str(ended.exception) and "\n" not in str(ended.exception)
        assert "--rerun-from sft" in str(ended.exception)
    with pytest.raises(InputError, match="weights were removed"):
        load_policy(PolicySettings(path=str(folder)))
    with pytest.raises(InputError, match="weights were removed"):
        push_folder(folder, "owner/name", dry_run=True)
    text = RECIPE.replace("base: {{stage: import, vocab_size: 300}}", f"base: {{{{stage: import, path: {folder}}}}}")
    ended = CliRunner().invoke(app, ["check", str(written(tmp_path, text))])
    assert f"steps.base.path: {folder}: {message}" in str(ended.exception)


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_best_policy_by_a_metric_is_kept(tmp_path, whole, better):
    root = copied(whole, tmp_path)
    scores = json.loads((root / "table.json").read_text())
    expected = (min if better == "lower" else max)(POLICIES, key=lambda name: scores[name]["held nll"]["value"])
    own = ["keep.greater_is_better=true"] if better == "higher" else []
    _, told = run(tmp_path, "keep.best=held.nll", *own, text=ALL)
    assert ran(told) == [] and with_weights(tmp_path) == {expected}
    gone = [note.partition(":")[0] for note in told.notes if "were removed (keep: best held.nll)" in note]
    assert sorted(gone) == sorted(set(POLICIES) - {expected})


def test_a_metric_that_no_policy_is_evaluated_by_is_an_error_of_the_recipe(tmp_path):
    with pytest.raises(InputError, match=r"keep\.best: no policy is evaluated by 'held.nl'; did you mean 'held\.nll'"):
        run(tmp_path, "keep.best=held.nl", text=EVALUATED)
    with pytest.raises(InputError, match=r"keep\.best: .*no step of the stage evaluate"):
        run(tmp_path, "keep.best=held.nll")


def test_a_kill_between_mark_and_deletion_leaves_a_consistent_run(whole, tmp_path, monkeypatch):
    root = copied(whole, tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "unlink_own", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "keep=last", text=ALL)
    marked = [step for step in POLICIES if "removed" in manifest(tmp_path, step)]
    assert len(marked) == 1 and with_weights(tmp_path) == set(POLICIES)
    assert CliRunner().invoke(app, ["verify", str(root)]).exit_code == 0
    with pytest.raises(InputError, match="weights were removed"):
        load_policy(PolicySettings(path=str(root / marked[0])))
    _, told = run(tmp_path, "keep=all", text=ALL)  # the mark holds, whatever the recipe says now
    assert ran(told) == [] and with_weights(tmp_path) == set(POLICIES) - set(marked)
    run(tmp_path, "keep=last", text=ALL)
    assert with_weights(tmp_path) == {"dpo"}


@pytest.mark.slow
def test_a_kill_while_a_removed_policy_is_made_again_is_resumed(last, tmp_path):
    root = copied(last[0], tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "keep=last", text=MORE, told=EndsInSft())
    assert with_weights(tmp_path) >= {"base", "dpo"} and "removed" in manifest(tmp_path, "sft")
    assert CliRunner().invoke(app, ["verify", str(root)]).exit_code == 0
    _, told = run(tmp_path, "keep=last", text=MORE)
    assert ran(told) == ["sft", "evaluate-sft"] and with_weights(tmp_path) == {"dpo"}


def test_nothing_behind_a_link_is_removed(whole, tmp_path):
    root = copied(whole, tmp_path)
    shutil.move(root / "base", tmp_path / "base")
    (root / "base").symlink_to(tmp_path / "base")
    shutil.move(root / "sft/model.safetensors", tmp_path / "sft.safetensors")
    (root / "sft/model.safetensors").symlink_to(tmp_path / "sft.safetensors")
    run(tmp_path, "keep=last", text=ALL)
    assert with_weights(tmp_path) == set(POLICIES)
    assert (tmp_path / "base/model.safetensors").is_file() and (tmp_path / "sft.safetensors").is_file()
    assert all("removed" not in manifest(tmp_path, step) for step in POLICIES)


@pytest.mark.slow
def test_a_copy_of_a_model_from_outside_of_the_run_is_kept(whole, tmp_path):
    model = whole / "runs/small/base"
    text = EVALUATED.replace("base: {{stage: import, vocab_size: 300}}", f"base: {{{{stage: import, path: {model}}}}}")
    run(tmp_path, "keep=last", text=text)
    assert with_weights(tmp_path) == {"base", "dpo"}
    assert (model / "model.safetensors").is_file()


@pytest.mark.parametrize("adapters", ["stacked", "continued"])
def test_the_base_under_kept_adapters_is_kept_and_the_earlier_adapters_go(tmp_path, adapters):
    lora = ["policy.lora.rank=2", f"policy.lora.adapters={adapters}", "policy.lora.targets=[q_proj]"]
    run(tmp_path, "keep=last", *lora, text=EVALUATED)
    assert with_weights(tmp_path) == {"base", "dpo"}
    root = tmp_path / "runs/small"
    assert not (root / "sft/adapter_model.safetensors").exists() and (root / "sft/adapter_config.json").is_file()
    model = AutoPeftModelForCausalLM.from_pretrained(str(root / "dpo"))
    saved = load_file(root / "dpo/adapter_model.safetensors")
    loaded = {name.replace(".default.", "."): value for name, value in model.state_dict().items() if "lora_" in name}
    assert loaded.keys() == saved.keys() and all(loaded[name].equal(saved[name]) for name in saved)
    assert CliRunner().invoke(app, ["verify", str(root)]).exit_code == 0


# The order of a set in a process depends on PYTHONHASHSEED
@pytest.mark.slow
def test_another_process_makes_the_same_adapters_again(tmp_path):
    how = ["keep=last", "policy.lora.rank=2", "policy.lora.adapters=stacked"]
    run(tmp_path, *how, text=EVALUATED)
    command = [sys.executable, "-m", "align", "run", str(written(tmp_path, MORE)), *how]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert "dpo: finished before, skipped" in ended.stderr and "differs" not in ended.stderr
    assert "sft: its weights were removed (keep: last); the step runs again" in ended.stderr


@pytest.mark.slow
def test_another_launch_makes_the_same_policy_again(tmp_path, monkeypatch):
    how = ["keep=last", "steps.sft.launch=launch/ddp-cpu-2.yaml"]
    with monkeypatch.context() as patch:
        fork_launches(patch)
        run(tmp_path, *how, text=EVALUATED)
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    _, told = run(tmp_path, *how, text=MORE)
    assert "dpo: finished before, skipped" in told.notes and not any("differs" in note for note in told.notes)
    assert ran(told) == ["base", "sft", "evaluate-sft"]


@pytest.mark.parametrize(
    ("metric", "is_greater_better"),
    [
        ("general.correct", True),
        ("chat.nll", False),
        ("mmlu.unparsable", False),
        ("alignment.prompt_strict", True),
        ("nll.agreement", True),
    ],
)
def test_the_better_direction_is_known_by_the_metric(metric, is_greater_better):
    assert KeepBest(best=metric).is_greater_better is is_greater_better
