"""Train a tiny policy with a preference loss and measure what changes on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from align.data.chat_encoder import ChatEncoder
from align.data.token_groups import TokenGroup
from align.models.policy import Policy, response_logps
from align.models.tree.batch import tree_batch
from align.records import Comparison
from align.testing.tiny import tiny_policy, tiny_preferences
from align.train.objectives.batch import GroupBatch, group_batch

NUM_STEPS = 20
LEARNING_RATE = 5e-3
NUM_TRAIN, NUM_HELD_OUT = 24, 12
NUM_RESPONSES = 3


class Measured(NamedTuple):
    """Means over the held-out prompts."""

    loss: float
    gap: float  # nats, log-probability of the best response less that of the worst


class Rows(NamedTuple):
    """Prompts with their responses, and what the loss needs of them."""

    groups: list[TokenGroup]
    batch: GroupBatch


class BeforeAndAfter(NamedTuple):
    """Held-out measurements of the policy before and after training."""

    before: Measured
    after: Measured


def train_tiny_policy(loss: Callable[..., Tensor]) -> BeforeAndAfter:
    """Train `tiny_policy` for 20 AdamW steps on the mean of `loss` over 24 prompts with three responses each.

    The best response is the first of each prompt, so that a loss that ignores the rewards and takes the first one can
    learn as well. The reference is the policy before training.
    """
    policy, tokenizer = tiny_policy()
    policy.use_forward("tree")
    rows = [_best_first(row) for row in tiny_preferences(NUM_TRAIN + NUM_HELD_OUT, num_responses=NUM_RESPONSES)]
    groups = list(ChatEncoder(tokenizer).encode_all(rows))
    train = _with_references(policy, groups[:NUM_TRAIN])
    held_out = _with_references(policy, groups[NUM_TRAIN:])
    before = _measure(policy, loss, held_out)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        _losses(loss, response_logps(policy, train.groups), train).mean().backward()
        optimizer.step()
    return BeforeAndAfter(before, _measure(policy, loss, held_out))


def _best_first(row: Comparison) -> Comparison:
    return replace(row, responses=tuple(sorted(row.responses, key=lambda response: -(response.reward or 0))))


@torch.no_grad()
def _with_references(policy: Policy, groups: list[TokenGroup]) -> Rows:
    """Return the groups with the policy as it is now as the reference."""
    batch = group_batch(groups, None, tree_batch)
    return Rows(groups, replace(batch, reference_BK=response_logps(policy, groups)))


@torch.no_grad()
def _measure(policy: Policy, loss: Callable[..., Tensor], rows: Rows) -> Measured:
    logps_BK = response_logps(policy, rows.groups)
    gap = float((logps_BK[:, 0] - logps_BK[:, -1]).mean())
    return Measured(float(_losses(loss, logps_BK, rows).mean()), gap)


def _losses(loss: Callable[..., Tensor], logps_BK: Tensor, rows: Rows) -> Tensor:
    batch = rows.batch
    return loss(logps_BK, batch.reference_BK, batch.rewards_BK, batch.lengths_BK, batch.mask_BK)
