"""What a micro-batch is worth: `objective(policy, batch) -> Step(loss sum, tallies)` for sft and preference.

Shape legend: B groups of the micro-batch, K responses of the largest, S sequences, N targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from align.data.token_groups import TokenGroup, TokenSequence
from align.errors import InputError
from align.losses.table import preference_loss
from align.models.tree.batch import TokenBatch
from align.train.settings import PreferenceSettings


@dataclass(frozen=True, slots=True)
class Tally:
    """A mean that can still be added up over micro-batches and ranks."""

    total: Tensor
    count: Tensor

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.total + other.total, self.count + other.count)


@dataclass(frozen=True, slots=True)
class Step:
    """A micro-batch's share of an optimizer step; the loop divides `loss` by the whole step's denominator."""

    loss: Tensor  # a sum
    tallies: Mapping[str, Tally]
    logps_BK: Tensor | None = None  # of the responses, where they have references: before any update the two agree


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """Groups as an objective sees them: a model input, and what is known of each response."""

    tokens: TokenBatch
    sizes: tuple[int, ...]  # responses of each group; their sequences follow each other
    attributes: tuple[Mapping[str, float], ...]  # of each response, in the order of the sequences
    rewards_BK: Tensor  # fp64; 0 where nothing is known
    labels_BK: Tensor  # fp64: the rewards with a labelled response, where there is one, put above all others
    reference_BK: Tensor  # fp64 sums; 0 where there is no reference
    lengths_BK: Tensor  # fp64, response tokens
    mask_BK: Tensor  # which of the K are there

    def to(self, device: torch.device) -> GroupBatch:
        """The same batch with its tensors on `device`."""
        names = ("rewards_BK", "labels_BK", "reference_BK", "lengths_BK", "mask_BK")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, tokens=self.tokens.to(device), **moved)


class Objective(Protocol):
    """What is optimized."""

    needs_reference: bool

    def cache_key(self) -> object:
        """What decides its numbers: a checkpoint belongs to one identity."""
        ...

    def denominator(self, groups: Sequence[TokenGroup]) -> float:
        """What a step's loss sum over `groups` is divided by."""
        ...

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> Step:
        """Loss sum and tallies of one micro-batch."""
        ...


def group_batch(
    groups: Sequence[TokenGroup],
    references: Sequence[Sequence[float]] | None,
    make: Callable[[Sequence[TokenSequence]], TokenBatch],
) -> GroupBatch:
    """The groups side by side, short ones masked to the K of the largest."""
    widest = max(len(group.sequences) for group in groups)
    empty = torch.zeros(len(groups), widest, dtype=torch.float64)
    rewards_BK, labels_BK, reference_BK, lengths_BK = (empty.clone() for _ in range(4))
    mask_BK = torch.zeros(len(groups), widest, dtype=torch.bool)
    for row, group in enumerate(groups):
        size = len(group.sequences)
        mask_BK[row, :size] = True
        lengths_BK[row, :size] = torch.tensor(group.response_lengths, dtype=torch.float64)
        if group.rewards is not None:
            rewards_BK[row, :size] = torch.tensor(group.rewards, dtype=torch.float64)
        labels_BK[row, :size] = torch.tensor(label_order(group), dtype=torch.float64)
        if references is not None:
            reference_BK[row, :size] = torch.tensor(references[row], dtype=torch.float64)
    return GroupBatch(
        tokens=make([sequence for group in groups for sequence in group.sequences]),
        sizes=tuple(len(group.sequences) for group in groups),
        attributes=tuple(known for group in groups for known in group.attributes),
        rewards_BK=rewards_BK,
        labels_BK=labels_BK,
        reference_BK=reference_BK,
        lengths_BK=lengths_BK,
        mask_BK=mask_BK,
    )


def label_order(group: TokenGroup) -> list[float]:
    """The rewards, of which the largest is 0, with a labelled response, where there is one, put above all others."""
    rewards = group.rewards or (0.0,) * len(group.sequences)
    order = [reward - max(rewards) for reward in rewards]
    if group.chosen is not None:
        order[group.chosen] = 1.0
    return order


