"""Distances between implicit and target rewards, one value for each comparison.

The implicit reward is a = beta * log(policy / reference), the target reward b = eta * reward. The margin of a pair is
the implicit reward of the better response minus that of the other one, a_1 - a_2.
Shape legend: B prompts, P comparisons, C responses in a comparison, the best first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from align.losses.comparisons import Comparisons
from align.registry import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:  # a recipe's loss is validated without them
    torch, functional = LazyModule("torch"), LazyModule("torch.nn.functional")


class Distance(NamedTuple):
    """A distance function and the settings that it reads."""

    function: Callable[..., Tensor]  # (comparisons, **settings) -> loss_BP
    settings: tuple[str, ...] = ()  # names of the settings of the loss that are passed to the function
    uses_rewards: bool = False  # reads the values of the target rewards; otherwise only their order matters
    listwise: bool = False  # accepts any number of responses; otherwise pairs only


def top_choice(comparisons: Comparisons) -> Tensor:
    """Compute -log softmax(a)[best], shape [B, P]; for a pair, -log sigmoid(margin).

    DPO (Rafailov et al. 2023, eq. 7) and, for more than two responses, the first factor of the Plackett-Luce model
    (ibid., eq. 18). Equals the KL divergence from a one-hot label to the softmax of the implicit rewards.
    """
    return -_masked_log_softmax(comparisons.implicit_BPC, comparisons.mask_BPC)[..., 0]


def backward_kl(comparisons: Comparisons) -> Tensor:
    """Compute KL(softmax(b) || softmax(a)), shape [B, P].

    The RPO loss of Nemotron-4 340B (Adler et al. 2024, sec. 3.3.2). Finite for one-hot targets.
    """
    target_BPC = _masked_log_softmax(comparisons.target_BPC, comparisons.mask_BPC)
    policy_BPC = _masked_log_softmax(comparisons.implicit_BPC, comparisons.mask_BPC)
    return (target_BPC.exp() * (target_BPC - policy_BPC)).sum(dim=-1)


def forward_kl(comparisons: Comparisons) -> Tensor:
    """Compute KL(softmax(a) || softmax(b)), shape [B, P]; RPO with the arguments of its divergence swapped."""
    policy_BPC = _masked_log_softmax(comparisons.implicit_BPC, comparisons.mask_BPC)
    target_BPC = _masked_log_softmax(comparisons.target_BPC, comparisons.mask_BPC)
    return (policy_BPC.exp() * (policy_BPC - target_BPC)).sum(dim=-1)


def squared(comparisons: Comparisons) -> Tensor:
    """Compute the mean over unordered pairs of ((a_i - a_j) - (b_i - b_j))^2, shape [B, P].

    Computed in O(C) as twice the unbiased variance of a - b.
    """
    count_BP = comparisons.mask_BPC.sum(dim=-1)
    gap_BPC = comparisons.implicit_BPC - comparisons.target_BPC
    mean_BP = gap_BPC.sum(dim=-1) / count_BP.clamp(min=1)
    deviation_BPC = torch.where(comparisons.mask_BPC, gap_BPC - mean_BP[..., None], 0)
    return 2 * deviation_BPC.square().sum(dim=-1) / (count_BP - 1).clamp(min=1)


def logistic(comparisons: Comparisons, *, label_smoothing: float, gamma: float) -> Tensor:
    """Compute -(1 - s) log sigmoid(margin - gamma) - s log sigmoid(gamma - margin), shape [B, P].

    `s` is the label smoothing. With gamma = 0 this is cDPO (Mitchell 2023), whose minimum is the entropy of the
    smoothed label. With s = 0, length-normalized and without a reference it is SimPO (Meng et al. 2024, eq. 6).
    """
    margin_BP = _margin(comparisons) - gamma
    right_BP, flipped_BP = functional.logsigmoid(margin_BP), functional.logsigmoid(-margin_BP)
    return -(1 - label_smoothing) * right_BP - label_smoothing * flipped_BP


def robust(comparisons: Comparisons, *, label_smoothing: float) -> Tensor:
    """Compute (s log sigmoid(-margin) - (1 - s) log sigmoid(margin)) / (1 - 2 s), shape [B, P].

    An unbiased estimate of the DPO loss when a share `s` of the labels is flipped (Chowdhury et al. 2024). It may be
    negative and has no minimum.
    """
    margin_BP = _margin(comparisons)
    flipped_BP = label_smoothing * functional.logsigmoid(-margin_BP)
    return (flipped_BP - (1 - label_smoothing) * functional.logsigmoid(margin_BP)) / (1 - 2 * label_smoothing)


def ipo(comparisons: Comparisons, *, beta: float) -> Tensor:
    """Compute (margin / beta - 1 / (2 beta))^2, shape [B, P].

    IPO (Azar et al. 2023, eq. 17) with beta for the paper's tau. TRL's `ipo` is this loss with `per_token`.
    """
    return ((_margin(comparisons) - 0.5) / beta).square()


def hinge(comparisons: Comparisons) -> Tensor:
    """Compute max(0, 1 - margin), shape [B, P].

    The hinge loss of RSO (Liu et al. 2023); with `reference_free` that of SLiC (Zhao et al. 2023).
    """
    return (1 - _margin(comparisons)).relu()


def exo(comparisons: Comparisons, *, label_smoothing: float) -> Tensor:
    """Compute KL(softmax(a) || (1 - s, s)) of a pair with smoothed label, shape [B, P].

    EXO-pref (Ji et al. 2024, arXiv:2402.00856, eq. 16): the divergence of DPO with its arguments swapped. The label
    smoothing `s` must be above 0, because the divergence from a hard label is infinite.
    """
    margin_BP = _margin(comparisons)
    chosen_BP, rejected_BP = functional.logsigmoid(margin_BP), functional.logsigmoid(-margin_BP)
    log_share, log_rest = math.log1p(-label_smoothing), math.log(label_smoothing)
    return chosen_BP.exp() * (chosen_BP - log_share) + rejected_BP.exp() * (rejected_BP - log_rest)


def apo_zero(comparisons: Comparisons) -> Tensor:
    """Compute sigmoid(-a_1) + sigmoid(a_2), shape [B, P]: raises the better response and lowers the other one.

    APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7), for responses that are better than the policy's own.
    """
    return (-comparisons.implicit_BPC[..., 0]).sigmoid() + comparisons.implicit_BPC[..., 1].sigmoid()


def apo_down(comparisons: Comparisons) -> Tensor:
    """Compute sigmoid(a_1) + sigmoid(-margin), shape [B, P]: lowers both responses, the worse one more.

    APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8), for a policy that is better than both responses.
    """
    return comparisons.implicit_BPC[..., 0].sigmoid() + (-_margin(comparisons)).sigmoid()


def odds_ratio(comparisons: Comparisons, *, beta: float) -> Tensor:
    """Compute -beta log sigmoid(log odds(better) - log odds(worse)), shape [B, P], with odds(p) = p / (1 - p).

    The odds-ratio term of ORPO (Hong et al. 2024, arXiv:2403.07691, eqs. 4 and 7), with beta for the paper's lambda
    and p the geometric mean of a response's token probabilities. ORPO adds the negative log-likelihood of the better
    response (`sft_weight`).
    """
    mean_logp_BPC = comparisons.implicit_BPC / beta
    log_odds_BPC = mean_logp_BPC - _log1mexp(mean_logp_BPC)
    return -beta * functional.logsigmoid(log_odds_BPC[..., 0] - log_odds_BPC[..., 1])


def _log1mexp(values: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of negative numbers; those above -eps of the type, which have no odds, count as -eps.

    Mächler 2012, "Accurately computing log(1 - exp(-|a|))": each formula is exact on its side of -log 2.
    """
    values = values.clamp(max=-torch.finfo(values.dtype).eps)
    return torch.where(values > -math.log(2), (-values.expm1()).log(), (-values.exp()).log1p())


def _margin(comparisons: Comparisons) -> Tensor:
    """Return the implicit reward margin of each pair, shape [B, P]."""
    return comparisons.implicit_BPC[..., 0] - comparisons.implicit_BPC[..., 1]


def _masked_log_softmax(values_BPC: Tensor, mask_BPC: Tensor) -> Tensor:
    """Return the log-softmax over unmasked entries; elsewhere a finite floor, so that 0 * floor is 0 and not NaN."""
    floor = torch.finfo(values_BPC.dtype).min / 4
    return values_BPC.masked_fill(~mask_BPC, floor).log_softmax(dim=-1)
