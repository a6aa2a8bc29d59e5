"""The preference loss: a distance between the implicit and the target rewards of K responses to one prompt.

Shape legend: B prompts, K responses, P comparisons, C responses in a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.losses.comparisons import PAIRS, compare, is_informative
from align.losses.distances import Distance, exo, odds_ratio
from align.registry import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")  # a recipe's loss is validated without it


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """A preference loss and its settings. Call it for the loss of each group; it does not reduce over groups.

    Implicit rewards are beta * (policy - reference) log-probabilities, target rewards are eta * rewards. A loss that
    does not use the values of the rewards (`uses_rewards` is False) ignores pairs and groups in which all rewards are
    equal; they cost 0.

    >>> import torch
    >>> from align.losses.table import preference_loss
    >>> dpo = preference_loss("dpo", beta=0.1)
    >>> logps_BK, rewards_BK = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    >>> dpo(logps_BK, logps_BK, rewards_BK, lengths_BK=torch.ones(1, 2))  # log 2
    tensor([0.6931])
    """

    distance: Distance
    beta: float = 0.1  # Rafailov et al. 2023
    eta: float = 1.0  # Adler et al. 2024 (Nemotron-4)
    label_smoothing: float = 0.0  # assumed share of wrong labels
    gamma: float = 0.0  # target margin between the better and the worse response
    pairs: str = "none"  # none: one comparison of all responses; all: the mean over pairs; best_worst: one pair
    per_token: bool = False  # divide log-probabilities by the response length
    reference_free: bool = False  # ignore the reference log-probabilities
    length_penalty: float = 0.0  # added to the implicit reward for each token of the response, against longer ones
    weighting: str = "none"  # wpo: comparisons of responses that the policy would hardly sample count less

    def __post_init__(self) -> None:
        for name, (is_valid, expected) in CHECKS.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise InputError(f"{name} must be {expected}, not {value!r}")
        for field in fields(self)[1:]:
            if field.name not in self.settings and getattr(self, field.name) != field.default:
                known = ", ".join(self.settings)
                raise InputError(f"this loss has no setting {field.name!r}; available: {known}")
        if self.distance.function is exo and self.label_smoothing == 0:
            raise InputError("label_smoothing must be above 0 for exo, whose divergence from a hard label is infinite")
        if self.pairs == "none" and not self.distance.listwise:
            raise InputError("pairs must be 'all' or 'best_worst' for a pairwise loss, not 'none'")

    @property
    def settings(self) -> tuple[str, ...]:
        """Return the names of the settings that change this loss."""
        own = ("eta",) if self.uses_rewards else ("weighting",)
        # orpo takes the odds of a mean log-probability; a sum with the length has no odds
        margin = () if self.distance.function is odds_ratio else ("length_penalty",)
        common = ("beta", "pairs", "per_token", "reference_free", *margin)
        return tuple(dict.fromkeys((*common, *own, *self.distance.settings)))

    @property
    def uses_rewards(self) -> bool:
        """Return whether the values of the rewards matter; otherwise only their order does."""
        return self.distance.uses_rewards

    @property
    def uses_weights(self) -> bool:
        """Return whether a call needs `log_weights_BK`."""
        return self.weighting != "none"

    @property
    def uses_reference(self) -> bool:
        """Return whether the reference log-probabilities matter."""
        return not self.reference_free

    def __call__(
        self,
        policy_logps_BK: Tensor,
        reference_logps_BK: Tensor,
        rewards_BK: Tensor,
        lengths_BK: Tensor,
        mask_BK: Tensor | None = None,
        *,
        log_weights_BK: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each group, shape [B], as the mean over its comparisons.

        Args:
            policy_logps_BK: Log-probability of each response under the policy, in nats, summed over tokens.
            reference_logps_BK: The same under the reference model.
            rewards_BK: Reward of each response; higher is better.
            lengths_BK: Number of tokens of each response.
            mask_BK: False where a group has fewer than K responses; the other tensors are ignored there.
            log_weights_BK: For `weighting: wpo`, the mean over the tokens of each response of
                log p(token) - log sum_v p(v)^2 under the policy. Gradients do not flow through it.

        A group without anything to compare (one response, or for a loss on labels equal rewards) has loss 0 and a zero
        gradient.

        """
        mask_BK = full_mask(policy_logps_BK) if mask_BK is None else mask_BK.bool()
        rewards_BK = rewards_BK.to(policy_logps_BK.dtype)
        implicit_BK = self.implicit_rewards(policy_logps_BK, reference_logps_BK, lengths_BK, mask_BK)
        if self.length_penalty:
            # R-DPO (Park et al. 2024, arXiv:2403.19159): a reward of r - penalty * length is maximized by a policy
            # whose log-ratio is that reward, so r itself is the log-ratio plus penalty * length
            implicit_BK = implicit_BK + self.length_penalty * torch.where(mask_BK, lengths_BK, 0)
        target_BK = self.eta * rewards_BK.masked_fill(~mask_BK, 0)
        comparisons = compare(implicit_BK, target_BK, rewards_BK, mask_BK, pairs=self.pairs)
        counts_BP = is_informative(comparisons, uses_rewards=self.uses_rewards)
        settings = {name: getattr(self, name) for name in self.distance.settings}
        loss_BP = torch.where(counts_BP, self.distance.function(comparisons, **settings), 0)
        if self.uses_weights:
            if log_weights_BK is None:
                raise InputError(f"weighting: {self.weighting} needs log_weights_BK")
            compared = compare(log_weights_BK.detach(), target_BK, rewards_BK, mask_BK, pairs=self.pairs)
            loss_BP = loss_BP * pair_weights(compared.implicit_BPC, compared.mask_BPC)
        return loss_BP.sum(dim=-1) / counts_BP.sum(dim=-1).clamp(min=1)

    def implicit_rewards(
        self, policy_logps_BK: Tensor, reference_logps_BK: Tensor, lengths_BK: Tensor, mask_BK: Tensor | None = None
    ) -> Tensor:
        """Return beta * (policy - reference) of each response, shape [B, K]; 0 where the mask is False.

        Divided by the response length with `per_token`; without the reference term with `reference_free`.
        """
        mask_BK = full_mask(policy_logps_BK) if mask_BK is None else mask_BK.bool()
        ratio_BK = policy_logps_BK if self.reference_free else policy_logps_BK - reference_logps_BK
        ratio_BK = torch.where(mask_BK, ratio_BK, 0)
        if self.per_token:
            ratio_BK = ratio_BK / torch.where(mask_BK, lengths_BK, 1).clamp(min=1)
        return self.beta * ratio_BK


