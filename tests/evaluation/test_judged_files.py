"""Tasks on files of judged pairs: `limit` and `skip` count what was judged, and an interval is over questions."""

import json
import random

import pytest

from align.commands.evaluate import EvaluateSettings, Request, evaluate
from align.commands.one_step import RowOptions
from align.distributed.progress import SilentProgress
from align.evaluation.pairs.forms import read_games
from align.evaluation.pairs.forms.convert import convert_pairs
from align.evaluation.pairs.table import pairs_of
from align.evaluation.pairs.win_rates import equal_length, position_bias, win_rate


def games_of(number, wins=("A>B", "A>B")):
    """Both games of a pair as rows."""
    known = {"id": str(number), "prompt": f"ask {number}", "a": "yes", "b": "no", "judge": "j"}
    return [{**known, "order": order, "verdict": win} for order, win in zip(("a first", "b first"), wins, strict=True)]


def turn_of(number, turn, winner):
    judged = {f"g{game}_{name}": value for game in (1, 2) for name, value in (("winner", winner), ("judgment", "x"))}
    return {"question_id": number, "model_1": "ours", "model_2": "theirs", "turn": turn, **judged}


def counts(tmp_path, rows, *, task="judged_pairs", limit=None, **reading):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = EvaluateSettings(rows=RowOptions(**reading))
    return evaluate(Request(task, str(path), limit=limit), None, settings=settings, progress=SilentProgress())


@pytest.mark.parametrize("order", ["one after the other", "one order first", "shuffled"])
def test_a_limit_cuts_no_pair_in_two(tmp_path, order):
    rows = [row for number in range(9) for row in games_of(number)]
    if order == "one order first":
        rows = rows[::2] + rows[1::2]
    elif order == "shuffled":
        random.Random(0).shuffle(rows)
    found = counts(tmp_path, rows, limit=3)
    assert (found["pairs"], found["games"]) == (3, 6)
    assert found["scores"]["win_rate.consistent"]["n"] == 3


def test_a_limit_keeps_both_turns_of_a_question(tmp_path):
    rows = [turn_of(number, turn, "model_1") for turn in (1, 2) for number in range(81, 91)]
    found = counts(tmp_path, rows, limit=4)
    assert (found["pairs"], found["games"]) == (8, 16)


def test_a_limit_keeps_both_turns_in_every_form_that_holds_turns(tmp_path):
    rows = [turn_of(number, turn, "model_1") for turn in (1, 2) for number in range(81, 91)]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert_pairs(str(tmp_path / "judged.jsonl"), "align", tmp_path / "own.jsonl")
    converted = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert len(converted) == 20
    found = counts(tmp_path, converted, limit=4)
    assert (found["pairs"], found["games"]) == (8, 16)


def test_a_limit_counts_the_questions_of_each_category(tmp_path):
    rows = [{**row, "category": kind} for kind in ("maths", "prose") for n in range(5) for row in games_of(n)]
    assert counts(tmp_path, rows, limit=3)["pairs"] == 3


def test_rows_that_hold_a_whole_pair_are_counted_one_by_one(tmp_path):
    row = {"instruction": "Say it.", "output_1": "no", "output_2": "yes", "preference": 2.0, "generator_2": "ours"}
    rows = [{**row, "instruction": f"Say {number}."} for number in range(5)]
    assert counts(tmp_path, rows, task="alpaca_eval", limit=3)["games"] == 3
    pairs = [{"prompt": f"ask {number}", "games": games_of(number)} for number in range(5)]
    assert counts(tmp_path, pairs, limit=3)["games"] == 6


def test_the_interval_is_over_questions_and_not_over_their_turns():
    """Both turns of a question have one winner: 40 observations, not 80."""
    rows = [turn_of(number, turn, ("model_1", "model_2")[number % 2]) for number in range(40) for turn in (1, 2)]
    pairs = pairs_of(read_games([{**row, "turn": 1} for row in rows[::2]], "one turn"))
    both = pairs_of(read_games(rows, "both turns"))
    one, two = win_rate(pairs, "both_games"), win_rate(both, "both_games")
    assert (two.value, two.n) == (one.value, one.n) == (0.5, 40)
    assert (two.low, two.high) == (one.low, one.high)
    assert position_bias(both).n == 40
    texts = {"a": "yes", "b": "no."}
    answered = [
        pair._replace(games=tuple(type(game)(**{**game.to_json(), **texts}) for game in pair.games)) for pair in both
    ]
    controlled = equal_length(answered).win_rate
    assert controlled.n == 40
    # Of 40 independent observations of 0 or 1
    assert controlled.high - controlled.low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.2)
