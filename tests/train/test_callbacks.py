"""Early stopping, and a user's own callbacks."""

import own_training
import pytest
from tiny_training import Killed, Recorder, comparisons, demonstrations, loop, same, supervised, weights

from align.errors import InputError, RunError
from align.train.passes.early_stopping import EarlyStopping
from align.train.training_run import evaluations_without_gain

HELD_OUT = {"held_out": demonstrations(4, seed=9)}
# A learning rate at which the held-out loss rises
BAD = {"learning_rate": 0.3, "schedule": "constant", "warmup_steps": 0, "epochs": 4, "evaluate_every": 1}


@pytest.mark.parametrize(
    ("losses", "min_delta", "waited"),
    [
        ([], 0, 0),
        ([3.0], 0, 0),
        ([3.0, 2.0, 2.5, 2.0], 0, 2),
        ([3.0, None, 2.9, None], 0.2, 1),
        ([3.0, 2.9, 2.7], 0.2, 0),
        ([3.0, float("nan"), float("nan")], 0, 2),
    ],
)
def test_evaluations_without_gain_are_counted_from_the_best(losses, min_delta, waited):
    lines = [{} if loss is None else {"held_out/loss": loss} for loss in losses]
    assert evaluations_without_gain(lines, min_delta) == waited


def test_training_stops_when_the_held_out_loss_no_longer_improves(tmp_path):
    def make(folder, progress=None, **changes):
        settings = BAD | {"early_stopping": EarlyStopping(patience=3), "keep": "best"} | changes
        return loop(folder, supervised(), demonstrations(24), job=HELD_OUT, progress=progress, **settings)

    made = make(tmp_path / "whole")
    result = made.run()
    losses = [line["held_out/loss"] for line in result.metrics]
    assert result.num_steps < made.num_steps
    assert losses.index(min(losses)) == len(losses) - 4 and result.kept_metrics["held_out/loss"] == min(losses)
    assert any("has not improved in 3 evaluation(s)" in note for note in made.progress.notes)
    with pytest.raises(Killed):
        make(tmp_path / "killed", Recorder(stop_after=len(losses)), checkpoint_steps=1).run()
    again = make(tmp_path / "killed", checkpoint_steps=1)
    assert again.run().num_steps == len(losses) and same(weights(again.policy), weights(made.policy))


def test_early_stopping_needs_held_out_rows(tmp_path):
    with pytest.raises(InputError, match=r"train\.early_stopping: requires held-out rows"):
        loop(tmp_path, supervised(), demonstrations(4), early_stopping=EarlyStopping(patience=1))


def test_callbacks_are_called_after_every_step_and_evaluation(tmp_path):
    own_training.CALLS.clear()
    names = ["own_training:record"]
    loop(tmp_path, supervised(), demonstrations(24), job=HELD_OUT, callbacks=names, evaluate_every=2).run()
    assert own_training.CALLS == [
        ("step", 1, 3, False, True),
        ("evaluation", 2, 3, True, True),
        ("step", 2, 3, True, True),
        ("evaluation", 3, 3, True, True),
        ("step", 3, 3, True, True),
    ]


def test_a_callback_that_returns_true_stops_the_training(tmp_path):
    made = loop(tmp_path, supervised(), demonstrations(40), callbacks=["own_training:stop_at_two"])
    assert made.run().num_steps == 2
    assert any("a callback returned True" in note for note in made.progress.notes)


def test_a_rerun_of_a_training_that_a_callback_stopped_takes_no_further_step(tmp_path):
    made = [loop(tmp_path, supervised(), demonstrations(40), callbacks=["own_training:stop_at_two"]) for _ in range(2)]
    first = made[0].run()
    made[0].checkpointer.save_trained(first.metrics)
    second = made[1].run()
    assert second.metrics == first.metrics and same(weights(made[1].policy), weights(made[0].policy))


def test_the_step_after_which_a_callback_stops_is_evaluated(tmp_path):
    settings = {"callbacks": ["own_training:stop_at_two"], "keep": "best", "evaluate_every": 4}
    made = loop(tmp_path, supervised(), demonstrations(40), job=HELD_OUT, **settings)
    result = made.run()
    assert result.kept_metrics["step"] == 2
    assert made.evaluator.evaluate()["loss"] == result.last_metrics["held_out/loss"]


def test_other_held_out_rows_do_not_resume_a_training_that_they_may_stop(tmp_path):
    def make(held_out, progress=None):
        settings = BAD | {"early_stopping": EarlyStopping(patience=3), "checkpoint_steps": 1}
        job = {"held_out": held_out}
        return loop(tmp_path, supervised(), demonstrations(24), job=job, progress=progress, **settings)

    with pytest.raises(Killed):
        make(demonstrations(4, seed=9), Recorder(stop_after=2)).run()
    with pytest.raises(RunError, match="the checkpoint has other settings or data"):
        make(demonstrations(4, seed=8)).run()


def test_a_callback_that_raises_names_its_file_and_line(tmp_path):
    made = loop(tmp_path, supervised(), demonstrations(8), callbacks=["own_training:fail"])
    with pytest.raises(RunError, match=r"callback 'own_training:fail' raised .*KeyError.*") as error:
        made.run()
    assert "own_training.py" in str(error.value)


def test_a_callback_that_does_not_exist_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match=r"train\.callbacks: callback 'own_training:nothing' cannot be imported"):
        loop(tmp_path, supervised(), comparisons(4), callbacks=["own_training:nothing"])
