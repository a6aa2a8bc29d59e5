"""Win rates of a file of judged pairs, by every rule."""

from __future__ import annotations

from dataclasses import dataclass

from align.errors import InputError
from align.evaluation.pairs.table import pairs_of
from align.evaluation.pairs.win_rates import RULES, equal_length, pair_counts, position_bias, win_rate
from align.evaluation.task import TaskInputs, TaskResult
from align.evaluation.tasks.judged.table_task import TableTask, responses_known
from align.evaluation.tasks.judged.win_rate import EQUAL_LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPairsTask(TableTask):
    """The metrics of `win_rate` on verdicts that are already known."""

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Score the pairs; at equal length only if their responses are known."""
        games, _ = self.read(inputs)
        pairs = pairs_of(games)
        scores = {f"win_rate.{rule}": found for rule in RULES if (found := win_rate(pairs, rule)) is not None}
        if not scores:
            raise InputError(f"{self.name}: the judge decides none of {len(pairs)} pairs")
        length = equal_length(pairs) if responses_known(games) else None
        bias = position_bias(pairs)
        return TaskResult(
            scores=scores if length is None else {**scores, EQUAL_LENGTH: length.win_rate},
            verdicts=[game.to_json() for game in games],
            counts={
                **pair_counts(pairs),
                "position_bias": None if bias is None else bias._asdict(),
                "length": None if length is None else length.counts(),
            },
        )


TASK = JudgedPairsTask(name="judged_pairs", metrics=(*(f"win_rate.{rule}" for rule in RULES), EQUAL_LENGTH))
