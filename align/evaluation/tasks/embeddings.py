"""Tasks about embeddings of sentence pairs: Spearman correlation with rated similarity, alignment and uniformity.

Shape legend: N pairs, M distinct sentences, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from align.errors import InputError
from align.evaluation.statistics import Score, bootstrap_interval, score
from align.evaluation.task import ROW_OPTIONS, EstimateInputs, Row, Task, TaskInputs, TaskResult, TaskSize
from align.records import Message, Prompt
from align.registry import LazyModule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Scores = NDArray[np.float64]
else:
    np = LazyModule("numpy")  # a recipe's tasks are validated without it

POSITIVE_ABOVE = 0.8  # of the highest score: pairs that Gao et al. 2021 (SimCSE), fig. 3, take as positive (4 of 5)
MAX_SENTENCES = 4000  # of which uniformity compares all pairs


class Measured(NamedTuple):
    """A score, and what each row adds to it; without `parts` there is no paired change between policies."""

    score: Score
    parts: Mapping[int, float] = {}  # index of a row -> its value, of which the score is the mean


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingTask(Task):
    """A task that embeds the two sentences of each row, and measures the vectors."""

    measure: Callable[[Vectors, Vectors, Scores], Measured]
    columns: tuple[str, ...] = ("sentence1", "sentence2", "score")
    options: frozenset[str] = ROW_OPTIONS | {"data", "policy", "encoder"}
    required: tuple[str, ...] = ("data", "policy")

    def column(self, name: str, metric: str, *, is_only: bool) -> str:
        """Return `name` if it contains the metric, so that the column says what it holds."""
        return name if metric in name else f"{name} {metric}"

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return the number of rows and of their tokens."""
        rows = inputs.rows(self)
        texts = [str(row[name]) for row in rows for name in self.columns[:2]]
        return TaskSize(len(rows), inputs.num_prompt_tokens([Prompt((Message("user", text),)) for text in texts]), 0)

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Embed and measure all rows."""
        rows = inputs.rows(self)
        scores_N = np.array([_score(row, number, self.name) for number, row in enumerate(rows, start=1)])
        texts = [str(row[name]) for name in self.columns[:2] for row in rows]
        inputs.progress.phase(self.name, len(rows))
        vectors = inputs.embed(texts)
        inputs.progress.advance(len(rows))
        first_ND, second_ND = vectors[: len(rows)], vectors[len(rows) :]
        found = self.measure(first_ND, second_ND, scores_N)
        metric = self.metrics[0]
        parts = found.parts
        lines = [
            {
                "row": index,
                "cosine": cosine,
                "score": float(scores_N[index]),
                "parts": {metric: (parts[index], 1)} if index in parts else {},
            }
            for index, cosine in enumerate((first_ND * second_ND).sum(axis=1).tolist())
        ]
        return TaskResult(scores={metric: found.score}, lines=lines)


def spearman(first_ND: Vectors, second_ND: Vectors, scores_N: Scores) -> Measured:
    """Return Spearman's correlation of the cosines of pairs with their scores; ties have their mean rank.

    A row's part is its value in the linear expansion of the correlation of ranks (its influence), so that the mean is
    the correlation, and a paired change has an interval.
    """
    cosine_N = (first_ND * second_ND).sum(axis=1)

    def standard(values_N: NDArray[Any]) -> Scores:
        _, place_N, times = np.unique(values_N, return_inverse=True, return_counts=True)
        ranks_N = (np.cumsum(times) - (times - 1) / 2)[place_N]
        return (ranks_N - ranks_N.mean()) / max(ranks_N.std(), np.finfo(np.float64).tiny)

    def correlation(chosen: NDArray[Any]) -> float:
        return float((standard(cosine_N[chosen]) * standard(scores_N[chosen])).mean())

    one_N, other_N = standard(cosine_N), standard(scores_N)
    if not (one_N.any() and other_N.any()):
        raise InputError("sts: all scores or all similarities are equal, so they have no correlation")
    value = float((one_N * other_N).mean())
    parts_N = one_N * other_N - value * ((one_N**2 + other_N**2) / 2 - 1)
    interval = bootstrap_interval(correlation, len(scores_N))
    return Measured(Score(value, *interval, len(scores_N)), dict(enumerate(parts_N.tolist())))


def alignment(first_ND: Vectors, second_ND: Vectors, scores_N: Scores) -> Measured:
    """Return the mean ‖f(x) − f(x⁺)‖² over positive pairs (Wang and Isola 2020, eq. 1); lower is better.

    Positive are the pairs with a score above 0.8 of the highest one.
    """
    positive: list[int] = np.flatnonzero(scores_N > POSITIVE_ABOVE * scores_N.max()).tolist()
    if not positive:
        raise InputError("alignment: no pair has a score above 0, so none is positive")
    distances: list[float] = np.square(first_ND - second_ND).sum(axis=1)[positive].tolist()
    return Measured(score(distances), dict(zip(positive, distances, strict=True)))


def uniformity(first_ND: Vectors, second_ND: Vectors, _scores_N: Scores) -> Measured:
    """Return log E exp(−2 ‖f(x) − f(y)‖²) over pairs of distinct vectors (Wang and Isola 2020, eq. 2); lower is better.

    Of more than 4,000 vectors the first 4,000. The interval resamples vectors; a vector is not paired with itself.
    """
    every = np.concatenate([first_ND, second_ND])
    _, first_places = np.unique(every, axis=0, return_index=True)
    vectors_MD = every[np.sort(first_places)[:MAX_SENTENCES]].astype(np.float64)
    if len(vectors_MD) < 2:  # noqa: PLR2004 - a pair
        raise InputError("uniformity: all vectors are equal")
    kernel_MM = np.exp(4 * (vectors_MD @ vectors_MD.T) - 4)  # ‖x − y‖² = 2 − 2 x·y for unit vectors
    np.fill_diagonal(kernel_MM, 0)

    def value(chosen: NDArray[Any]) -> float:
        times_M = np.bincount(chosen, minlength=len(kernel_MM)).astype(np.float64)
        pairs = times_M.sum() ** 2 - np.square(times_M).sum()
        return float(np.log(times_M @ kernel_MM @ times_M / pairs)) if pairs else math.nan  # one vector, many times

    size = len(kernel_MM)
    return Measured(Score(value(np.arange(size)), *bootstrap_interval(value, size), size))


def _score(row: Row, number: int, task: str) -> float:
    try:
        return float(row["score"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{task}: row {number} has score {row['score']!r}, which is no number") from error


STS = EmbeddingTask(name="sts", metrics=("spearman",), measure=spearman)
ALIGNMENT = EmbeddingTask(name="alignment", metrics=("alignment",), measure=alignment)
UNIFORMITY = EmbeddingTask(name="uniformity", metrics=("uniformity",), measure=uniformity)
EMBEDDING_TASKS: Sequence[str] = tuple(task.name for task in (STS, ALIGNMENT, UNIFORMITY))
