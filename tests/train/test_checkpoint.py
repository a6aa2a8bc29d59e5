import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    group,
    loop,
    metrics,
    numbers,
    policy,
    preference,
    same,
    supervised,
    weights,
    with_adapters,
)

from align.artifacts import write_json
from align.errors import InputError, RunError
from align.train.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from align.train.resuming import adopt_checkpoint

STEPS = 6
RUNS = {
    "sft": (supervised(), demonstrations(18)),
    "rpo": (preference("rpo_bwd_kl", beta=0.1, sft_weight=0.02), comparisons(18, sizes=(2, 3))),
}


def start(folder, name, *, stop_after=None, model=None, **changes):
    """A run of six steps over two epochs, which evaluates and may be stopped."""
    objective, train = RUNS[name]
    job = {"held_out": comparisons(3, seed=9)}
    settings = {"prompts_per_step": 6, "epochs": 2, "evaluate_every": 2, "tokens_per_micro_batch": 120} | changes
    return loop(folder, objective, train, model=model, progress=Recorder(stop_after), job=job, **settings)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """Numbers and weights of a run of each name that nobody kills, and that keeps no checkpoint."""
    whole = {}
    for name in RUNS:
        folder = tmp_path_factory.mktemp(name)
        trained = start(folder, name)
        trained.run()
        whole[name] = numbers(folder), weights(trained.policy)
    return whole


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("killed_after", range(1, STEPS))
@pytest.mark.parametrize("name", RUNS)
def test_killed_after_any_step_and_resumed_is_never_killed(tmp_path, never_killed, name, killed_after, every):
    with pytest.raises(Killed):
        start(tmp_path, name, stop_after=killed_after, checkpoint_steps=every).run()
    again = start(tmp_path, name, checkpoint_steps=every)
    again.run()
    lines, trained = never_killed[name]
    assert numbers(tmp_path) == lines
    assert same(weights(again.policy), trained)
    # It went on from the last checkpoint before the kill: that of the step itself was still to come.
    kept = (killed_after - 1) // every * every
    assert [line["step"] for line in again.progress.steps] == list(range(kept + 1, STEPS + 1))
    assert [note for note in again.progress.notes if "resumed" in note] == [f"resumed after step {kept} of 6"] * bool(
        kept
    )


def test_killed_again_and_again_is_never_killed(tmp_path, never_killed):
    for killed_after in (2, 3, 4, 5):
        with pytest.raises(Killed):
            start(tmp_path, "rpo", stop_after=killed_after, checkpoint_steps=1).run()
    again = start(tmp_path, "rpo", checkpoint_steps=1)
    again.run()
    assert (numbers(tmp_path), len(again.progress.steps)) == (never_killed["rpo"][0], 2)
    assert same(weights(again.policy), never_killed["rpo"][1])


@pytest.mark.parametrize("lost", ["lines", "zeros"])
def test_lines_that_a_checkpoint_counts_on_and_the_machine_has_lost_are_told_of(tmp_path, lost):
    with pytest.raises(Killed):
        start(tmp_path, "rpo", stop_after=5, checkpoint_steps=1).run()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    tail = b"".join(lines[2:])
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + (bytes(len(tail)) if lost == "zeros" else b""))
    with pytest.raises(RunError, match="metrics.jsonl: lacks some of the steps 1 to 4 of the checkpoint"):
        start(tmp_path, "rpo", checkpoint_steps=1).run()


KINDS = {
    "adapters": (with_adapters, "fp32"),
    "tied": (lambda: policy(tie_word_embeddings=True), "fp32"),
    "bf16": (policy, "bf16"),
}


@pytest.mark.parametrize(("model", "precision"), KINDS.values(), ids=KINDS.keys())
def test_adapters_tied_weights_and_half_precision_resume_as_well(tmp_path, model, precision):
    if precision == "bf16" and torch.cuda.is_available():
        pytest.skip("on CUDA the backward pass of attention in bf16 adds up in no fixed order")
    changes = {"checkpoint_steps": 2, "precision": precision}
    whole = start(tmp_path / "whole", "rpo", model=model(), **changes)
    whole.run()
    with pytest.raises(Killed):
        start(tmp_path / "killed", "rpo", model=model(), stop_after=3, **changes).run()
    again = start(tmp_path / "killed", "rpo", model=model(), **changes)
    again.run()
    assert len(again.progress.steps) == 4
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert same(weights(again.policy), weights(whole.policy))


