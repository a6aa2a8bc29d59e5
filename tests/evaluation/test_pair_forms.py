"""Read and write files of judged pairs in the forms of other tools."""

import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from align.data.rows import read_rows
from align.errors import InputError
from align.evaluation.pairs.answers import read_answers, with_answers
from align.evaluation.pairs.forms import FORMS, read_games
from align.evaluation.pairs.forms.convert import convert_pairs
from align.evaluation.pairs.table import JudgedGame, first_probability, pairs_of
from align.evaluation.pairs.win_rates import win_rate
from align.rewards.judge_prompts.parsing import LABELS, normal_label, parse_label

REVIEWS = Path(__file__).parents[3] / "shared" / "data" / "vicuna_blog_eval" / "reviews_gpt4.jsonl.gz"

ARENA_HARD = {
    "uid": "0f3c",
    "category": "hard_prompt",
    "judge": "gpt-4.1",
    "model": "ours",
    "baseline": "o3-mini",
    "games": [
        {"score": "A>>B", "judgment": {"answer": "A is right. [[A>>B]]"}},  # A is the baseline
        {"score": "B>A", "judgment": {"answer": "[[B>A]]"}},  # A is the model
    ],
}
ARENA_HARD_2024 = {
    "question_id": "0f3c",
    "model": "ours",
    "judge": "gpt-4-1106-preview",
    "games": [{"judgment": "[[A=B]]", "score": "A=B"}, {"judgment": "Both are fine.", "score": None}],
}
FASTCHAT = {
    "question_id": 81,
    "model_1": "ours",
    "model_2": "gpt-3.5-turbo",
    "judge": ["gpt-4", "pair-v2"],
    "turn": 1,
    "g1_winner": "model_1",
    "g1_judgment": "[[A]]",
    "g2_winner": "tie",
    "g2_judgment": "[[C]]",
}
ALPACA_EVAL = {
    "dataset": "helpful_base",
    "instruction": "Name a colour.",
    "output_1": "Blue is a colour.",
    "generator_1": "gpt4_1106_preview",
    "output_2": "Red.",
    "generator_2": "ours",
    "annotator": "weighted_alpaca_eval_gpt4_turbo",
    "preference": 1.25,
}
ROWS = {
    "arena_hard": ARENA_HARD,
    "arena_hard_2024": ARENA_HARD_2024,
    "fastchat": FASTCHAT,
    "alpaca_eval": ALPACA_EVAL,
}
# What each file says of our model: the outcome when it is shown first, and when it is shown second
OUTCOMES = {
    "arena_hard": ["B>A", "B>>A"],
    "arena_hard_2024": [None, "A=B"],
    "fastchat": ["A>B", "A=B"],
    "alpaca_eval": [0.25],
}


@pytest.mark.parametrize("form", ROWS)
def test_verdicts_are_about_our_model_at_either_position(form):
    (pair,) = pairs_of(read_games([ROWS[form]], "file"))
    assert [game.verdict for game in pair.games] == OUTCOMES[form]
    assert pair.games[0].model == "ours"
    assert len(pair.games) == 1 or [game.order for game in pair.games] == ["a first", "b first"]


@pytest.mark.parametrize("form", ROWS)
def test_a_row_that_is_read_and_written_is_the_same(form):
    (pair,) = pairs_of(read_games([ROWS[form]], "file"))
    assert FORMS[form].write(pair) == ROWS[form]


def known(order, verdict, **more):
    void = "no mark" if verdict is None else ""
    values = {"id": "7", "prompt": "Name one.", "a": "Red.", "b": "Blue is one.", "judge": "gpt-4 pair-v2"}
    return JudgedGame(
        **{**values, "model": "ours", "baseline": "base", "void": void, **more}, order=order, verdict=verdict
    )


@pytest.mark.parametrize("form", ["align", "arena_hard", "arena_hard_2024", "fastchat"])
@pytest.mark.parametrize("first", [*LABELS, None])
@pytest.mark.parametrize("second", [*LABELS, None])
def test_every_pair_of_labels_survives_a_file(form, first, second):
    (pair,) = pairs_of([known("b first", second, raw="why [[X]]"), known("a first", first)])
    row = json.loads(json.dumps(FORMS[form].write(pair)))
    (found,) = pairs_of(read_games([row], "file"))
    expected = [each and each.replace(">>", ">") if form == "fastchat" else each for each in (first, second)]
    assert [game.verdict for game in found.games] == expected
    assert [game.void for game in found.games] == [game.void for game in pair.games]
    assert [game.raw for game in found.games] == [game.raw for game in pair.games]


REASONS = ["no mark", "refusal", "cut off", "request failed", "prompt too long"]


