"""Arena-Hard's score: the weighted mean, which is the Bradley-Terry model's, and control of style."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from align.evaluation.pairs.arena_hard import (
    CONTROLS,
    arena_hard_score,
    battles,
    markdown_counts,
    style_control,
    style_features,
)
from align.evaluation.pairs.table import JudgedGame, pairs_of
from align.rewards.judge_prompts.parsing import LABELS

FILLER = "word "


def table(verdicts, responses=None):
    """A table of two games a prompt; `verdicts` are about our model, (shown first, shown second)."""
    games = []
    for number, both in enumerate(verdicts):
        a, b = responses[number] if responses else ("a", "b")
        known = {"id": str(number), "prompt": "", "a": a, "b": b, "judge": "", "model": "ours", "baseline": "base"}
        for order, verdict in zip(("a first", "b first"), both, strict=True):
            games.append(JudgedGame(**known, order=order, verdict=verdict, void="no mark" * (verdict is None)))
    return pairs_of(games)


def random_verdicts(num, seed, labels=tuple(LABELS)):
    draw = np.random.default_rng(seed)
    return [tuple(labels[index] for index in draw.integers(len(labels), size=2)) for _ in range(num)]


def test_a_clear_verdict_counts_three_times_and_a_tie_one_half():
    pairs = table([("A>>B", "B>A"), ("A=B", "A>B")])
    assert arena_hard_score(pairs, "v2").value == (3 + 0 + 0.5 + 1) / 6


def test_of_a_prompt_with_a_void_game_v2_drops_both_games():
    pairs = table([("A>B", None), ("B>A", "B>A"), (None, None)])
    assert arena_hard_score(pairs, "v0.1").value == 1 / 3
    assert arena_hard_score(pairs, "v2").value == 0
    assert arena_hard_score(pairs, "v2").n == 1
    assert arena_hard_score(table([(None, "A>B")]), "v2") is None


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_that_of_a_bradley_terry_model(seed):
    """A model of two strengths, fitted to the battles as Arena-Hard does in 2024: each twice, ties half and half."""
    labels = tuple(LABELS)[: 4 + seed % 2] if seed else tuple(LABELS)
    pairs = table(random_verdicts(200, seed, labels))
    outcomes = [game.win for pair in pairs for game in pair.games for _ in range(3 if game.is_clear else 1)]

    def cost(elo_difference):
        won = 1 / (1 + 10 ** (-elo_difference / 400))
        return -sum(2 * (win * math.log(won) + (1 - win) * math.log(1 - won)) for win in outcomes)

    elo = minimize_scalar(cost, bounds=(-2000, 2000), method="bounded", options={"xatol": 1e-9}).x
    assert arena_hard_score(pairs, "v0.1").value == pytest.approx(1 / (1 + 10 ** (-elo / 400)), abs=1e-6)


def test_the_interval_is_over_prompts_and_not_over_battles():
    """Where both games of a prompt always agree, and by much, six battles are one observation."""
    draw = np.random.default_rng(0)
    verdicts = [("A>>B",) * 2 if draw.random() < 0.5 else ("B>>A",) * 2 for _ in range(400)]
    found = arena_hard_score(table(verdicts), "v2")
    expected = 2 * 1.96 * math.sqrt(found.value * (1 - found.value) / 400)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


def styled(num_headers, num_words):
    return "# T\n" * num_headers + FILLER * num_words


def planted(quality, slopes, *, num, seed, shift):
    """Verdicts of a judge with known preferences for length and headers; our responses are longer by `shift`."""
    draw = np.random.default_rng(seed)
    ours = [styled(draw.integers(0, 9), draw.integers(20, 200) + shift) for _ in range(num)]
    base = [styled(draw.integers(0, 9), draw.integers(20, 200)) for _ in range(num)]
    responses = list(zip(ours, base, strict=True))
    features = style_features(table([("A=B", "A=B")] * num, responses))[:, :2]
    chance = 1 / (1 + np.exp(-(quality + features / features.std(axis=0) @ slopes)))
    verdicts = [tuple("A>B" if draw.random() < each else "B>A" for _ in range(2)) for each in chance]
    return table(verdicts, responses)


def test_the_score_at_equal_style_is_the_quality_without_the_judges_preferences():
    quality, slopes = -0.5, np.array([1.2, 0.8])
    pairs = planted(quality, slopes, num=3000, seed=1, shift=60)
    found = style_control(pairs, "v2", "equal_style")
    truth = 1 / (1 + math.exp(-quality))
    assert found.score.low < truth < found.score.high
    assert found.score.high - found.score.low < 0.08
    assert arena_hard_score(pairs, "v2").low > truth + 0.1  # the plain score rewards length
    assert found.coefficients[:2] == pytest.approx(slopes, abs=0.15)
    assert found.coefficients[2:] == [0, 0]  # no response has lists or bold text


@pytest.mark.parametrize("control", CONTROLS)
def test_each_control_fits_the_models_term_and_its_own_terms_of_style(control):
    """Published branches for length or markdown alone cut off the models' columns of the design."""
    pairs = planted(0.3, np.array([0.7, -0.4]), num=120, seed=2, shift=20)
    features = style_features(pairs)[:, CONTROLS[control]]
    found = battles(pairs, "v2")
    deviation = features[found.pair].std(axis=0)
    inputs = (features / np.where(deviation > 0, deviation, 1))[found.pair]

    def cost(coefficients):
        odds = coefficients[0] + inputs @ coefficients[1:]
        likelihood = found.weights @ (found.wins * odds - np.logaddexp(0, odds))
        return -likelihood + 0.5e-2 * (coefficients**2).sum()

    best = minimize(cost, np.zeros(1 + inputs.shape[1])).x
    ours = style_control(pairs, "v2", control)
    assert ours.score.value == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-5)
    assert ours.coefficients == pytest.approx(best[1:], abs=1e-4)


def test_pairs_without_a_battle_are_no_prompts_of_the_score_at_equal_style():
    """They were counted in `n` and resampled, unlike in the plain score."""
    known = planted(0.3, np.array([0.7, -0.4]), num=60, seed=3, shift=20)
    void = table([("A>B", None)] * 30, [("short", styled(3, 90))] * 30)
    found = style_control([*known, *void], "v2", "equal_style")
    assert found == style_control(known, "v2", "equal_style")
    assert found.score.n == arena_hard_score([*known, *void], "v2").n == 60


def test_features_are_relative_differences():
    pairs = table([("A>B", "A>B")], [("# T\n- one\n**b** x", "plain text of the baseline, which is longer")])
    a, b = (len(text) for text in (pairs[0].games[0].a, pairs[0].games[0].b))
    density = 1 / a
    assert style_features(pairs)[0] == pytest.approx([(a - b) / (a + b), *[density / (density + 1)] * 3])
    tokens = style_features(pairs, np.array([[30.0, 10.0]]))[0]
    assert tokens == pytest.approx([0.5, *[(1 / 30) / (1 / 30 + 1)] * 3])


def test_markdown_in_code_blocks_does_not_count():
    text = "## A\n\n1. one\n* two\n**bold** and __too__\n```\n# not\n- not\n**not**\n```\n###### B"
    assert markdown_counts(text) == [2, 2, 2]
