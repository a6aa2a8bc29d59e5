"""Groups of responses as tensors, and their log-probabilities under a policy.

Shape legend: B groups of the micro-batch, K responses of the largest group, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from align.data.token_groups import TokenGroup, TokenSequence
from align.models.tree.batch import TokenBatch, count_rows


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """Groups as an objective sees them: the model input, and rewards and references of each response.

    Groups with fewer than K responses are padded; `mask_BK` is False there and the other values are 0.
    """

    tokens: TokenBatch
    sizes: tuple[int, ...]  # number of responses of each group
    attributes: tuple[Mapping[str, float], ...]  # of each sequence
    rewards_BK: Tensor  # fp64; 0 for a group without rewards
    labels_BK: Tensor  # fp64; their order is that of `preference_order`
    reference_BK: Tensor  # fp64, in nats, summed over tokens; 0 without references
    lengths_BK: Tensor  # fp64, trained tokens
    mask_BK: Tensor  # bool
    count_T: Tensor  # fp64, the number of groups that each row of the flattened model input counts for
    kl: Tensor  # fp64 scalar: estimate of KL(policy || reference) of the whole step in nats; 0 if not estimated
    teacher_NC: Tensor | None = None  # a teacher's log-probabilities of `tokens.tokens_NK`, and of all other tokens
    reference_N: Tensor | None = None  # a reference's log-probability of each trained token

    def to(self, device: torch.device) -> GroupBatch:
        """Return the batch with its tensors on `device`."""
        names = ("rewards_BK", "labels_BK", "reference_BK", "lengths_BK", "mask_BK", "count_T", "kl")
        moved = {name: getattr(self, name).to(device) for name in names}
        given = {"teacher_NC": self.teacher_NC, "reference_N": self.reference_N}
        moved |= {name: value.to(device) for name, value in given.items() if value is not None}
        return replace(self, tokens=self.tokens.to(device), **moved)


def group_batch(
    groups: Sequence[TokenGroup],
    references: Sequence[Sequence[float]] | None,
    collate: Callable[[Sequence[TokenSequence]], TokenBatch],
) -> GroupBatch:
    """Return the groups as one batch.

    `references` holds the reference log-probability of each response of each group; `collate` is `tree_batch` or
    `plain_batch`.
    """
    groups = tuple(groups)  # a view decodes a group each time it is read
    num_responses = max(len(group.sequences) for group in groups)
    zeros_BK = torch.zeros(len(groups), num_responses, dtype=torch.float64)
    rewards_BK, labels_BK, reference_BK, lengths_BK = (zeros_BK.clone() for _ in range(4))
    mask_BK = torch.zeros(len(groups), num_responses, dtype=torch.bool)
    for row, group in enumerate(groups):
        size = len(group.sequences)
        mask_BK[row, :size] = True
        lengths_BK[row, :size] = torch.tensor(group.response_lengths, dtype=torch.float64)
        if group.rewards is not None:
            rewards_BK[row, :size] = torch.tensor(group.rewards, dtype=torch.float64)
        labels_BK[row, :size] = torch.tensor(preference_order(group), dtype=torch.float64)
        if references is not None:
            reference_BK[row, :size] = torch.tensor(references[row], dtype=torch.float64)
    sequences = [sequence for group in groups for sequence in group.sequences]
    tokens = collate(sequences)
    sizes = tuple(len(group.sequences) for group in groups)
    return GroupBatch(
        tokens=tokens,
        sizes=sizes,
        attributes=tuple(labels for group in groups for labels in group.attributes),
        rewards_BK=rewards_BK,
        labels_BK=labels_BK,
        reference_BK=reference_BK,
        lengths_BK=lengths_BK,
        mask_BK=mask_BK,
        count_T=count_rows(tokens, sequences, sizes),
        kl=torch.zeros((), dtype=torch.float64),
    )


def preference_order(group: TokenGroup) -> list[float]:
    """Return values that order the responses: 1 for the chosen one, for others the reward less the largest reward."""
    rewards = group.rewards or (0.0,) * len(group.sequences)
    order = [reward - max(rewards) for reward in rewards]
    if group.chosen is not None:
        order[group.chosen] = 1.0
    return order


def pad_groups(values_S: Tensor, batch: GroupBatch) -> Tensor:
    """Return a value of each sequence by group, padded with 0, shape [B, K]."""
    num_responses = batch.mask_BK.shape[1]
    rows = [nn.functional.pad(row, (0, num_responses - len(row))) for row in values_S.split(batch.sizes)]
    return torch.stack(rows)


def weighted_logps(policy: nn.Module, batch: GroupBatch) -> tuple[Tensor, Tensor]:
    """Return `response_logps`, and the `log_weights_BK` of a `PreferenceLoss` with `weighting: wpo`; shapes [B, K]."""
    logps_N, collision_N = policy(batch.tokens, collisions=True)
    logps_BK = pad_groups(batch.tokens.sum_by_sequence(logps_N), batch)
    aligned_BK = pad_groups(batch.tokens.sum_by_sequence(logps_N.detach() - collision_N), batch)
    return logps_BK, aligned_BK / batch.lengths_BK.clamp(min=1)


def sequence_logps(policy: nn.Module, tokens: TokenBatch) -> Tensor:
    """Return the log-probability of each sequence in nats, summed over its trained tokens, in fp64, shape [S]."""
    return tokens.sum_by_sequence(policy(tokens))


def response_logps(policy: nn.Module, batch: GroupBatch) -> Tensor:
    """Return the log-probability of each response in nats, summed over its tokens, in fp64, shape [B, K]."""
    return pad_groups(sequence_logps(policy, batch.tokens), batch)
