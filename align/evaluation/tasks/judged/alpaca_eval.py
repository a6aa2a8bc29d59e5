"""Win rates of AlpacaEval from its annotations.json: weighted, discrete, at equal length, and length-controlled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from align.errors import InputError
from align.evaluation.pairs.length_controlled import length_controlled_win_rate
from align.evaluation.pairs.table import TIE, JudgedPair, pairs_of
from align.evaluation.pairs.win_rates import equal_length, pair_counts, win_rate
from align.evaluation.statistics import Score
from align.evaluation.task import TaskInputs, TaskResult
from align.evaluation.tasks.judged.table_task import TableTask

GAMES = "both_games"  # a row is one game, and each game counts


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpacaEvalTask(TableTask):
    """AlpacaEval's metrics; with `published`, also its length-controlled win rate, by its own package."""

    published: bool = False

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Score the rows."""
        games, _ = self.read(inputs)
        pairs = pairs_of(games)
        weighted = win_rate(pairs, GAMES)
        discrete = discrete_win_rate(pairs)
        if weighted is None or discrete is None:
            raise InputError(f"{self.name}: none of {len(pairs)} rows has a preference")
        length = equal_length(pairs)
        scores = {
            "win_rate": weighted,
            "discrete_win_rate": discrete,
            "win_rate_equal_length": length.win_rate,
        }
        if self.published:
            scores["length_controlled_win_rate"] = length_controlled_win_rate(pairs)
        return TaskResult(
            scores=scores,
            verdicts=[game.to_json() for game in games],
            counts={**pair_counts(pairs), "length": length.counts()},
        )


def discrete_win_rate(pairs: Sequence[JudgedPair]) -> Score | None:
    """Return the win rate of probabilities that are rounded to a win, a tie or a loss; None if no pair counts."""
    rounded = [JudgedPair(tuple(replace(game, verdict=_rounded(game.win)) for game in pair.games)) for pair in pairs]
    return win_rate(rounded, GAMES)


def _rounded(win: float | None) -> float | None:
    return win if win is None or win == TIE else float(win > TIE)


METRICS = ("win_rate", "discrete_win_rate", "win_rate_equal_length")
TASK = AlpacaEvalTask(name="alpaca_eval", metrics=METRICS)
PUBLISHED_TASK = AlpacaEvalTask(name="alpaca_eval_lc", metrics=(*METRICS, "length_controlled_win_rate"), published=True)
