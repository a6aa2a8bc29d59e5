"""The preference objective: a preference loss plus a weighted SFT term on the best response; or a loss on labels.

Shape legend: B groups of the micro-batch, K responses of the largest group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from align.errors import InputError
from align.losses.preference import PreferenceLoss, pair_weights
from align.losses.table import CustomLoss, Loss, preference_loss
from align.losses.unpaired import UnpairedLoss
from align.models.tree.batch import TokenBatch
from align.train.indexed_groups import GroupView
from align.train.objectives.base import ObjectiveOutput, Tally
from align.train.objectives.batch import GroupBatch, pad_groups, response_logps, sequence_logps, weighted_logps
from align.train.objectives.settings import NO_SFT_TERM, PreferenceSettings
from align.train.objectives.unpaired import unpaired_output

LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class PreferenceObjective:
    """Preference loss plus `sft_weight` times the negative log-likelihood of the best response, averaged over groups.

    The loss is built from the settings, unless `loss` is given: a `PreferenceLoss`, an `UnpairedLoss`, which has no SFT
    term, or a function of (policy_logps_BK, reference_logps_BK, rewards_BK, lengths_BK, mask_BK) that returns the loss
    of each group.
    """

    output_shape = ()

    def __init__(self, settings: PreferenceSettings, loss: Loss | LossFunction | None = None) -> None:
        self.settings = settings
        if loss is None:
            self.loss = preference_loss(settings.name, **settings.settings)
            self._key = settings.model_dump()
        else:
            self.loss = loss if isinstance(loss, Loss) else CustomLoss(loss)
            self._key = {**settings.model_dump(), **_key_of(self.loss)}
        if isinstance(self.loss, UnpairedLoss) and settings.sft_weight:
            raise InputError(NO_SFT_TERM, ("sft_weight",))
        self.name = str(self._key["name"])
        self.needs_reference = self.loss.uses_reference

    def cache_key(self) -> object:
        """Return the settings; a function given as the loss counts by its qualified name."""
        return self._key

    def denominator(self, groups: GroupView) -> float:
        """Return the number of groups."""
        return float(len(groups))

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> ObjectiveOutput:
        """Return preference loss and SFT term, summed over groups.

        Metrics of the best and the worst response are means over groups whose responses differ in rank. As in
        `best_and_worst`, the first of equals is the best and the last of equals the worst.
        """
        if isinstance(self.loss, UnpairedLoss):
            return unpaired_output(self.loss, response_logps(policy, batch), batch)
        rewards_BK = self._rewards(batch)
        given = (batch.reference_BK, rewards_BK, batch.lengths_BK, batch.mask_BK)
        log_weights_BK: Tensor | None = None
        if isinstance(self.loss, PreferenceLoss) and self.loss.uses_weights:
            logps_BK, log_weights_BK = weighted_logps(policy, batch)
            preference_B = self.loss(logps_BK, *given, log_weights_BK=log_weights_BK)
        else:
            logps_BK = response_logps(policy, batch)
            preference_B = self.loss(logps_BK, *given)
        self._check_shape(preference_B, batch)
        best_B = first_argmax(rewards_BK.masked_fill(~batch.mask_BK, -torch.inf))
        worst_B = last_argmin(rewards_BK.masked_fill(~batch.mask_BK, torch.inf))
        nll_B = -select(logps_BK, best_B)
        sft_B = nll_B / select(batch.lengths_BK, best_B) if self.settings.sft_per_token else nll_B
        loss = preference_B.sum()
        if self.settings.sft_weight:
            loss = loss + self.settings.sft_weight * sft_B.sum()
        num_groups = loss.new_tensor(len(batch.sizes))
        tallies = {
            "loss/preference": Tally(preference_B.detach().sum(), num_groups),
            "loss/sft": Tally(sft_B.detach().sum(), num_groups),
        }
        implicit_BK = self.loss.implicit_rewards(logps_BK.detach(), batch.reference_BK, batch.lengths_BK, batch.mask_BK)
        metrics_B = _pair_metrics(implicit_BK, logps_BK.detach(), log_weights_BK, best_B, worst_B)
        is_pair_B = select(rewards_BK, best_B) > select(rewards_BK, worst_B)
        for name, value_B in metrics_B.items():
            tallies[name] = Tally(torch.where(is_pair_B, value_B, 0).sum(), is_pair_B.sum())
        return ObjectiveOutput(loss, tallies, logps_BK.detach())

    def outputs(self, policy: nn.Module, tokens: TokenBatch) -> Tensor:
        """Return the log-probability of each response, shape [S]."""
        return sequence_logps(policy, tokens)

    def group_losses(self, outputs_S: Tensor, batch: GroupBatch) -> Tensor:
        """Return the preference loss of each group without the SFT term and without WPO's weights, shape [B]."""
        given = (
            pad_groups(outputs_S, batch),
            batch.reference_BK,
            self._rewards(batch),
            batch.lengths_BK,
            batch.mask_BK,
        )
        losses_B = self.loss(*given, kl=batch.kl) if isinstance(self.loss, UnpairedLoss) else self.loss(*given)
        self._check_shape(losses_B, batch)
        return losses_B

    def _check_shape(self, losses_B: object, batch: GroupBatch) -> None:
        """Raise `InputError` unless there is one loss for each group; a user's own function may return others."""
        if not isinstance(losses_B, Tensor):
            raise InputError(
                f"preference loss {self.name!r} returned {type(losses_B).__name__} for {len(batch.sizes)} groups; "
                "it must return a tensor with one value per group"
            )
        if losses_B.shape != (len(batch.sizes),):
            raise InputError(
                f"preference loss {self.name!r} returned shape {list(losses_B.shape)} for {len(batch.sizes)} groups; "
                "it must return one value per group"
            )

    def _rewards(self, batch: GroupBatch) -> Tensor:
        """Return the rewards, or for a loss that uses only their order one with the chosen response first, [B, K]."""
        uses_rewards = isinstance(self.loss, UnpairedLoss) or self.loss.uses_rewards
        return batch.rewards_BK if uses_rewards else batch.labels_BK