def test_half_a_last_line_of_metrics_is_written_anew(tmp_path, never_killed):
    with pytest.raises(Killed):
        start(tmp_path, "sft", stop_after=4, checkpoint_steps=3).run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    start(tmp_path, "sft").run()
    assert numbers(tmp_path) == never_killed["sft"][0]


def test_minutes_bring_a_checkpoint_too(tmp_path):
    with pytest.raises(Killed):
        start(tmp_path, "sft", stop_after=3, checkpoint_minutes=1e-9).run()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def trained_a_little(folder, seed=0, max_steps=3):
    """A loop, its steps behind it."""
    made = start(folder, "sft", model=policy(seed=seed), max_steps=max_steps)
    made.run()
    return made


def save(folder, step, made, settings_hash="a"):
    save_checkpoint(folder, step, sharding=made.sharding, processes=made.processes, settings_hash=settings_hash)


def load(folder, made, settings_hash="a"):
    return load_checkpoint(folder, sharding=made.sharding, settings_hash=settings_hash)


def test_a_checkpoint_holds_weights_and_optimizer_bit_for_bit(tmp_path):
    made, other = trained_a_little(tmp_path / "made"), trained_a_little(tmp_path / "other", seed=7, max_steps=1)
    save(tmp_path, 3, made)
    assert not same(weights(other.policy), weights(made.policy))
    assert load(tmp_path, other) == 3
    assert same(weights(other.policy), weights(made.policy))
    count = 0
    for mine, theirs in zip(made.policy.parameters(), other.policy.parameters(), strict=True):
        state = other.sharding.optimizer.state[theirs]
        assert made.sharding.optimizer.state[mine].keys() == state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in made.sharding.optimizer.state[mine].items():
            assert torch.equal(value, state[key])
            count += 1
    assert count == 3 * len(list(made.policy.parameters()))


def with_an_idle_weight():
    model = policy()
    model.idle = torch.nn.Parameter(torch.ones(3))  # has no gradient, ever
    return model


def test_a_weight_without_a_gradient_is_resumed_without_moments(tmp_path):
    whole = start(tmp_path / "whole", "sft", model=with_an_idle_weight())
    whole.run()
    with pytest.raises(Killed):
        start(tmp_path / "killed", "sft", model=with_an_idle_weight(), stop_after=4, checkpoint_steps=2).run()
    again = start(tmp_path / "killed", "sft", model=with_an_idle_weight())
    again.run()
    assert "resumed after step 2 of 6" in again.progress.notes
    assert same(weights(again.policy), weights(whole.policy))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    for made in (whole, again):
        assert not made.sharding.optimizer.state.get(made.policy.idle)
        assert torch.equal(made.policy.idle.cpu(), torch.ones(3))


def test_only_the_latest_checkpoint_is_kept_until_none_is_needed(tmp_path):
    made = trained_a_little(tmp_path)
    for step in (9, 10, 11):  # by number and not by name
        save(tmp_path, step, made)
        assert [path.name for path in tmp_path.glob("*checkpoint*")] == [f"checkpoint-{step}"]
    remove_checkpoints(tmp_path)
    assert load(tmp_path, made, "b") == 0
    assert list(tmp_path.glob("*checkpoint*")) == []


def test_a_failure_while_a_checkpoint_is_written_leaves_the_earlier_one(tmp_path):
    made = trained_a_little(tmp_path)
    save(tmp_path, 1, made)
    with pytest.raises(TypeError):  # raised by the last of the two files, when the first is written
        save(tmp_path, 2, made, object())
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]
    assert load(tmp_path, made) == 1


def test_what_a_kill_leaves_of_a_removed_checkpoint_is_not_resumed_from(tmp_path):
    made = trained_a_little(tmp_path)
    save(tmp_path, 1, made)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "shard-00000.safetensors").write_bytes(b"half")
    assert load(tmp_path, made) == 1
    save(tmp_path, 2, made)
    assert load(tmp_path, made) == 2
    (tmp_path / "checkpoint-2" / "state.json").unlink()
    remove_checkpoints(tmp_path)
    assert list(tmp_path.glob("*checkpoint*")) == []


