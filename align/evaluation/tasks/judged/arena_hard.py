"""Arena-Hard's scores from its model_judgment file, with control of style if both models' answers are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.evaluation.pairs.answers import ModelAnswer
from align.evaluation.pairs.arena_hard import (
    CONTROLS,
    RULES,
    StyleControl,
    arena_hard_score,
    score_value,
    style_control,
    style_counts,
)
from align.evaluation.pairs.table import JudgedPair, bounds, pairs_of
from align.evaluation.pairs.win_rates import pair_counts, position_bias
from align.evaluation.statistics import Score
from align.evaluation.task import TaskInputs, TaskResult
from align.evaluation.tasks.judged.table_task import TableTask, responses_known
from align.registry import LazyModule

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")  # a recipe's tasks are validated without it

STYLE_RULE = "v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaHardTask(TableTask):
    """Arena-Hard's metrics of one model; the prompts of each category are scored by themselves."""

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Score the pairs. A metric of one of several categories is called `CATEGORY/METRIC`."""
        games, answers = self.read(inputs)
        by_category: dict[str, list[JudgedPair]] = {}
        for pair in pairs_of(games):
            by_category.setdefault(pair.games[0].category, []).append(pair)
        found = {name: _scored(pairs, answers) for name, pairs in by_category.items()}
        if empty := [name for name, (scores, _) in found.items() if f"score.{STYLE_RULE}" not in scores]:
            raise InputError(f"{self.name}: no prompt {f'of {empty[0]} ' * bool(empty[0])}has two readable verdicts")
        is_one = len(found) == 1
        scores = {
            metric if is_one else f"{name}/{metric}": score
            for name, (of_category, _) in found.items()
            for metric, score in of_category.items()
        }
        counts = {name: each for name, (_, each) in found.items()}
        return TaskResult(
            scores=scores,
            verdicts=[game.to_json() for game in games],
            counts=next(iter(counts.values())) if is_one else counts,
        )


def _scored(
    pairs: Sequence[JudgedPair], answers: Sequence[dict[str, ModelAnswer]]
) -> tuple[dict[str, Score], dict[str, Any]]:
    """Return the scores of a category, and what they rest on. Raises `InputError` for two baselines."""
    if len(baselines := {pair.games[0].baseline for pair in pairs}) > 1:
        raise InputError(f"arena_hard: a category has one baseline, not {', '.join(sorted(baselines))}")
    scores = {f"score.{rule}": found for rule in RULES if (found := arena_hard_score(pairs, rule)) is not None}
    styles = dict[str, StyleControl]()
    unit = None
    if f"score.{STYLE_RULE}" in scores and responses_known([game for pair in pairs for game in pair.games]):
        lengths = _token_lengths(pairs, answers)
        unit = "characters" if lengths is None else "tokens"
        styles = {name: style_control(pairs, STYLE_RULE, name, lengths=lengths) for name in CONTROLS}
    bias = position_bias(pairs)
    counts = {
        **pair_counts(pairs),
        "bounds": {f"score.{rule}": bounds(pairs, partial(score_value, rule=rule)) for rule in RULES},
        "position_bias": None if bias is None else bias._asdict(),
        "style_length_in": unit,
        "style_coefficients": style_counts(styles),
    }
    return {**scores, **{f"score.{name}.{STYLE_RULE}": each.score for name, each in styles.items()}}, counts


def _token_lengths(pairs: Sequence[JudgedPair], answers: Sequence[dict[str, ModelAnswer]]) -> np.ndarray | None:
    """Return the numbers of tokens that the files of answers hold, shape [N pairs, 2]; None if one is missing."""
    if not answers:
        return None
    tokens = [[each[pair.games[0].id].num_tokens for each in answers] for pair in pairs]
    return None if any(None in both for both in tokens) else np.array(tokens, dtype=np.float64)


TASK = ArenaHardTask(
    name="arena_hard",
    metrics=(*(f"score.{rule}" for rule in RULES), *(f"score.{name}.{STYLE_RULE}" for name in CONTROLS)),
)
