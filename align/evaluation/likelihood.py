"""What a policy's own probabilities say of held-out rows: their likelihood, and which response it thinks likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from align.config import InputError
from align.data.batching import plan_step
from align.data.chat import TokenGroup
from align.evaluation.scores import Score, score
from align.models.policy import Policy
from align.models.probe import choose_forward
from align.models.tree import count_tokens, plain_batch, tree_batch


class Likelihood(NamedTuple):
    """Of one response."""

    logp: float  # nats, summed over its tokens
    length: int  # tokens


@torch.no_grad()
def likelihoods(
    policy: Policy, groups: Sequence[TokenGroup], *, token_budget: int = 4096
) -> list[tuple[Likelihood, ...]]:
    """Log-probability and length of each group's responses, which share their prompt."""
    sequences = [group.sequences for group in groups]
    is_tree = choose_forward(policy, sequences, "auto").name == "tree"
    make = tree_batch if is_tree else plain_batch
    sizes = [count_tokens(each) if is_tree else sum(len(one.ids) for one in each) for each in sequences]
    found: dict[int, tuple[Likelihood, ...]] = {}
    for micro in plan_step(range(len(groups)), sizes, token_budget=token_budget).ranks[0]:
        batch = make([one for index in micro for one in sequences[index]]).to(policy.device)
        totals = batch.sums(policy(batch)).split([len(sequences[index]) for index in micro])
        for index, logps_K in zip(micro, totals, strict=True):
            pairs = zip(logps_K.tolist(), groups[index].lengths, strict=True)
            found[index] = tuple(Likelihood(logp, length) for logp, length in pairs)
    return [found[index] for index in range(len(groups))]


def negative_log_likelihood(policy: Policy, groups: Sequence[TokenGroup]) -> dict[str, Score]:
    """Nats a supervised token, over all responses."""
    of_groups = likelihoods(policy, groups)
    totals = [-sum(one.logp for one in each) for each in of_groups]
    return {"nll": score(totals, [sum(one.length for one in each) for each in of_groups])}


def preference_accuracy(policy: Policy, groups: Sequence[TokenGroup]) -> dict[str, Score]:
    """How often the preferred of two responses is the likelier one: by the sum over its tokens, and by their mean.

    Every two responses of a group whose rewards differ count, or the preferred one against each other one where the
    rows name it without rewards.
    """
    summed: list[float] = []
    averaged: list[float] = []
    counts: list[int] = []
    for group, each in zip(groups, likelihoods(policy, groups), strict=True):
        pairs = _ordered(group)
        if pairs:
            counts.append(len(pairs))
            summed.append(sum(each[best].logp > each[worst].logp for best, worst in pairs))
            means = [one.logp / one.length for one in each]
            averaged.append(sum(means[best] > means[worst] for best, worst in pairs))
    if not counts:
        raise InputError("preference accuracy: no row says which of two responses is the better one")
    return {"accuracy_summed": score(summed, counts), "accuracy_per_token": score(averaged, counts)}


def _ordered(group: TokenGroup) -> list[tuple[int, int]]:
    """(better, worse) of every two responses that are known to differ; a label counts before the rewards."""
    size = range(len(group.sequences))
    if group.chosen is not None:
        return [(group.chosen, other) for other in size if other != group.chosen]
    rewards = group.rewards or [0.0 for _ in size]
    return [(best, worst) for best in size for worst in size if rewards[best] > rewards[worst]]


LIKELIHOODS = {"nll": negative_log_likelihood, "preference": preference_accuracy}