def by_group(values_S: Tensor, batch: GroupBatch) -> Tensor:
    """A value of each sequence by group, 0 where a group is smaller, shape [B, K]."""
    rows = [nn.functional.pad(each, (0, batch.mask_BK.shape[1] - len(each))) for each in values_S.split(batch.sizes)]
    return torch.stack(rows)


def response_logps(policy: nn.Module, batch: GroupBatch) -> Tensor:
    """Summed log-probability of each response in nats, fp64, shape [B, K]."""
    return by_group(batch.tokens.sum_by_sequence(policy(batch.tokens)), batch)


class SupervisedObjective:
    """Next-token loss: the sum over supervised tokens, divided by their number in the whole step."""

    needs_reference = False

    def cache_key(self) -> object:
        """Its name: it has no settings."""
        return "supervised"

    def denominator(self, groups: Sequence[TokenGroup]) -> float:
        """Supervised tokens of the step."""
        return float(sum(sum(group.response_lengths) for group in groups))

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> Step:
        """Negative log-likelihood, summed over tokens."""
        loss = -response_logps(policy, batch).sum()
        return Step(loss, {"nll": Tally(loss.detach(), batch.lengths_BK.sum())})


class PreferenceObjective:
    """Preference loss plus `sft_weight` times the negative log-likelihood of the best response, a sum over groups."""

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings
        self.loss = preference_loss(settings.name, **settings.settings)
        self.needs_reference = self.loss.uses_reference

    def cache_key(self) -> object:
        """Its settings."""
        return self.settings.model_dump()

    def denominator(self, groups: Sequence[TokenGroup]) -> float:
        """Groups of the step."""
        return float(len(groups))

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> Step:
        """Preference loss and supervised term, summed over the groups."""
        logps_BK = response_logps(policy, batch)
        # Where only the order of the rewards matters, a labelled response comes first in it.
        rewards_BK = batch.rewards_BK if self.loss.uses_rewards else batch.labels_BK
        preference_B = self.loss(logps_BK, batch.reference_BK, rewards_BK, batch.lengths_BK, batch.mask_BK)
        if preference_B.shape != (len(batch.sizes),):
            raise InputError(
                f"preference loss {self.settings.name!r} returned shape {list(preference_B.shape)} for "
                f"{len(batch.sizes)} groups; one value a group is needed"
            )
        best_B = first_largest(rewards_BK.masked_fill(~batch.mask_BK, -torch.inf))
        worst_B = first_largest((-rewards_BK).masked_fill(~batch.mask_BK, -torch.inf))
        nll_B = -pick(logps_BK, best_B)
        length_B = pick(batch.lengths_BK, best_B)
        supervised_B = nll_B / length_B if self.settings.sft_per_token else nll_B
        loss = preference_B.sum()
        if self.settings.sft_weight:
            loss = loss + self.settings.sft_weight * supervised_B.sum()
        implicit_BK = self.loss.implicit_rewards(logps_BK.detach(), batch.reference_BK, batch.lengths_BK, batch.mask_BK)
        values_B = {
            "loss/preference": preference_B,
            "loss/sft": supervised_B,
            "rewards/chosen": pick(implicit_BK, best_B),
            "rewards/rejected": pick(implicit_BK, worst_B),
            "logps/chosen": pick(logps_BK, best_B),
            "logps/rejected": pick(logps_BK, worst_B),
        }
        values_B["rewards/margins"] = values_B["rewards/chosen"] - values_B["rewards/rejected"]
        values_B["rewards/accuracies"] = (values_B["rewards/margins"] > 0).double()
        num_groups = loss.new_tensor(len(batch.sizes))
        tallies = {name: Tally(value_B.detach().sum(), num_groups) for name, value_B in values_B.items()}
        return Step(loss, tallies, logps_BK.detach())


def first_largest(values_BK: Tensor) -> Tensor:
    """Index of the largest value of each group, the first of equals, shape [B]."""
    num_parameters = values_BK.shape[1]
    at_BK = torch.arange(num_parameters, device=values_BK.device).expand(values_BK.shape)
    return at_BK.masked_fill(values_BK < values_BK.amax(dim=1, keepdim=True), num_parameters).amin(dim=1)


def pick(values_BK: Tensor, index_B: Tensor) -> Tensor:
    """One value of each group, shape [B]."""
    return values_BK.gather(1, index_B[:, None])[:, 0]
