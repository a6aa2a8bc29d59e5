"""Log-probabilities of given responses under a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from align.accounting.flops import Work, sum_work
from align.data.batching import plan_step
from align.data.token_groups import TokenGroup
from align.distributed.processes import Processes
from align.models.policy import Policy
from align.models.probe import choose_forward
from align.models.tree.batch import count_tokens, plain_batch, tree_batch


class Likelihood(NamedTuple):
    """The likelihood of one response."""

    logp: float  # nats, summed over the response's tokens
    length: int  # tokens


ONE_PROCESS = Processes()


@torch.no_grad()
def likelihoods(
    policy: Policy,
    groups: Sequence[TokenGroup],
    *,
    token_budget: int = 4096,
    precision: str = "fp32",
    processes: Processes = ONE_PROCESS,
    works: list[Work] | None = None,
) -> list[tuple[Likelihood, ...]]:
    """Return the likelihood of each response of each group; the responses of a group share their prompt.

    `token_budget` limits the tokens of a micro-batch. `precision` "bf16" runs matrix products in bfloat16. Each process
    computes its share of the micro-batches, which do not depend on the number of processes, and returns all results.
    `works` receives the work of each forward pass of this process.
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
        if works is not None:
            works.append(batch.work())
        totals = batch.sum_by_sequence(logps_N).split([len(sequences[index]) for index in micro])
        for index, logps_K in zip(micro, totals, strict=True):
            pairs = zip(logps_K.tolist(), groups[index].response_lengths, strict=True)
            found[index] = tuple(Likelihood(logp, length) for logp, length in pairs)
    of_all = {index: each for part in processes.all_gather_object(found) for index, each in part.items()}
    return [of_all[index] for index in range(len(groups))]


def forward_work(groups: Sequence[TokenGroup]) -> Work:
    """Return the work of one forward pass over the groups as trees."""
    return sum_work(tree_batch(group.sequences).work() for group in groups)
