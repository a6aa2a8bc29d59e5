"""Answers of models in files of other tools, for the rows of the table of judged pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from align.data.rows import read_rows
from align.errors import InputError
from align.evaluation.given_responses import read_responses
from align.evaluation.pairs.table import JudgedGame
from align.evaluation.task import Row


class ModelAnswer(NamedTuple):
    """A model's answer to a question, or its answers to each of the question's turns."""

    turns: tuple[str, ...]
    num_tokens: int | None = None  # where the file counts them


def read_answers(path: str) -> dict[str, ModelAnswer]:
    """Return the answer to each question of a file, by the question's id; where rows have none, by the prompt.

    Forms are those of `given_responses`. Of several responses in a row, the first counts. Raises `InputError` for a row
    without id or prompt, and for a question with two answers.
    """
    tokens = [_num_tokens(row) for row in read_rows(path)]
    found: dict[str, ModelAnswer] = {}
    row_of: dict[str, int] = {}
    for number, given in read_responses(path):
        key = given.prompt if given.row_id is None else given.row_id
        if key is None:
            raise InputError(f"{path}: row {number} has neither the id of a question nor a prompt")
        if row_of.setdefault(key, number) != number:
            raise InputError(f"{path}: row {number}: an earlier row answers {key[:60]!r}")
        found.setdefault(key, ModelAnswer(given.turns, tokens[number - 1]))
    return found


def _num_tokens(row: Row) -> int | None:
    """Return the number of tokens that Arena-Hard's files give for an answer, in any of its three places."""
    counted = row.get("metadata") or row.get("conv_metadata")
    if counted is None and row.get("choices"):
        turns: Any = row["choices"][0].get("turns") or [None]
        counted = turns[0]
    return counted.get("token_len") if isinstance(counted, Mapping) else None


def with_answers(
    games: Iterable[JudgedGame], ours: Mapping[str, ModelAnswer], baseline: Mapping[str, ModelAnswer]
) -> list[JudgedGame]:
    """Return the games with the responses of both models; raise `InputError` for a question without either."""
    found: list[JudgedGame] = []
    for game in games:
        texts: list[str] = []
        for answers, whose in ((ours, "the model"), (baseline, "the baseline")):
            if game.id not in answers or len(answers[game.id].turns) < game.turn:
                raise InputError(f"{whose} has no answer to {game.id!r} (turn {game.turn}), which was judged")
            texts.append(answers[game.id].turns[game.turn - 1])
        found.append(replace(game, a=texts[0], b=texts[1]))
    return found