def _pair_metrics(
    implicit_BK: Tensor, logps_BK: Tensor, log_weights_BK: Tensor | None, best_B: Tensor, worst_B: Tensor
) -> dict[str, Tensor]:
    """Return the metrics of the best and the worst response of each group, shape [B], without gradient."""
    margins_B = select(implicit_BK, best_B) - select(implicit_BK, worst_B)
    metrics_B = {
        "rewards/chosen": select(implicit_BK, best_B),
        "rewards/rejected": select(implicit_BK, worst_B),
        "logps/chosen": select(logps_BK, best_B),
        "logps/rejected": select(logps_BK, worst_B),
        "rewards/margins": margins_B,
        "rewards/accuracies": (margins_B > 0).double(),
    }
    if log_weights_BK is not None:
        extremes_B2 = torch.stack([select(log_weights_BK, best_B), select(log_weights_BK, worst_B)], dim=1)
        metrics_B["weights"] = pair_weights(extremes_B2, torch.ones_like(extremes_B2, dtype=torch.bool))
    return metrics_B


def _key_of(loss: Loss) -> dict[str, object]:
    """Return plain values that identify a loss object."""
    if isinstance(loss, CustomLoss):
        return {"name": loss.path or _qualified_name(loss.function), "settings": dict(loss.given)}
    settings = {name: getattr(loss, name) for name in loss.settings}
    if isinstance(loss, UnpairedLoss):
        return {"name": "kto" if loss.uses_kl else "apo_zero_unpaired", "settings": settings}
    return {"name": _qualified_name(loss.distance.function), "settings": settings}


def _qualified_name(function: Callable[..., object]) -> str:
    """Return module and name of a function; for a `functools.partial`, with its arguments."""
    if isinstance(function, partial):
        given = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{_qualified_name(function.func)}({', '.join(given)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def first_argmax(values_BK: Tensor) -> Tensor:
    """Return the index of the largest value of each group, the first among equals, shape [B]."""
    num_values = values_BK.shape[1]
    index_BK = torch.arange(num_values, device=values_BK.device).expand(values_BK.shape)
    return index_BK.masked_fill(values_BK < values_BK.amax(dim=1, keepdim=True), num_values).amin(dim=1)


def last_argmin(values_BK: Tensor) -> Tensor:
    """Return the index of the smallest value of each group, the last among equals, shape [B]."""
    return values_BK.shape[1] - 1 - first_argmax(-values_BK.flip(1))


def select(values_BK: Tensor, index_B: Tensor) -> Tensor:
    """Return the value of one response of each group, shape [B]."""
    return values_BK.gather(1, index_B[:, None])[:, 0]