@pytest.mark.parametrize("form", ["align", "arena_hard", "arena_hard_2024", "fastchat", "alpaca_eval"])
@pytest.mark.parametrize("first", REASONS)
@pytest.mark.parametrize("second", REASONS)
def test_the_reason_of_a_void_game_survives_a_file(form, first, second):
    (pair,) = pairs_of([known("a first", None, void=first), known("b first", None, void=second)])
    (found,) = pairs_of(read_games([FORMS[form].write(pair)], "file"))
    assert [game.void for game in found.games] == [first, second]


@pytest.mark.parametrize("form", ["align", "arena_hard", "arena_hard_2024", "fastchat", "alpaca_eval"])
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("void", ["a first", "b first"])
def test_one_void_game_of_two_survives_a_file(form, reason, void):
    verdicts = {"a first": "A>B", "b first": "A>B", void: None}
    reasons = {"a first": "", "b first": "", void: reason}
    (pair,) = pairs_of([known(order, verdict, void=reasons[order]) for order, verdict in verdicts.items()])
    (found,) = pairs_of(read_games([json.loads(json.dumps(FORMS[form].write(pair)))], "file"))
    expected = [(order, None if order == void else 1.0, reasons[order]) for order in ("a first", "b first")]
    assert [(game.order, game.win, game.void) for game in found.games] == expected


def test_a_preference_between_void_games_is_rejected():
    row = {**ROWS["alpaca_eval"], "preference": 1.5, "void_a_first": "refusal", "void_b_first": "cut off"}
    with pytest.raises(InputError, match=r"file: row 1: has preference 1.5, and both of its games are void"):
        read_games([row], "file")


def test_a_probability_is_written_where_the_form_has_numbers_only():
    (pair,) = pairs_of([known("a first", 0.75), known("b first", 0.25)])
    assert FORMS["alpaca_eval"].write(pair)["preference"] == 1.5
    assert [game.verdict for game in read_games([FORMS["align"].write(pair)], "file")] == [0.75, 0.25]
    for form in ("arena_hard", "arena_hard_2024", "fastchat"):
        with pytest.raises(InputError, match="has a probability"):
            FORMS[form].write(pair)


def test_a_table_of_games_is_read_as_it_is_written():
    games = [known("a first", "A>B", category="math", turn=2), known("", 0.3, id="8")]
    assert read_games([json.loads(json.dumps(game.to_json())) for game in games], "file") == games


def test_a_verdict_of_log_probabilities_is_alpaca_evals():
    """AlpacaEval: preference = 2 - exp(l_m - logsumexp(l_m, l_M)) for the output shown first, then put in order."""
    logprobs = {"m": -0.3, "M": -1.4, "Both": -9.0}
    preference = 1 / (1 + 2.718281828459045 ** (-1.4 + 0.3))
    row = known("a first", None, raw=logprobs, void="").to_json()
    games = read_games([row, {**row, "order": "b first"}], "file")
    assert [game.verdict for game in games] == pytest.approx([preference, 1 - preference])
    assert first_probability({"M": -0.1}) == 0
    (without,) = read_games([{**row, "raw": {"The": -0.1}}], "file")
    assert (without.verdict, without.void) == (None, "no mark")
    with pytest.raises(InputError, match="needs the order"):
        read_games([{**row, "order": ""}], "file")


def test_log_probabilities_of_stored_completions_are_kept():
    top = [{"token": "M", "logprob": -0.02}, {"token": "m", "logprob": -4.0}]
    completion = {"logprobs": {"content": [{"token": "M", "top_logprobs": top}]}, "text": "M"}
    (game,) = read_games([{**ALPACA_EVAL, "raw_completion": completion}], "file")
    assert game.raw == {"M": -0.02, "m": -4.0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "no form of judged pairs has the columns question"),
        ({**ARENA_HARD, "games": [None]}, "row 1: games are two"),
        ({**ARENA_HARD, "games": [None, {"score": "C"}]}, "row 1: has score 'C'"),
        ({**FASTCHAT, "g2_winner": "A"}, "row 1: has g2_winner 'A'"),
        ({**ALPACA_EVAL, "output_1": None}, "row 1: has output_1 None"),
        (known("a first", "A>B").to_json() | {"verdict": 2}, "row 1: a verdict is one of"),
        (known("a first", "A>B").to_json() | {"order": "A"}, "row 1: order is"),
    ],
)
def test_a_row_that_cannot_be_read_is_an_error_with_its_place(row, message):
    with pytest.raises(InputError, match=message):
        read_games([row], "file")


def test_a_pair_that_was_judged_twice_in_one_order_is_an_error():
    with pytest.raises(InputError, match="'81' of ours has 4 games"):
        pairs_of(read_games([FASTCHAT, FASTCHAT], "file"))
    assert len(pairs_of(read_games([FASTCHAT, {**FASTCHAT, "turn": 2}], "file"))) == 2


