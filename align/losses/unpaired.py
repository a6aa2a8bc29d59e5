"""Losses on single responses that are desirable or not: KTO, which compares each with a reference point, not a pair.

Shape legend: B prompts, K responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from align.errors import InputError
from align.losses.preference import CHECKS, full_mask
from align.registry import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")  # a recipe's loss is validated without it

LABELS = (0.0, 1.0)  # rewards of an undesirable and of a desirable response
DESIRABLE = 0.5  # rewards above this count as desirable


@dataclass(frozen=True, slots=True)
class UnpairedLoss:
    """A loss on labelled responses and its settings. Call it for the loss of each group, the mean over its responses.

    KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eqs. 7 and 8): with the log-ratio r = log(policy / reference) and the
    reference point z, a desirable response costs desirable_weight * (1 - sigmoid(beta * (r - z))), an undesirable one
    undesirable_weight * (1 - sigmoid(beta * (z - r))). With z = 0 (`uses_kl` is False) it is the unpaired form of
    APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7; `apo_zero_unpaired` in TRL).

    >>> import torch
    >>> from align.losses.table import preference_loss
    >>> kto = preference_loss("kto", beta=1.0)
    >>> logps_BK = torch.zeros(2, 1)
    >>> kto(logps_BK, logps_BK, torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), kl=0.5)
    tensor([0.6225, 0.3775])
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    uses_kl: bool = True  # whether the reference point is an estimate of KL(policy || reference), or 0

    settings: ClassVar[tuple[str, ...]] = ("beta", "desirable_weight", "undesirable_weight")
    uses_rewards: ClassVar[bool] = True  # which are labels: 1 or 0
    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        is_valid, expected = CHECKS["beta"]
        for name in self.settings:
            if not is_valid(getattr(self, name)):
                raise InputError(f"{name} must be {expected}, not {getattr(self, name)!r}")

    def __call__(
        self,
        policy_logps_BK: Tensor,
        reference_logps_BK: Tensor,
        rewards_BK: Tensor,
        lengths_BK: Tensor,
        mask_BK: Tensor | None = None,
        *,
        kl: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of each group, shape [B].

        The arguments are those of a `PreferenceLoss`; rewards are 1 for desirable and 0 for undesirable responses. `kl`
        is the reference point in nats, a scalar without gradient: max(0, the mean log-ratio of other prompts' responses
        to these prompts). Raises `InputError` if the loss uses it and it is missing.
        """
        if self.uses_kl and kl is None:
            raise InputError("this loss needs kl, the reference point; apo_zero_unpaired is the loss without it")
        mask_BK = full_mask(policy_logps_BK) if mask_BK is None else mask_BK.bool()
        point = kl if self.uses_kl and kl is not None else 0.0
        gain_BK = self.implicit_rewards(policy_logps_BK, reference_logps_BK, lengths_BK, mask_BK) - self.beta * point
        is_desirable_BK = rewards_BK > DESIRABLE
        # 1 - sigmoid(x) = sigmoid(-x)
        desirable_BK = self.desirable_weight * (-gain_BK).sigmoid()
        undesirable_BK = self.undesirable_weight * gain_BK.sigmoid()
        loss_BK = torch.where(mask_BK, torch.where(is_desirable_BK, desirable_BK, undesirable_BK), 0)
        return loss_BK.sum(dim=-1) / mask_BK.sum(dim=-1).clamp(min=1)

    def implicit_rewards(
        self, policy_logps_BK: Tensor, reference_logps_BK: Tensor, lengths_BK: Tensor, mask_BK: Tensor | None = None
    ) -> Tensor:
        """Return beta * (policy - reference) of each response, shape [B, K]; 0 where the mask is False."""
        mask_BK = full_mask(policy_logps_BK) if mask_BK is None else mask_BK.bool()
        return self.beta * torch.where(mask_BK, policy_logps_BK - reference_logps_BK, 0)


def lack_of_labels(rewards: Sequence[float] | None, loss: str) -> str | None:
    """Return why the responses of a row are not labelled for the loss of this name; None if they are."""
    if rewards is None:
        return (
            f"the row has no labels, and {loss} needs one for each response, such as a reward of 1 or 0; "
            "rpo_bwd_kl and dpo are losses on rewards and on pairs"
        )
    unknown = next((reward for reward in rewards if reward not in LABELS), None)
    if unknown is not None:
        return (
            f"a reward is {unknown:g}, and {loss} needs labels: 1 for a desirable response, 0 for an undesirable one; "
            "rpo_bwd_kl and dpo are losses on rewards and on pairs"
        )
    return None
