"""Scores and hidden states of the responses of groups, in micro-batches of a token budget.

Shape legend: K responses of a group, A attributes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from align.data.batching import plan_step
from align.data.token_groups import TokenGroup
from align.models.reward_model import RewardModel
from align.models.tree.batch import TokenBatch, count_tokens, plain_batch, tree_batch


def score_groups(
    model: RewardModel,
    groups: Sequence[TokenGroup],
    *,
    token_budget: int = 4096,
    observe: Callable[[TokenBatch], None] | None = None,
) -> list[Tensor]:
    """Return the attribute scores of the responses of each group, [K, A] in fp32 on the CPU.

    `observe` is given each micro-batch.
    """

    def run(batch: TokenBatch) -> Tensor:
        if observe is not None:
            observe(batch)
        return model(batch)

    return _run_groups(groups, model, run, token_budget)


def last_hidden_states(model: RewardModel, groups: Sequence[TokenGroup], *, token_budget: int = 4096) -> list[Tensor]:
    """Return the inputs of the head for the responses of each group, [K, D] in fp32 on the CPU."""
    captured: list[Tensor] = []

    def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured[:] = inputs

    def run(batch: TokenBatch) -> Tensor:
        model(batch)
        return captured[0]

    with model.whole_trees(), model.head.register_forward_pre_hook(capture):
        return _run_groups(groups, model, run, token_budget)


@torch.no_grad()
def _run_groups(
    groups: Sequence[TokenGroup], model: RewardModel, run: Callable[[TokenBatch], Tensor], token_budget: int
) -> list[Tensor]:
    """Return the rows of `run` for each group, computed in the forward that the model is set to."""
    sequences = [group.sequences for group in groups]
    sizes = [count_tokens(each) if model.is_tree else sum(len(one.ids) for one in each) for each in sequences]
    make = tree_batch if model.is_tree else plain_batch
    results: dict[int, Tensor] = {}
    for micro in plan_step(range(len(groups)), sizes, token_budget=token_budget).ranks[0]:
        batch = make([one for index in micro for one in sequences[index]]).to(model.device)
        rows = run(batch).float().cpu().split([len(sequences[index]) for index in micro])
        results |= dict(zip(micro, rows, strict=True))
    return [results[index] for index in range(len(groups))]