def pair_weights(log_weights_BPC: Tensor, mask_BPC: Tensor) -> Tensor:
    """Return the weight of each comparison, at most 1, shape [B, P].

    WPO (Zhou et al. 2024, arXiv:2406.11827, eq. 2) with sampled alignment: the product over the compared responses of
    exp(mean over tokens of log p(token) - log sum_v p(v)^2), capped at 1 as in the authors' code.
    """
    return torch.where(mask_BPC, log_weights_BPC, 0).sum(dim=-1).exp().clamp(max=1)


def full_mask(like_BK: Tensor) -> Tensor:
    """Return a mask of the shape of `like_BK` that is True everywhere."""
    return torch.ones_like(like_BK, dtype=torch.bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Setting -> (check, what is expected)
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "eta": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "label_smoothing": (lambda value: _is_number(value) and 0 <= value < 0.5, "a number in [0, 0.5)"),
    "gamma": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "pairs": (lambda value: isinstance(value, str) and value in PAIRS, "one of " + ", ".join(PAIRS)),
    "per_token": (lambda value: isinstance(value, bool), "true or false"),
    "reference_free": (lambda value: isinstance(value, bool), "true or false"),
    "length_penalty": (lambda value: _is_number(value) and value >= 0, "a number of at least 0"),
    "weighting": (lambda value: value in ("none", "wpo"), "none or wpo"),
}
