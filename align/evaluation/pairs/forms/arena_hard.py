"""Arena-Hard's model_judgment files, of v0.1 (2024) and of v2.

Rows are {uid, category, judge, model, baseline, games} or in 2024 {question_id, model, judge, games}, where `games` are
two of {score, judgment, prompt}, or null for a request that failed. In the first game A is the baseline, in the second
the model. The responses are in other files (`align.evaluation.pairs.answers`).
"""

from __future__ import annotations

from typing import Any

from align.errors import InputError
from align.evaluation.pairs.forms.form import VOID, Form, Row, id_or_error
from align.evaluation.pairs.table import A_FIRST, B_FIRST, JudgedGame, JudgedPair, Order
from align.rewards.judge_prompts.parsing import normal_label
from align.rewards.verdicts import REQUEST_FAILED, why_void

ORDERS: tuple[Order, Order] = (B_FIRST, A_FIRST)  # of the games of a row
BASELINE_2024 = "gpt-4-0314"
SWAPPED = {"A": "B", "B": "A"}


def read(row: Row) -> list[JudgedGame]:
    """Return the games of a row; raise `InputError` unless it has two, each with a label or null."""
    if not isinstance(row["games"], list) or len(row["games"]) != len(ORDERS):
        raise InputError(f"games are two, in both orders, not {row['games']!r:.80}")
    known: dict[str, Any] = {
        "id": id_or_error(row, "uid" if "uid" in row else "question_id"),
        "prompt": "",
        "a": None,
        "b": None,
        "judge": str(row.get("judge") or ""),
        "model": str(row["model"]),
        "baseline": str(row.get("baseline") or ("" if "uid" in row else BASELINE_2024)),
        "category": str(row.get("category") or ""),
    }
    return [
        JudgedGame(**known, order=order, **_outcome(game, order))
        for order, game in zip(ORDERS, row["games"], strict=True)
    ]


def _outcome(game: Any, order: Order) -> dict[str, Any]:  # noqa: ANN401 - JSON
    if game is None:
        return {"verdict": None, "void": REQUEST_FAILED}
    judgment = game.get("judgment") or ""
    text = str(judgment.get("answer") or "") if isinstance(judgment, dict) else str(judgment)
    score = game["score"]
    if score is None:
        return {"verdict": None, "void": str(game.get(VOID) or why_void(text)), "raw": text}
    if (label := normal_label(str(score))) is None:
        raise InputError(f"has score {score!r}, which is no label of Arena-Hard, such as A>B")
    return {"verdict": _for(order, label), "raw": text}


def _for(order: Order, label: str) -> str:
    """Return a label about the responses shown first and second as one about both models, and the other way round."""
    return label if order == A_FIRST else "".join(SWAPPED.get(letter, letter) for letter in label.replace("A=B", "B=A"))


def _both(pair: JudgedPair) -> list[JudgedGame]:
    by_order = {game.order: game for game in pair.games}
    if len(by_order) < len(ORDERS) or "" in by_order:
        raise InputError(f"pair {pair.games[0].id!r} has one game; Arena-Hard's form holds one in each order")
    return [by_order[order] for order in ORDERS]


def _score(game: JudgedGame) -> str | None:
    if isinstance(game.verdict, float | int):
        raise InputError(f"pair {game.id!r} has a probability as verdict; Arena-Hard's form holds labels")
    return None if game.verdict is None else _for(game.order, game.verdict)


def _void(game: JudgedGame) -> dict[str, str]:
    return {VOID: game.void} if game.verdict is None and game.void != why_void(str(game.raw)) else {}


def write(pair: JudgedPair) -> Row:
    """Return the row of a pair, in the form of v2."""
    first = pair.games[0]
    games = list[Row | None]()
    for game in _both(pair):
        failed = game.void == REQUEST_FAILED
        known = {"score": _score(game), "judgment": {"answer": game.raw}, **_void(game)}
        games.append(None if failed else known)
    row = {"uid": first.id, "category": first.category, "judge": first.judge}
    return {**row, "model": first.model, "baseline": first.baseline, "games": games}


def write_2024(pair: JudgedPair) -> Row:
    """Return the row of a pair, in the form of 2024, which holds no baseline."""
    first = pair.games[0]
    games = [{"judgment": game.raw, "score": _score(game), **_void(game)} for game in _both(pair)]
    return {"question_id": first.id, "model": first.model, "judge": first.judge, "games": games}


FORM = Form(frozenset({"uid", "games", "model"}), read, write)
FORM_2024 = Form(frozenset({"question_id", "games", "model"}), read, write_2024)
