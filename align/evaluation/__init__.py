"""How good a policy is: tasks graded by programs, likelihoods of data, wins over another policy."""

from align.evaluation.statistics import Score, score

__all__ = ["Score", "score"]
