"""`train.average`: the mean of the last snapshots of one training."""

import pytest
import torch
from tiny_training import (
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    loop,
    numbers,
    preference,
    same,
    supervised,
    weights,
    with_adapters,
)

from align.errors import InputError
from align.train.sharding.averaging import WeightAverage
from align.train.sharding.snapshots import SnapshotSettings

AVERAGE = SnapshotSettings(last=3, every=2)
SNAPSHOTS = (2, 4, 6)  # counted back from the last of 6 steps


def start(folder, *, stop_after=None, train=None, objective=None, **changes):
    """A training of six steps over two epochs with held-out rows."""
    settings = {"prompts_per_step": 6, "epochs": 2, "evaluate_every": 2, "tokens_per_micro_batch": 120} | changes
    job = {"held_out": comparisons(3, seed=9)}
    made = objective or preference("rpo_bwd_kl", beta=0.1)
    return loop(folder, made, train or comparisons(18), progress=Recorder(stop_after), job=job, **settings)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The weights of trainings without `average`, each stopped after one of the steps, and the lines of the last."""
    found = {}
    for step in SNAPSHOTS:
        folder = tmp_path_factory.mktemp("stopped")
        made = start(folder, until_step=step)
        made.run()
        found[step] = weights(made.policy)
    return found, numbers(folder)


def mean(found):
    """The mean of weights in fp64."""
    return {name: torch.stack([each[name].double() for each in found]).mean(0) for name in found[0]}


def check_mean(trained, expected):
    """At most a few roundings in fp32 apart."""
    for name, value in trained.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=3e-7, atol=1e-8, msg=name)


def test_the_saved_weights_are_the_mean_of_trainings_stopped_at_the_snapshots(tmp_path, stopped):
    made = start(tmp_path, average=AVERAGE)
    made.run()
    trained, (found, lines) = weights(made.policy), stopped
    check_mean(trained, mean(list(found.values())))
    assert not same(trained, found[6])
    assert "the weights are now the mean of those after steps 2, 4, 6" in made.progress.notes
    averaged = numbers(tmp_path)
    assert [line.pop("averaged_snapshots", None) for line in averaged] == [None, 1, None, 2, None, 3]
    # Training and its evaluations are those of the current weights; the last evaluation is that of the mean
    assert averaged[:-1] == lines[:-1]
    last, last_of_other = averaged[-1], lines[-1]
    differing = {name for name in last if last[name] != last_of_other[name]}
    assert differing and all(name.startswith("held_out/") for name in differing)


def test_the_last_evaluation_is_that_of_the_mean(tmp_path):
    made = start(tmp_path, average=AVERAGE)
    result = made.run()
    again = made.evaluator.evaluate()
    assert result.kept_metrics["held_out/loss"] == again["loss"]


@pytest.mark.parametrize("killed_after", range(1, 6))
def test_killed_and_resumed_is_the_same_mean(tmp_path, killed_after):
    whole = start(tmp_path / "whole", average=AVERAGE)
    whole.run()
    with pytest.raises(Killed):
        start(tmp_path / "killed", average=AVERAGE, stop_after=killed_after, checkpoint_steps=1).run()
    again = start(tmp_path / "killed", average=AVERAGE, checkpoint_steps=1)
    again.run()
    assert same(weights(again.policy), weights(whole.policy))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert len(again.progress.steps) == 6 - (killed_after - 1)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize("in_bf16", ["bf16_master", "bf16_stochastic"])
def test_weights_in_bf16_and_other_optimizers_resume_the_same_mean(tmp_path, in_bf16, optimizer):
    changes = {"average": AVERAGE, "checkpoint_steps": 1, "precision": "bf16", "weights": in_bf16}
    changes |= {"optimizer": optimizer}
    whole = start(tmp_path / "whole", **changes)
    whole.run()
    with pytest.raises(Killed):
        start(tmp_path / "killed", stop_after=6, **changes).run()
    again = start(tmp_path / "killed", **changes)
    again.run()
    assert len(again.progress.steps) == 1 and same(weights(again.policy), weights(whole.policy))


def test_the_mean_of_bf16_weights_is_rounded_once(tmp_path):
    changes = {"precision": "bf16", "weights": "bf16_stochastic"}
    stopped = []
    for step in SNAPSHOTS:
        made = start(tmp_path / str(step), until_step=step, **changes)
        made.run()
        stopped.append(weights(made.policy))
    made = start(tmp_path / "averaged", average=AVERAGE, **changes)
    made.run()
    assert same(weights(made.policy), {name: value.bfloat16() for name, value in mean(stopped).items()})


def test_the_mean_does_not_depend_on_a_stop_after_the_last_step(tmp_path, stopped):
    """A rerun of a training that was killed while its model was saved."""
    made = start(tmp_path, average=AVERAGE)
    made.checkpointer.save_trained(made.run().metrics)
    again = start(tmp_path, average=AVERAGE)
    again.run()
    assert again.progress.steps == [] and same(weights(again.policy), weights(made.policy))


def test_snapshots_of_equal_weights_give_the_same_weights(tmp_path):
    """Also where a sum of three is rounded: 3 * 11184814 has more bits than fp32 holds."""
    made = start(tmp_path)
    with torch.no_grad():
        for value in made.policy.parameters():
            value.view(-1)[0] = 11184814
    before = weights(made.policy)
    value = torch.tensor(11184814.0)
    assert (value + value + value) / 3 != value
    average = WeightAverage(made.sharding, [1, 2, 3], Recorder())
    assert [average.add(step) for step in (1, 2, 3)] == [{"averaged_snapshots": count} for count in (1, 2, 3)]
    assert same(weights(made.policy), before)


def test_checkpoints_hold_the_average_once_there_is_one(tmp_path):
    sizes = []
    for stop_after in (2, 3):
        with pytest.raises(Killed):
            start(tmp_path, average=AVERAGE, stop_after=stop_after, checkpoint_steps=1).run()
        (shard,) = tmp_path.glob("checkpoint-*/*.safetensors")
        sizes.append(shard.stat().st_size)
    assert sizes[1] / sizes[0] == pytest.approx(4 / 3, rel=0.05)  # weights and two moments, and the average


def test_too_few_steps_and_adapters_are_refused_before_training(tmp_path):
    with pytest.raises(InputError, match=r"^train\.average: 4 snapshots, one every 2 steps, need 7 optimizer steps"):
        start(tmp_path, average=SnapshotSettings(last=4, every=2))
    two = SnapshotSettings(last=2, every=1)
    with pytest.raises(InputError, match=r"^train\.average: the mean of adapter factors is not the mean of their"):
        loop(tmp_path, supervised(), demonstrations(24), model=with_adapters(), average=two)
