"""Win rate of a policy's responses over a baseline's, by a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.evaluation.pairs.judging import judged_games
from align.evaluation.pairs.table import JudgedPair, pairs_of
from align.evaluation.pairs.win_rates import RULES, equal_length, pair_counts, position_bias, win_rate
from align.evaluation.task import ROW_OPTIONS, EstimateInputs, Task, TaskInputs, TaskResult, TaskSize
from align.rewards.verdicts import Group, Verdict

EQUAL_LENGTH = "win_rate_equal_length.both_games"


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRateTask(Task):
    """A task whose pairs of responses are compared by a judge."""

    options: frozenset[str] = ROW_OPTIONS | {
        "data",
        "responses",
        "judges",
        "combine",
        "thoughts",
        "out",
        "rows.constraints",
    }
    required: tuple[str, ...] = ("data",)

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return no size: the judge's work is not known."""
        return TaskSize(0, 0, 0)

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Judge each pair of responses."""
        judge = inputs.judge()
        paired = inputs.paired_responses()

        def shared(groups: Sequence[Group]) -> list[tuple[Verdict, ...]]:
            return inputs.split(groups, judge, activity="judging")

        games = judged_games(paired.pairs, shared, name=inputs.judge_name)
        pairs = pairs_of(games)
        length = equal_length(pairs)
        rates = {f"win_rate.{rule}": win_rate(pairs, rule) for rule in RULES}
        bias = position_bias(pairs)
        return TaskResult(
            scores={
                **{name: rate for name, rate in rates.items() if rate is not None},
                EQUAL_LENGTH: length.win_rate,
            },
            lines=[_line(pair) for pair in pairs],
            verdicts=[game.to_json() for game in games],
            counts={
                **pair_counts(pairs),
                "unanswered": paired.unanswered,
                "without_a_rate": [name for name, rate in rates.items() if rate is None],
                "position_bias": None if bias is None else bias._asdict(),
                "length": length.counts(),
            },
        )


def _line(pair: JudgedPair) -> dict[str, Any]:
    """Return a pair as JSON, with what it counts in each metric."""
    parts = {f"win_rate.{rule}": rate for rule, count in RULES.items() if (rate := count(pair.wins))[1]}
    games = [game.to_json() for game in pair.games]
    return {"prompt": pair.games[0].prompt, "games": games, "longer_by": pair.longer_by, "parts": parts}


TASK = WinRateTask(name="win_rate", metrics=(*(f"win_rate.{rule}" for rule in RULES), EQUAL_LENGTH))
