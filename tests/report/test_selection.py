"""What the page says of steps that select their rows."""

import pytest

from align.report.selection.section import comparison_cells, comparisons

FOUND = {"filter": 0.5, "predicted_cost": 1.667, "reference_flops": 5.0, "steps": 10}
UNIFORM = FOUND | {"score": "uniform", "compare": None, "training_flops": 170.0, "scoring_flops": 0.0}
UNIFORM["curve"] = [[5, 50.0, 3.0], [10, 100.0, 2.5], [17, 170.0, 2.0]]
HARD = FOUND | {"score": "hard", "compare": "step:plain", "training_flops": 100.0, "scoring_flops": 67.0}
HARD |= {"curve": [[10, 167.0, 2.25]], "share/a": 0.9, "pool_share/a": 0.5, "share/b": 0.1, "pool_share/b": 0.5}


def test_a_selecting_step_is_compared_at_equal_steps_and_at_equal_flops():
    (found,) = comparisons({"plain": UNIFORM, "hard": HARD})
    assert (found.loss, found.equal_steps, found.equal_flops, found.verdict) == (2.25, 2.5, 2.0, "lost")
    cells = comparison_cells(found)
    assert cells["cost"] == "1.67 × (1.67 predicted)" and cells["chosen"] == "a 90.0% of 50.0%, b 10.0% of 50.0%"


def test_the_pass_of_the_reference_counts_at_equal_flops():
    easy = HARD | {"score": "easy", "scoring_flops": 0.0, "reference_flops": 67.0}
    (found,) = comparisons({"plain": UNIFORM, "easy": easy})
    assert (found.equal_steps, found.equal_flops, found.cost) == (2.5, 2.0, 1.0)


def test_the_training_of_cross_fitted_references_counts_at_equal_flops():
    easy = HARD | {"score": "easy", "scoring_flops": 0.0, "reference_flops": 17.0}
    (named,) = comparisons({"plain": UNIFORM, "easy": easy | {"reference_training_flops": 0.0}})
    (fitted,) = comparisons({"plain": UNIFORM, "easy": easy | {"reference_training_flops": 53.0}})
    assert fitted.equal_flops == 2.0 and named.equal_flops == pytest.approx(2.5 - 0.5 * 17 / 70)
    assert named.once.endswith("their training not included") and "training of the references: 53" in fitted.once


def test_the_cost_is_relative_to_rows_of_mean_length():
    longer = HARD | {"uniform_flops": 80.0, "rows": 8.0, "mean_tokens": 40.0, "mean_tokens_chosen": 50.0}
    (found,) = comparisons({"hard": longer})
    cells = comparison_cells(found)
    assert cells["cost"] == "2.09 × (1.67 predicted)" and cells["rows"] == "8, chosen rows 1.25 × as long"


def test_a_run_of_as_many_steps_takes_the_place_of_the_longer_one_at_equal_steps():
    steps = UNIFORM | {"curve": [[10, 100.0, 2.1]]}
    (found,) = comparisons({"plain": UNIFORM, "plain-steps": steps, "hard": HARD})
    assert (found.equal_steps, found.equal_flops) == (2.1, 2.0)


def test_a_step_without_a_uniform_run_says_so():
    (found,) = comparisons({"hard": HARD | {"compare": None}})
    assert found.verdict == "not compared" and found.equal_flops is None


@pytest.mark.parametrize(
    ("scoring", "loss"),
    [
        (57.0, 2.0 - 0.5 * 57 / 67),  # 57/67 of the way from 100 to 167 FLOPs
        (-100.0, 3.0),  # none: the first point
        (-50.0, 2.5),  # halfway from 0 to 100
        (1.9, 2.0),  # within 2 % of 100
        (-1.9, 2.0),
        (65.0, 1.5),  # within 2 % of the end
        (70.0, 1.5),
        (71.0, None),  # the uniform run ends 2.4 % earlier
    ],
)
def test_the_loss_at_equal_flops_is_that_of_a_straight_line_between_points(scoring, loss):
    plain = UNIFORM | {"curve": [[0, 0.0, 3.0], [10, 100.0, 2.0], [17, 167.0, 1.5]]}
    hard = HARD | {"scoring_flops": scoring, "reference_flops": 0.0, "curve": [[10, 157.0, 1.8]]}
    (found,) = comparisons({"plain": plain, "hard": hard})
    assert found.equal_flops == (None if loss is None else pytest.approx(loss))
    assert scoring != 57 or found.verdict == "lost"
    assert scoring != 71 or found.verdict == "not compared: uniform ended at 97.7% of the FLOPs"
