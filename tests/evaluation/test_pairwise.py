import numpy as np
import pytest

from align.errors import InputError
from align.evaluation.pairwise import fitted_intercept, length_controlled, win_rates
from align.records import Message, Prompt
from align.rewards.verdicts import Verdict

PROMPT = Prompt((Message("user", "Say it."),))


def by(rule):
    """A judge whose rewards are a function of the response."""

    def judge(groups):
        for _, responses in groups:
            yield tuple(Verdict(rule(response)) for response in responses)

    return judge


def groups(*pairs):
    return [(PROMPT, pair) for pair in pairs]


def test_ties_count_one_half():
    found = win_rates(groups(("good", "bad"), ("bad", "good"), ("good", "good"), ("good", "bad")), by(len))
    assert found.win_rate.value == 2.5 / 4
    assert found.undecided == 0


def test_undecided_comparisons_are_counted_separately():
    found = win_rates(
        groups(("good", "bad"), ("?", "bad")), by(lambda response: None if response == "?" else len(response))
    )
    assert (found.win_rate.value, found.win_rate.n, found.undecided) == (1, 1, 1)


def test_no_decided_comparison_is_an_error():
    with pytest.raises(InputError, match="none of 1"):
        win_rates(groups(("good", "bad")), by(lambda _: None))


def test_groups_must_have_two_responses():
    with pytest.raises(InputError, match="prompt 2 has 3"):
        win_rates(groups(("a", "b"), ("a", "b", "c")), by(len))


def logistic(values):
    return 1 / (1 + np.exp(-values))


def test_a_judge_of_length_prefers_neither_at_equal_length():
    draw = np.random.default_rng(0)
    longer = draw.normal(loc=300, scale=200, size=4000)  # ours are longer as a rule
    wins = (draw.random(4000) < logistic(2 * np.tanh(longer / longer.std()))).astype(float)
    assert wins.mean() > 0.7
    assert length_controlled(wins, longer).value == pytest.approx(0.5, abs=0.05)


def test_a_true_advantage_survives_length_control():
    draw = np.random.default_rng(1)
    longer = draw.normal(loc=-100, scale=200, size=4000)
    wins = (draw.random(4000) < logistic(1 + np.tanh(longer / longer.std()))).astype(float)
    found = length_controlled(wins, longer)
    assert found.value == pytest.approx(logistic(1.0), abs=0.03)
    assert found.low < logistic(1.0) < found.high


def test_both_rates_are_equal_at_equal_lengths():
    wins = np.array([1.0, 1.0, 1.0, 0.0] * 50)
    assert length_controlled(wins, np.zeros(200)).value == pytest.approx(0.75, abs=1e-3)


def test_the_fit_maximizes_the_likelihood():
    draw = np.random.default_rng(2)
    length = np.tanh(draw.normal(size=500))
    wins = (draw.random(500) < 0.6).astype(float)

    def likelihood(bias, slope):
        chance = logistic(bias + slope * length)
        return np.sum(wins * np.log(chance) + (1 - wins) * np.log(1 - chance))

    grid = [(bias, slope) for bias in np.linspace(-1, 2, 61) for slope in np.linspace(-1, 1, 41)]
    best = max(grid, key=lambda point: likelihood(*point))
    assert fitted_intercept(wins, length) == pytest.approx(logistic(best[0]), abs=0.015)


def test_the_fit_is_finite_if_length_decides_everything():
    length = np.array([-0.9, -0.5, 0.5, 0.9] * 10)
    assert fitted_intercept((length > 0).astype(float), length) == pytest.approx(0.5, abs=0.01)
