"""FastChat's pairwise judgments, and the reviews of the Vicuna evaluation, an older form.

Rows of JUDGE_pair.jsonl are {question_id, model_1, model_2, g1_winner, g2_winner, judge: [model, prompt], g1_judgment,
g2_judgment, turn}: in the first game model 1 is A. Winners are model_1, model_2, tie or error.
Reviews are {question_id, answer1_id, answer2_id, score: [first, second], text}.
"""

from __future__ import annotations

from typing import Any

from align.errors import InputError
from align.evaluation.pairs.forms.form import VOID, Form, Row, id_or_error
from align.evaluation.pairs.table import A_FIRST, B_FIRST, JudgedGame, JudgedPair, Order
from align.rewards.verdicts import REQUEST_FAILED, why_void

WINNERS = {"model_1": "A>B", "tie": "A=B", "model_2": "B>A"}
ERROR = "error"
API_ERROR = "$ERROR$"  # a judgment's text after a request that failed
GAMES: tuple[tuple[str, Order], ...] = (("g1", A_FIRST), ("g2", B_FIRST))


def read(row: Row) -> list[JudgedGame]:
    """Return the games of a row; raise `InputError` for an unknown winner."""
    judge = row.get("judge") or ""
    known: dict[str, Any] = {
        "id": id_or_error(row, "question_id"),
        "prompt": "",
        "a": None,
        "b": None,
        "judge": " ".join(map(str, judge)) if isinstance(judge, list) else str(judge),
        "model": str(row["model_1"]),
        "baseline": str(row["model_2"]),
        "turn": int(row.get("turn", 1)),
    }
    found: list[JudgedGame] = []
    for game, order in GAMES:
        winner = row[f"{game}_winner"]
        text = str(row.get(f"{game}_judgment") or "")
        if winner not in (*WINNERS, ERROR):
            raise InputError(f"has {game}_winner {winner!r}; it is one of {', '.join((*WINNERS, ERROR))}")
        void = "" if winner in WINNERS else str(row.get(f"{game}_{VOID}") or _why_void(text))
        found.append(JudgedGame(**known, order=order, raw=text, verdict=WINNERS.get(winner), void=void))
    return found


def write(pair: JudgedPair) -> Row:
    """Return the row of a pair; its form knows no `>>`, so that these become `>`."""
    first = pair.games[0]
    row: dict[str, Any] = {
        "question_id": int(first.id) if first.id.isdecimal() else first.id,
        "model_1": first.model,
        "model_2": first.baseline,
        "judge": first.judge.rsplit(" ", 1),
        "turn": first.turn,
    }
    by_order = {game.order: game for game in pair.games}
    names = {label: name for name, label in WINNERS.items()}
    for prefix, order in GAMES:
        if order not in by_order:
            raise InputError(f"pair {first.id!r} has no game with {order}; FastChat's form holds one in each order")
        game = by_order[order]
        if isinstance(game.verdict, float | int):
            raise InputError(f"pair {first.id!r} has a probability as verdict; FastChat's form holds winners")
        row[f"{prefix}_winner"] = ERROR if game.verdict is None else names[game.verdict.replace(">>", ">")]
        row[f"{prefix}_judgment"] = text = API_ERROR if game.void == REQUEST_FAILED else game.raw
        if game.verdict is None and game.void != _why_void(str(text)):
            row[f"{prefix}_{VOID}"] = game.void
    return row


def _why_void(text: str) -> str:
    return REQUEST_FAILED if text == API_ERROR else why_void(text)


def read_review(row: Row) -> list[JudgedGame]:
    """Return the game of a review by its stored scores, which a person filled in where the text has another form."""
    one, other = row["score"]
    text = str(row["text"])
    is_void = min(one, other) < 0  # -1 of FastChat's parser
    return [
        JudgedGame(
            id=id_or_error(row, "question_id"),
            prompt="",
            a=None,
            b=None,
            order=A_FIRST,
            judge=str(row.get("reviewer_id", "")),
            raw=text,
            verdict=None if is_void else "A>B" if one > other else "A=B" if one == other else "B>A",
            void=why_void(text) if is_void else "",
        )
    ]


def write_review(pair: JudgedPair) -> Row:
    """Raise `InputError`: a review holds scores, and the table does not."""
    raise InputError(f"pair {pair.games[0].id!r}: Vicuna's reviews hold scores, and the table of judged pairs does not")


FORM = Form(frozenset({"question_id", "model_1", "model_2", "g1_winner", "g2_winner"}), read, write)
VICUNA_FORM = Form(frozenset({"question_id", "answer1_id", "answer2_id", "score", "text"}), read_review, write_review)
