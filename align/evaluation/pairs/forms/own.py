"""The form of this project: one row per game, or one per pair with its `games`, as a step of a recipe writes them."""

from __future__ import annotations

from align.evaluation.pairs.forms.form import Form, Row
from align.evaluation.pairs.table import JudgedGame, JudgedPair


def read(row: Row) -> list[JudgedGame]:
    """Return the games of a row."""
    return [JudgedGame.from_json(each) for each in row.get("games") or [row]]


def write(pair: JudgedPair) -> Row:
    """Return a pair with its games."""
    return {"prompt": pair.games[0].prompt, "games": [game.to_json() for game in pair.games]}


FORM = Form(frozenset({"prompt"}), read, write)
