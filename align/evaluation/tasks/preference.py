"""Preference accuracy: how often the policy finds the better of two responses more likely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from align.evaluation.likelihood_task import LikelihoodTask
from align.evaluation.task import Parts

if TYPE_CHECKING:
    from align.data.token_groups import TokenGroup
    from align.distributed.processes import Processes
    from align.models.policy import Policy


def measure(policy: Policy, groups: Sequence[TokenGroup], *, precision: str, processes: Processes) -> Iterator[Parts]:
    """Yield the number of ordered pairs, by summed and by mean log-probability; no parts for a group without a pair.

    Every two responses of a group whose rewards differ form a pair. Where the row names a preferred response, it forms
    a pair with each other one.
    """
    from align.evaluation.likelihood import likelihoods  # noqa: PLC0415 - imports torch

    measured = likelihoods(policy, groups, precision=precision, processes=processes)
    for group, each in zip(groups, measured, strict=True):
        pairs = ordered_pairs(group)
        summed = sum(each[better].logp > each[worse].logp for better, worse in pairs)
        means = [one.logp / one.length for one in each]
        averaged = sum(means[better] > means[worse] for better, worse in pairs)
        parts: Parts = {"accuracy_summed": (summed, len(pairs)), "accuracy_per_token": (averaged, len(pairs))}
        yield parts if pairs else {}


def ordered_pairs(group: TokenGroup) -> list[tuple[int, int]]:
    """Return (better, worse) indices of the responses known to differ; a label takes precedence over rewards."""
    indices = range(len(group.sequences))
    if group.chosen is not None:
        return [(group.chosen, other) for other in indices if other != group.chosen]
    rewards = group.rewards or [0.0 for _ in indices]
    return [(better, worse) for better in indices for worse in indices if rewards[better] > rewards[worse]]


TASK = LikelihoodTask(name="preference", metrics=("accuracy_summed", "accuracy_per_token"), measure=measure)