def test_labels_are_read_as_arena_hard_reads_them():
    assert {mark: normal_label(mark) for mark in ("B<<A", "B<A", "A<B", "A<<B", "B=A", "A>B", "AB", "<A")} == {
        "B<<A": "A>>B",
        "B<A": "A>B",
        "A<B": "B>A",
        "A<<B": "B>>A",
        "B=A": "A=B",
        "A>B": "A>B",
        "AB": None,
        "<A": None,
    }
    assert parse_label("First [[A>B]], but my final verdict is [[b>>a]]") == (0.0, True)
    assert parse_label("My verdict: [A=B]").value == 0.5
    assert parse_label("A is better.") is None


def test_answers_of_other_tools_are_joined_by_the_question(tmp_path):
    fastchat = {"question_id": 81, "model_id": "ours", "choices": [{"index": 0, "turns": ["first", "second"]}]}
    arena = {"uid": "81", "model": "base", "messages": [{"role": "user", "content": "q"}], "metadata": {"token_len": 3}}
    arena["messages"].append({"role": "assistant", "content": {"answer": "an answer"}})
    old = {"question_id": "81", "model_id": "old", "choices": [{"turns": [{"content": "text", "token_len": 9}]}]}
    alpaca = {"instruction": "q", "output": "text", "generator": "ours"}
    read = {}
    for name, row in (("fastchat", fastchat), ("arena", arena), ("old", old), ("alpaca", alpaca)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        read[name] = read_answers(str(tmp_path / f"{name}.jsonl"))
    assert read["arena"]["81"] == (("an answer",), 3)
    assert read["old"]["81"] == (("text",), 9)
    assert read["alpaca"]["q"].turns == ("text",)
    games = read_games([FASTCHAT], "file")
    assert {(game.a, game.b) for game in with_answers(games, read["fastchat"], read["arena"])} == {
        ("first", "an answer")
    }
    with pytest.raises(InputError, match=r"the baseline has no answer to '81' \(turn 2\)"):
        with_answers([replace(games[0], turn=2)], read["fastchat"], read["arena"])


@pytest.mark.parametrize(("form", "name"), [("fastchat", "out.jsonl"), ("alpaca_eval", "annotations.json")])
def test_a_file_is_converted_into_another_form(tmp_path, form, name):
    games = [
        known("a first", "A>B"),
        known("b first", "A=B"),
        known("a first", "B>A", id="8", prompt="2"),
        known("b first", None, id="8", prompt="2"),
    ]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(game.to_json()) + "\n" for game in games))
    summary = convert_pairs(str(tmp_path / "judged.jsonl"), form, tmp_path / name)
    assert (summary["pairs"], summary["games"], summary["void"]) == (2, 4, {"no mark": 1})
    found = pairs_of(read_games(list(read_rows(str(tmp_path / name))), name))
    assert [pair.wins for pair in found] == ([[1, 0.5], [0, None]] if form == "fastchat" else [[0.75], [0, None]])
    with pytest.raises(InputError, match="exists"):
        convert_pairs(str(tmp_path / "judged.jsonl"), form, tmp_path / name)
    with pytest.raises(InputError, match="no form of judged pairs is called 'chat'"):
        convert_pairs(str(tmp_path / "judged.jsonl"), "chat", tmp_path / "other")


@pytest.mark.skipif(not REVIEWS.exists(), reason="no reviews of the Vicuna evaluation beside the repository")
def test_the_reviews_of_the_vicuna_evaluation_are_read():
    with gzip.open(REVIEWS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 1040
    scored = re.compile(r"\s*([\d.]+)[\s,]+([\d.]+)[\s,]*")  # the first line of a review
    readable = [(found, row) for row in rows if (found := scored.fullmatch(row["text"].split("\n", 1)[0]))]
    assert len(readable) == 1001  # the other 39 begin with the reviewer's own solution; a person read them
    for found, row in readable:
        one, other = float(found[1]), float(found[2])
        assert [one, other] == row["score"]
        (game,) = read_games([row], "file")
        assert game.verdict == ("A>B" if one > other else "B>A" if one < other else "A=B")
    files = Counter(row["file"] for row in rows)
    assert set(files.values()) == {80}
    for name in files:
        own = [row for row in rows if row["file"] == name]
        pairs = pairs_of(read_games(own, name))
        ties = sum(row["score"][0] == row["score"][1] for row in own)
        wins = sum(row["score"][0] > row["score"][1] for row in own)
        assert win_rate(pairs, "both_games").value == (wins + ties / 2) / 80
