"""Evaluation of policies: tasks, likelihoods, win rates, and scores with confidence intervals."""

from align.evaluation.statistics import Score, score

__all__ = ["Score", "score"]
