"""The best of the evaluated weights is kept, and after any kill it is the same, bit for bit."""

import pytest
import torch
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    loop,
    metrics,
    numbers,
    preference,
    same,
    supervised,
    weights,
    with_adapters,
)

from align.errors import InputError, RunError
from align.train.checkpoint import BEST, load_best, remove_checkpoints, save_best

HELD_OUT = demonstrations(6, seed=9)
STEPS = 9


def start(folder, *, stop_after=None, keep="best", model=None, held_out=HELD_OUT, **changes):
    """A run that learns its rows by heart: the loss of others falls first, then rises."""
    settings = {"prompts_per_step": 6, "epochs": 3, "learning_rate": 2e-2, "schedule": "constant", "keep": keep}
    changes = {"evaluate_every": 1} | changes
    job = {"held_out": held_out}
    report = Recorder(stop_after)
    return loop(folder, supervised(), demonstrations(18), model=model, progress=report, job=job, **(settings | changes))


def losses(folder):
    return [line["held_out/loss"] for line in metrics(folder) if "held_out/loss" in line]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trained = start(folder)
    outcome = trained.run()
    return folder, outcome, weights(trained.policy)


def test_the_weights_with_the_lowest_loss_on_held_out_rows_stay(never_killed, tmp_path):
    folder, outcome, kept = never_killed
    step = losses(folder).index(min(losses(folder))) + 1
    assert 1 < step < STEPS  # neither the first nor the last, so that it matters
    assert outcome.kept_metrics == metrics(folder)[step - 1]
    assert outcome.last_metrics["step"] == STEPS
    # A run that ends there by itself has the same weights.
    short = start(tmp_path, keep="last", max_steps=step)
    short.run()
    assert same(kept, weights(short.policy))


def test_what_stays_has_the_loss_that_was_logged(never_killed):
    folder, outcome, kept = never_killed
    trained = start(folder / "evaluated")
    trained.policy.hf.load_state_dict(kept)
    assert trained.evaluator.evaluate()["loss"] == outcome.kept_metrics["held_out/loss"] == min(losses(folder))


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("killed_after", range(1, STEPS))
def test_killed_after_any_step_and_resumed_keeps_the_same_weights(tmp_path, never_killed, killed_after, every):
    folder, outcome, kept = never_killed
    with pytest.raises(Killed):
        start(tmp_path, stop_after=killed_after, checkpoint_steps=every).run()
    again = start(tmp_path, checkpoint_steps=every)
    resumed = again.run()
    assert numbers(tmp_path) == numbers(folder)
    assert resumed.kept_metrics["step"] == outcome.kept_metrics["step"]
    assert same(weights(again.policy), kept)


def test_best_weights_that_a_kill_left_half_written_are_made_again(tmp_path, never_killed):
    folder, outcome, kept = never_killed
    best = int(outcome.kept_metrics["step"])
    with pytest.raises(Killed):
        start(tmp_path, stop_after=best, checkpoint_steps=best - 1).run()
    (tmp_path / f"{BEST}{best}" / "state.json").unlink()  # as between the two renames
    again = start(tmp_path, checkpoint_steps=best - 1)
    again.run()
    assert same(weights(again.policy), kept)


def test_weights_that_were_the_best_in_one_life_only_do_not_cost_those_that_are(tmp_path):
    """Other micro-batches or another GPU round a held-out loss otherwise."""

    def life(losses, stop_after=None):
        made = start(tmp_path, stop_after=stop_after, checkpoint_steps=5)
        told = iter(losses)
        made.evaluator.evaluate = lambda prefix: {f"{prefix}loss": next(told)}
        return made, made.run

    with pytest.raises(Killed):
        life([9.0, 5.0, 1.0, 4.0, 4.0, 4.0, 0.5], stop_after=6)[1]()
    assert {path.name for path in tmp_path.glob("best-*")} == {"best-2", "best-6"}  # no checkpoint holds step 6 yet
    made, go_on = life([4.0, 4.0, 4.0, 4.0, 4.0])
    assert go_on().kept_metrics["step"] == 2
    other = start(tmp_path / "other", keep="last", max_steps=2)
    other.run()
    assert same(weights(made.policy), weights(other.policy))


