import numpy as np
import pytest
from scipy.optimize import brentq, minimize

from align.evaluation.pairs.length_control import PRIOR_DEVIATION, PRIOR_SLOPE, length_control


def logistic(values):
    return 1 / (1 + np.exp(-values))


def simulated(quality, slope, *, num_pairs, mean, seed):
    """Outcomes by the model, with lengths from a normal distribution around `mean` standard deviations."""
    draw = np.random.default_rng(seed)
    longer_by = draw.normal(loc=mean * 200, scale=200, size=num_pairs).round()
    length = np.tanh(-longer_by / longer_by.std(ddof=1))
    return (draw.random(num_pairs) < logistic(quality + slope * length)).astype(float), longer_by


@pytest.mark.parametrize("slope", [-2.5, -1.5, 0.0, 1.0])  # from a judge of length to one that likes short responses
@pytest.mark.parametrize("quality", [-1.0, 0.0, 1.5])
def test_where_both_sides_are_shorter_at_times_the_judges_own_slope_is_found(quality, slope):
    found = length_control(*simulated(quality, slope, num_pairs=4000, mean=0.5, seed=0))
    assert found.slope.value == pytest.approx(slope, abs=0.25)
    assert found.win_rate.value == pytest.approx(logistic(quality), abs=0.04)


@pytest.mark.parametrize("mean", [-4, 4])
def test_where_one_side_is_always_shorter_the_slope_is_the_priors(mean):
    wins, longer_by = simulated(1.0, PRIOR_SLOPE, num_pairs=2000, mean=mean, seed=1)
    found = length_control(wins, longer_by)
    assert max(found.shorter, found.longer) == 1
    assert found.slope.value == pytest.approx(PRIOR_SLOPE)
    assert (found.slope.low, found.slope.high) == pytest.approx(
        (PRIOR_SLOPE - 1.96 * PRIOR_DEVIATION, PRIOR_SLOPE + 1.96 * PRIOR_DEVIATION), abs=0.15
    )
    assert found.win_rate.low < logistic(1.0) < found.win_rate.high


def test_the_rate_does_not_grow_with_a_slope_that_only_the_difficulty_of_prompts_makes():
    """A policy that wins easy prompts, where both responses are short, has a steep slope of its own."""
    draw = np.random.default_rng(2)
    difficulty = draw.random(2000)  # both of them are longer for hard prompts, the baseline more so
    longer_by = np.where(draw.random(2000) < 0.03, 50, -1000 * difficulty - 1)
    wins = (draw.random(2000) < logistic(0.5 - 6 * difficulty)).astype(float)
    found = length_control(wins, longer_by)
    assert found.slope.value == pytest.approx(PRIOR_SLOPE, abs=PRIOR_DEVIATION)
    fixed = length_control(wins, np.minimum(longer_by, -1))  # without the few pairs that are the other way round
    assert found.win_rate.value == pytest.approx(fixed.win_rate.value, abs=0.05)


def test_the_slope_is_the_most_probable_one_and_the_quality_fits_all_pairs():
    wins, longer_by = simulated(0.7, -1.0, num_pairs=300, mean=0.4, seed=3)
    length = np.tanh(-longer_by / longer_by.std(ddof=1))
    longer, shorter = longer_by > 0, longer_by < 0
    weights = np.where(longer, shorter.sum() / longer.sum(), 1.0)

    def cost(coefficients):
        chance = logistic(coefficients[0] + coefficients[1] * length)
        likelihood = weights @ (wins * np.log(chance) + (1 - wins) * np.log(1 - chance))
        return -likelihood + (coefficients[1] - PRIOR_SLOPE) ** 2 / (2 * PRIOR_DEVIATION**2)

    slope = minimize(cost, [0.0, 0.0]).x[1]
    quality = brentq(lambda value: (logistic(value + slope * length) - wins).sum(), -5, 5)
    found = length_control(wins, longer_by)
    assert longer.sum() > shorter.sum()
    assert found.slope.value == pytest.approx(slope, abs=2e-3)
    assert found.win_rate.value == pytest.approx(logistic(quality), abs=2e-3)


def test_exchanging_both_sides_mirrors_the_rate():
    wins, longer_by = simulated(0.8, -1.2, num_pairs=200, mean=-0.7, seed=4)
    one, other = length_control(wins, longer_by), length_control(1 - wins, -longer_by)
    assert one.win_rate.value == pytest.approx(1 - other.win_rate.value, abs=1e-9)
    assert one.slope.value == pytest.approx(other.slope.value, abs=1e-9)
    assert (one.shorter, one.longer) == (other.longer, other.shorter)


def test_the_plain_rate_is_returned_for_equal_lengths():
    wins = np.array([1.0, 1.0, 1.0, 0.0] * 50)
    found = length_control(wins, np.zeros(200))
    assert found.win_rate.value == pytest.approx(0.75, abs=1e-3)
    assert (found.shorter, found.longer, found.equal) == (0, 0, 1)


def test_equal_differences_of_length_count_as_far_as_any():
    """The limit of equal differences: each is infinitely many standard deviations from 0."""
    wins = np.array([1.0, 1.0, 1.0, 0.0] * 50)
    found = length_control(wins, np.full(200, 30.0))
    assert found.win_rate.value == pytest.approx(logistic(np.log(3) + PRIOR_SLOPE), abs=2e-3)


def test_the_fit_is_finite_if_length_decides_everything():
    longer_by = np.array([-900.0, -500.0, 500.0, 900.0] * 10)
    found = length_control((longer_by > 0).astype(float), longer_by)
    assert found.win_rate.value == pytest.approx(0.5, abs=0.01)
    assert -10 < found.slope.value < PRIOR_SLOPE
