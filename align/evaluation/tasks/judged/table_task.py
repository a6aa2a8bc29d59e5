"""Tasks on a file of judged pairs: no policy is asked, and no judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from align.errors import InputError
from align.evaluation.given_responses import row_id_of
from align.evaluation.pairs.answers import ModelAnswer, read_answers, with_answers
from align.evaluation.pairs.forms import read_games
from align.evaluation.pairs.table import JudgedGame, models_of
from align.evaluation.task import EstimateInputs, Row, Task, TaskInputs, TaskSize


class JudgedTable(NamedTuple):
    """What a task on judged pairs reads."""

    games: list[JudgedGame]
    answers: list[dict[str, ModelAnswer]]  # of the model and of the baseline; empty if no files are given


def question_of(row: Row) -> str | None:
    """Return the category and id of the question that a row of any of the forms is about; None without an id."""
    games = row.get("games")
    known = games[0] if isinstance(games, list) and games and isinstance(games[0], dict) else {}
    found = row_id_of(row) or row_id_of(known)
    return None if found is None else f"{row.get('category') or known.get('category') or ''} {found}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTask(Task):
    """A task that computes metrics of one model from a file of judged pairs, in any of the forms of `FORMS`."""

    options: frozenset[str] = frozenset({"data", "limit", "responses", "out", "rows.columns", "rows.split"})
    required: tuple[str, ...] = ("data",)
    item: Callable[[Row], str | None] | None = question_of  # both games of a pair, and both turns of a question

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return no size: nothing is sampled or measured."""
        return TaskSize(0, 0, 0)

    def read(self, inputs: TaskInputs) -> JudgedTable:
        """Return the table of the file, with the responses of both models if their files are given.

        Raises `InputError` for the games of two models.
        """
        games = read_games(list(inputs.rows(self)), self.name)
        if len(models := models_of(games)) > 1:
            raise InputError(
                f"{self.name}: pairs of one model are scored, not of {', '.join(models)}: one file for each"
            )
        answers = [read_answers(path) for path in inputs.response_files]
        return JudgedTable(with_answers(games, *answers) if answers else games, answers)


def responses_known(games: list[JudgedGame]) -> bool:
    """Return whether every game has both responses."""
    return all(game.a is not None and game.b is not None for game in games)