def test_weights_that_were_the_best_for_a_while_do_not_pile_up(tmp_path):
    made = start(tmp_path, checkpoint_steps=3)
    falling, there = iter(range(10, 0, -1)), []

    def evaluate(prefix):
        there.append({path.name for path in tmp_path.glob("best-*")})
        return {f"{prefix}loss": float(next(falling))}

    made.evaluator.evaluate = evaluate
    made.run()
    assert {path.name for path in tmp_path.glob("best-*")} == {"best-6", "best-9"}  # the checkpoint is that of step 6
    assert max(map(len, there)) == 2


def test_adapters_are_kept_alike(tmp_path):
    trained = start(tmp_path / "whole", model=with_adapters())
    trained.run()
    with pytest.raises(Killed):
        start(tmp_path / "killed", model=with_adapters(), stop_after=5, checkpoint_steps=2).run()
    again = start(tmp_path / "killed", model=with_adapters(), checkpoint_steps=2)
    again.run()
    assert same(weights(trained.policy), weights(again.policy))


def test_between_evaluations_nothing_is_kept(tmp_path):
    outcome = start(tmp_path, evaluate_every=4).run()
    assert outcome.kept_metrics["step"] in (4, 8, 9)
    assert (tmp_path / f"{BEST}{int(outcome.kept_metrics['step'])}" / "state.json").exists()


def test_where_the_last_weights_stay_none_are_kept_beside(tmp_path):
    outcome = start(tmp_path, keep="last").run()
    assert outcome.kept_metrics == outcome.last_metrics
    assert not list(tmp_path.glob(f"{BEST}*"))


def test_the_best_of_no_held_out_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="train.keep: requires held-out rows"):
        start(tmp_path, held_out=())


def test_a_loss_that_is_never_finite_has_no_best(tmp_path):
    trained = start(tmp_path, max_steps=2)
    trained.evaluator.evaluate = lambda prefix: {f"{prefix}loss": float("nan")}
    with pytest.raises(RunError, match="no held-out loss was finite"):
        trained.run()


def test_other_held_out_rows_are_another_run(tmp_path):
    first, second, third = (
        start(tmp_path / str(at), keep=keep, held_out=held_out)
        for at, (keep, held_out) in enumerate([("best", HELD_OUT), ("best", HELD_OUT[:3]), ("last", HELD_OUT)])
    )
    assert len({first.settings_hash, second.settings_hash, third.settings_hash}) == 3
    assert (
        third.settings_hash == start(tmp_path / "3", keep="last", held_out=HELD_OUT[:3], evaluate_every=5).settings_hash
    )


def test_weights_of_another_step_are_not_taken_for_the_best(tmp_path):
    made = start(tmp_path, model=with_adapters())
    model, sharding = made.policy, made.sharding
    save_best(tmp_path, 3, sharding=sharding, processes=made.processes)
    before = weights(model)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    with pytest.raises(RunError, match="best-4: missing, but the weights of step 4 had the lowest held-out loss"):
        load_best(tmp_path, 4, sharding=sharding)
    load_best(tmp_path, 3, sharding=sharding)
    trained = {name: value for name, value in before.items() if "lora_" in name}
    assert same(trained, {name: value for name, value in weights(model).items() if "lora_" in name})
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_preference_step_can_keep_its_best_too(tmp_path):
    job = {"held_out": comparisons(4, seed=3)}
    trained = loop(tmp_path, preference("dpo"), comparisons(8), job=job, keep="best", evaluate_every=1, epochs=3)
    assert trained.run().kept_metrics["held_out/loss"] == min(losses(tmp_path))