GROUPS = comparisons(8)
OTHER_REWARDS = [group([1], [[2], [3]], rewards=(1.0, 0.0)), *GROUPS[1:]]
LABELLED = [group([1], [[2], [3]], rewards=(1.0, 0.0), chosen=1), *GROUPS[1:]]

# What another run differs in, and what it is made with: (objective, train, settings, further fields of the job)
OTHERS = {
    "learning rate": (preference("dpo"), OTHER_REWARDS, {"learning_rate": 1e-3}, {}),
    "schedule": (preference("dpo"), OTHER_REWARDS, {"schedule": "linear"}, {}),
    "length": (preference("dpo"), OTHER_REWARDS, {"epochs": 5}, {}),
    "order": (preference("dpo"), OTHER_REWARDS, {}, {"seed": 1}),
    "loss": (preference("ipo"), OTHER_REWARDS, {}, {}),
    "loss settings": (preference("dpo", beta=0.2), OTHER_REWARDS, {}, {}),
    "supervised term": (preference("dpo", sft_weight=0.1), OTHER_REWARDS, {}, {}),
    "objective": (supervised(), OTHER_REWARDS, {}, {}),
    "tokens": (preference("dpo"), GROUPS, {}, {}),
    "rewards": (preference("dpo"), [group([1], [[2], [3]], rewards=(1.0, 0.5)), *GROUPS[1:]], {}, {}),
    "label": (preference("dpo"), LABELLED, {}, {}),
    "trained tokens": (preference("dpo"), [group([1, 2], [[3], [3]], rewards=(1.0, 0.0)), *GROUPS[1:]], {}, {}),
}


def stopped(folder):
    with pytest.raises(Killed):
        loop(folder, preference("dpo"), OTHER_REWARDS, progress=Recorder(3), epochs=4, checkpoint_steps=1).run()


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_other_settings_or_data_is_refused_in_one_line(tmp_path, what):
    objective, train, settings, job = OTHERS[what]
    stopped(tmp_path)
    other = loop(tmp_path, objective, train, job=job, **({"epochs": 4} | settings))
    before = weights(other.policy)
    with pytest.raises(RunError) as error:
        other.run()
    assert "checkpoint-2: the checkpoint has other settings or data; remove it" in str(error.value)
    assert "\n" not in str(error.value)
    assert same(before, weights(other.policy))
    assert len(metrics(tmp_path)) == 3


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    stopped(tmp_path)
    with pytest.raises(RunError, match="started from other weights than the policy has now"):
        loop(tmp_path, preference("dpo"), OTHER_REWARDS, model=policy(1), epochs=4).run()


def test_what_changes_no_number_may_change_before_a_resume(tmp_path):
    stopped(tmp_path)
    settings = {"tokens_per_micro_batch": 50, "evaluate_every": 1, "checkpoint_steps": 2, "checkpoint_minutes": 3.0}
    again = loop(tmp_path, preference("dpo"), OTHER_REWARDS, job={"held_out": GROUPS[:2]}, epochs=4, **settings)
    again.run()
    assert [line["step"] for line in again.progress.steps] == [3, 4]


@pytest.mark.slow
def test_a_process_killed_at_moments_of_chance_does_what_one_does_that_is_not(tmp_path):
    script = Path(__file__).with_name("killed_runs.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert told.returncode == 0, told.stderr[-2000:]
    kills = json.loads(told.stdout.splitlines()[-1])
    print(kills)
    assert len(kills) >= 5
    assert any(kill["writing"] for kill in kills)  # a checkpoint was being written
    assert list(tmp_path.glob("killed/.*")) == []  # and what was written of it is gone
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert len(numbers(tmp_path / "whole")) == 12
    killed, whole = (load_file(tmp_path / name / "trained.safetensors") for name in ("killed", "whole"))
    assert same(killed, whole)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({}, "has no checkpoint to resume; set train.until_step of that step"),
        (
            {"diverged": "optimizer step 1: the loss is nan"},
            r"diverged in its first optimizer step, .* \(optimizer step 1: the loss is nan\); lower its train.learning",
        ),
    ],
)
def test_an_earlier_step_without_a_checkpoint_to_resume_says_why(tmp_path, manifest, said):
    (tmp_path / "steep").mkdir()
    write_json(tmp_path / "steep/manifest.json", manifest)
    with pytest.raises(InputError, match=said):
        adopt_checkpoint(tmp_path / "steep", tmp_path / "rest")
