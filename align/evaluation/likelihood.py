"""What a policy's own probabilities say of held-out rows: their likelihood, and which response it thinks likelier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from align.data.batching import plan_step
from align.data.token_groups import TokenGroup
from align.distributed.processes import Processes
from align.errors import InputError
from align.evaluation.statistics import Score, score
from align.models.policy import Policy
from align.models.probe import choose_forward
from align.models.tree import count_tokens, plain_batch, tree_batch


class Likelihood(NamedTuple):
    """Of one response."""

    logp: float  # nats, summed over its tokens
    length: int  # tokens


ALONE = Processes()


@torch.no_grad()
def likelihoods(
    policy: Policy,
    groups: Sequence[TokenGroup],
    *,
    token_budget: int = 4096,
    precision: str = "fp32",
    processes: Processes = ALONE,
) -> list[tuple[Likelihood, ...]]:
    """Log-probability and length of each group's responses, which share their prompt; in bf16 matrix products are.

    Processes deal the micro-batches among them, which are the same for any number of processes.
    """
    sequences = [group.sequences for group in groups]
    is_tree = choose_forward(policy, sequences, "auto", precision=precision).name == "tree"
    make = tree_batch if is_tree else plain_batch
    sizes = [count_tokens(each) if is_tree else sum(len(one.ids) for one in each) for each in sequences]
    found: dict[int, tuple[Likelihood, ...]] = {}
    micros = plan_step(range(len(groups)), sizes, token_budget=token_budget).ranks[0]
    for micro in micros[processes.rank :: processes.world_size]:
        batch = make([one for index in micro for one in sequences[index]]).to(policy.device)
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logps_N = policy(batch)
        totals = batch.sums(logps_N).split([len(sequences[index]) for index in micro])
        for index, logps_K in zip(micro, totals, strict=True):
            pairs = zip(logps_K.tolist(), groups[index].lengths, strict=True)
            found[index] = tuple(Likelihood(logp, length) for logp, length in pairs)
    of_all = {index: each for part in processes.all_gather_object(found) for index, each in part.items()}
    return [of_all[index] for index in range(len(groups))]


Parts = dict[str, tuple[float, float]]  # rate -> (sum, of how many), of one prompt


def negative_log_likelihood(
    policy: Policy, groups: Sequence[TokenGroup], *, precision: str = "fp32", processes: Processes = ALONE
) -> Iterator[Parts]:
    """Nats over supervised tokens, of all responses of each group."""
    for each in likelihoods(policy, groups, precision=precision, processes=processes):
        yield {"nll": (-sum(one.logp for one in each), sum(one.length for one in each))}


def preference_accuracy(
    policy: Policy, groups: Sequence[TokenGroup], *, precision: str = "fp32", processes: Processes = ALONE
) -> Iterator[Parts]:
    """How often the preferred of two responses is the likelier one: by the sum over its tokens, and by their mean.

    Every two responses of a group whose rewards differ count, or the preferred one against each other one where the
    rows name it without rewards; a group without such a pair gives no parts.
    """
    told_of = likelihoods(policy, groups, precision=precision, processes=processes)
    for group, each in zip(groups, told_of, strict=True):
        pairs = _ordered(group)
        summed = sum(each[best].logp > each[worst].logp for best, worst in pairs)
        means = [one.logp / one.length for one in each]
        averaged = sum(means[best] > means[worst] for best, worst in pairs)
        told: Parts = {"accuracy_summed": (summed, len(pairs)), "accuracy_per_token": (averaged, len(pairs))}
        yield told if pairs else {}


def rates(parts: Sequence[Parts]) -> dict[str, Score]:
    """Each rate over all groups, with its interval over groups."""
    known = [each for each in parts if each]
    if not known:
        raise InputError("preference accuracy: no row says which of two responses is the better one")
    return {name: score([each[name][0] for each in known], [each[name][1] for each in known]) for name in known[0]}


def _ordered(group: TokenGroup) -> list[tuple[int, int]]:
    """(better, worse) of every two responses that are known to differ; a label counts before the rewards."""
    size = range(len(group.sequences))
    if group.chosen is not None:
        return [(group.chosen, other) for other in size if other != group.chosen]
    rewards = group.rewards or [0.0 for _ in size]
    return [(best, worst) for best in size for worst in size if rewards[best] > rewards[worst]]


NLL = "nll"
LIKELIHOODS = {NLL: negative_log_likelihood, "preference": preference_accuracy}
