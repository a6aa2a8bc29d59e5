import gzip
import json
import math
from pathlib import Path

import pytest

from align.errors import InputError
from align.evaluation.pairs.forms import read_games
from align.evaluation.pairs.table import pairs_of
from align.evaluation.pairs.win_rates import equal_length, win_rate
from align.evaluation.tasks.judged.alpaca_eval import discrete_win_rate

SUBSET = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval" / "multi_response_subset.jsonl.gz"
ROW = {"instruction": "Say it.", "output_1": "Said.", "output_2": "It is said.", "generator_2": "m", "preference": 1.9}

# Of the leaderboard at cd543a1, on 805 prompts: model -> (win rate, length-controlled win rate), in percent
PUBLISHED = {
    "alpaca-7b": (2.59, 5.9),
    "gemma-2b-it": (3.40, 5.4),
    "gpt-3.5-turbo-1106": (9.18, 19.3),
    "gpt4_0613_concise": (9.40, 21.6),
    "FuseChat-Llama-3.2-1B-Instruct": (29.92, 25.3),
    "FuseChat-Llama-3.1-8B-Instruct": (63.33, 65.4),
    "NullModel": (76.92, 86.5),
}
# Prompts of the subset are every third of the 805


def judged_pairs(rows):
    return pairs_of(read_games(rows, "annotations"))


needs_subset = pytest.mark.skipif(not SUBSET.exists(), reason="no AlpacaEval annotations beside the repository")


@pytest.fixture(scope="module")
def annotations():
    """Return the rows of annotations.json of each model, for the 269 prompts of the subset."""
    with gzip.open(SUBSET, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 269
    return {
        model: [
            {
                "instruction": row["instruction"],
                "output_1": row["baseline_output"],
                "output_2": response["output"],
                "generator_2": model,
                "preference": response["preference"],
            }
            for row in rows
            for response in row["responses"]
            if response["generator"] == model
        ]
        for model in PUBLISHED
    }


@pytest.fixture(scope="module")
def rates(annotations):
    tables = {model: judged_pairs(rows) for model, rows in annotations.items()}
    return {model: (win_rate(pairs, "both_games"), equal_length(pairs)) for model, pairs in tables.items()}


@needs_subset
def test_the_win_rate_is_alpaca_evals(annotations, rates):
    for model, rows in annotations.items():
        shares = [row["preference"] - 1 for row in rows]
        assert rates[model][0].value == pytest.approx(sum(shares) / len(shares))
    percent = {model: round(100 * found.value, 2) for model, (found, _) in rates.items()}
    assert percent["gpt-3.5-turbo-1106"] == 9.63  # by AlpacaEval's own code on these prompts


@needs_subset
def test_the_correction_for_length_of_six_models_is_within_4_points_of_the_published_one(rates):
    """The corrections are compared, as the plain rates on 269 and on 805 prompts differ by up to 4.2 points."""
    errors = {}
    for model, (plain, controlled) in PUBLISHED.items():
        ours, at_equal_length = rates[model]
        errors[model] = 100 * (at_equal_length.win_rate.value - ours.value) - (controlled - plain)
    assert {model for model, error in errors.items() if abs(error) > 4} == {"gpt-3.5-turbo-1106"}
    assert errors["gpt-3.5-turbo-1106"] < 4.2


@needs_subset
def test_models_are_in_the_published_order(rates):
    """Two models whose published rates are 0.5 points apart may change places."""
    order = sorted(rates, key=lambda model: rates[model][1].win_rate.value)
    close = {"alpaca-7b", "gemma-2b-it"}
    assert order[2:] == [model for model in PUBLISHED if model not in close]
    assert set(order[:2]) == close


@needs_subset
def test_the_shares_of_shorter_responses_are_reported(annotations, rates):
    for model, rows in annotations.items():
        shorter = sum(len(row["output_2"]) < len(row["output_1"]) for row in rows)
        assert rates[model][1].shorter == shorter / len(rows)


def test_draws_and_rows_without_a_verdict_are_told_apart():
    preferences = (1, 1.25, 1.5, 0, 2, None)
    pairs = judged_pairs([{**ROW, "instruction": str(n), "preference": each} for n, each in enumerate(preferences)])
    assert [pair.wins for pair in pairs] == [[0], [0.25], [0.5], [0.5], [1], [None]]
    assert discrete_win_rate(pairs).value == (0 + 0 + 0.5 + 0.5 + 1) / 5
    assert {pair.longer_by for pair in pairs} == {6}


@pytest.mark.parametrize("value", [-1, 0.5, 2.1, "m", float("nan")])
def test_a_preference_out_of_range_is_an_error(value):
    with pytest.raises(InputError, match="row 2: has preference"):
        judged_pairs([ROW, {**ROW, "preference": value}])


def test_an_output_that_is_no_text_is_an_error():
    with pytest.raises(InputError, match="row 1: has output_2 7"):
        judged_pairs([{**ROW, "output_2": 7}])


def test_the_games_of_a_pair_are_one_observation_of_the_discrete_win_rate():
    """Two games in both orders of 40 pairs were 80 prompts, so that the interval was too narrow by the root of 2."""
    known = {"prompt": "", "a": "one", "b": "two"}
    games = [
        {**known, "id": number, "order": order, "verdict": 0.9 if number % 2 else 0.2}
        for number in range(40)
        for order in ("a first", "b first")
    ]
    found = discrete_win_rate(judged_pairs(games))
    assert (found.value, found.n) == (0.5, 40)
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.1)
