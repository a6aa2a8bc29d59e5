"""A mixture of sources in the loop: cut and resumed anyhow, the same numbers."""

import pytest
from tiny_training import (
    Killed,
    Recorder,
    demonstrations,
    gap,
    loop,
    metrics,
    numbers,
    same,
    supervised,
    weights,
)

from align.data.mixing import Mixture

ROWS = demonstrations(16) + demonstrations(9, seed=1) + demonstrations(3, seed=2)
WAYS = ["first_exhausted", "all_exhausted", "down_weight"]


def start(folder, exhausted, *, stop_after=None, **changes):
    """A run of two epochs over three sources, of which the last runs out first."""
    job = {"mixture": Mixture((16, 9, 3), (0.5, 0.3, 0.2), exhausted, seed=5)}
    return loop(folder, supervised(), ROWS, progress=Recorder(stop_after), job=job, **({"epochs": 2} | changes))


@pytest.mark.parametrize("exhausted", WAYS)
def test_eight_rows_at_once_are_eight_rows_one_at_a_time(tmp_path, exhausted):
    once, alone = start(tmp_path / "once", exhausted), start(tmp_path / "alone", exhausted, tokens_per_micro_batch=1)
    once.run()
    alone.run()
    lines, other = metrics(tmp_path / "once"), metrics(tmp_path / "alone")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in other], rel=0, abs=1e-6)
    assert gap(weights(once.policy), weights(alone.policy)) <= 5e-5
    num_rows = {"first_exhausted": 15, "all_exhausted": 32, "down_weight": 28}[exhausted]  # 3 / 0.2, 16 / 0.5, all
    assert sum(line["groups"] for line in lines) == 2 * num_rows
    trained = once.training_run.epoch(0) + once.training_run.epoch(1)
    assert sum(line["tokens_trained"] for line in lines) == sum(sum(ROWS[row].response_lengths) for row in trained)


@pytest.mark.parametrize("exhausted", WAYS)
def test_killed_and_resumed_a_mixture_is_never_killed(tmp_path, exhausted):
    whole = start(tmp_path / "whole", exhausted)
    whole.run()
    for killed_after in (2, 3):
        with pytest.raises(Killed):
            start(tmp_path / "killed", exhausted, stop_after=killed_after, checkpoint_steps=1).run()
    again = start(tmp_path / "killed", exhausted, checkpoint_steps=1)
    again.run()
    assert len(again.progress.steps) == len(numbers(tmp_path / "whole")) - 2
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert same(weights(again.policy), weights(whole.policy))
