"""The RPO family: a distance between the implicit and the target rewards of K responses to one prompt.

B prompts, K responses, P contests of C responses each, the best first: a contest is a whole group or a pair of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.errors import InputError
from align.registry import import_dotted, pick, suggest


class Contests(NamedTuple):
    """Responses that compete, in descending order of reward along the last axis."""

    implicit_BPC: Tensor
    target_BPC: Tensor
    there_BPC: Tensor  # False: no such response, and 0 in the other two


class Distance(NamedTuple):
    """How one contest is scored, and what that needs to know."""

    score: Callable[[Contests, PreferenceLoss], Tensor]  # -> loss_BP
    reads: tuple[str, ...] = ()  # settings beyond those that every loss reads
    kwise: bool = False  # scores any number of responses; otherwise pairs only


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """One member of the family with its settings; called, it returns loss_B and reduces nothing.

    Implicit rewards are beta * (policy - reference) log-probabilities, target rewards eta * rewards. A loss without
    `eta` reads only the order of the rewards: a group or pair that is tied throughout says nothing to it and costs 0.
    """

    distance: Distance
    beta: float = 0.1  # Rafailov et al. 2023
    eta: float = 1.0  # Adler et al. 2024 (Nemotron-4)
    label_smoothing: float = 0.0  # share of labels taken to be wrong
    gamma: float = 0.0  # margin by which the best response should lead
    pairs: str = "none"  # none: the group at once; all: the mean over its pairs; best_worst: that pair alone
    per_token: bool = False  # divide log-probabilities by the response's length
    reference_free: bool = False

    def __post_init__(self) -> None:
        for name, (is_right, right) in CHECKS.items():
            value = getattr(self, name)
            if not is_right(value):
                raise InputError(f"{name} is {right}, not {value!r}")
        for field in fields(self)[1:]:
            if field.name not in self.settings and getattr(self, field.name) != field.default:
                raise InputError(f"{field.name} is not read by this loss; there are: {', '.join(self.settings)}")
        if self.pairs == "none" and not self.distance.kwise:
            raise InputError("pairs is 'all' or 'best_worst' for a loss that is defined on pairs only, not 'none'")

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that change this loss."""
        return ("beta", "pairs", "per_token", "reference_free", *self.distance.reads)

    @property
    def uses_rewards(self) -> bool:
        """Whether the rewards' values matter; otherwise only their order does."""
        return "eta" in self.distance.reads

    @property
    def uses_reference(self) -> bool:
        """Whether the reference's log-probabilities matter."""
        return not self.reference_free

    def __call__(
        self,
        policy_logps_BK: Tensor,
        reference_logps_BK: Tensor,
        rewards_BK: Tensor,
        lengths_BK: Tensor,
        mask_BK: Tensor | None = None,
    ) -> Tensor:
        """Loss of each group, shape [B]; 0 with zero gradient where nothing can be compared.

        Where the mask is False there is no response, and whatever stands there has no influence.
        """
        there_BK = _there(policy_logps_BK, mask_BK)
        rewards_BK = rewards_BK.to(policy_logps_BK.dtype)
        implicit_BK = self.implicit_rewards(policy_logps_BK, reference_logps_BK, lengths_BK, mask_BK)
        order_BK = rewards_BK.masked_fill(~there_BK, -math.inf).argsort(dim=-1, descending=True, stable=True)
        row_B11 = torch.arange(len(order_BK), device=order_BK.device)[:, None, None]
        index_BPC = order_BK[row_B11, PAIRS[self.pairs](there_BK)]
        there_BPC = there_BK[row_B11, index_BPC]
        target_BK = self.eta * rewards_BK.masked_fill(~there_BK, 0)
        contests = Contests(implicit_BK[row_B11, index_BPC], target_BK[row_B11, index_BPC], there_BPC)
        counts_BP = self._counts(contests)
        loss_BP = torch.where(counts_BP, self.distance.score(contests, self), 0)
        return loss_BP.sum(dim=-1) / counts_BP.sum(dim=-1).clamp(min=1)

    def _counts(self, contests: Contests) -> Tensor:
        """Which contests say anything, shape [B, P]: two responses, which differ in reward if only that matters."""
        _, target_BPC, there_BPC = contests
        rival_BPC = there_BPC if self.uses_rewards else there_BPC & (target_BPC != target_BPC[..., :1])
        return rival_BPC[..., 1:].any(dim=-1)

    def implicit_rewards(
        self, policy_logps_BK: Tensor, reference_logps_BK: Tensor, lengths_BK: Tensor, mask_BK: Tensor | None = None
    ) -> Tensor:
        """Implicit reward of each response, shape [B, K]; 0 where the mask is False."""
        there_BK = _there(policy_logps_BK, mask_BK)
        gain_BK = policy_logps_BK if self.reference_free else policy_logps_BK - reference_logps_BK
        gain_BK = torch.where(there_BK, gain_BK, 0)
        return self.beta * (gain_BK / torch.where(there_BK, lengths_BK, 1).clamp(min=1) if self.per_token else gain_BK)

    def first_loss(self, rewards_BK: Tensor, lengths_BK: Tensor, mask_BK: Tensor | None = None) -> Tensor | None:
        """Loss of a policy that equals its reference, shape [B]; None without a reference: it depends on the policy."""
        zero_BK = torch.zeros_like(rewards_BK)
        return None if self.reference_free else self(zero_BK, zero_BK, rewards_BK, lengths_BK, mask_BK)


@dataclass(frozen=True, slots=True)
class OwnLoss:
    """A user's function of the arguments of a `PreferenceLoss`, with what else a trainer asks of one.

    Nothing is known of its beta or of its first value, so its implicit rewards are plain log-ratios.
    """

    function: Callable[..., Any]  # -> loss_B
    uses_rewards: bool = True
    uses_reference: bool = True

    def __call__(self, *logps_rewards_lengths_mask: Tensor | None) -> Tensor:
        """What the user's function returns, shape [B]."""
        return self.function(*logps_rewards_lengths_mask)

    def implicit_rewards(
        self, policy_logps_BK: Tensor, reference_logps_BK: Tensor, lengths_BK: Tensor, mask_BK: Tensor | None = None
    ) -> Tensor:
        """Log-ratio of each response, shape [B, K]; 0 where the mask is False."""
        return torch.where(_there(policy_logps_BK, mask_BK), policy_logps_BK - reference_logps_BK, 0)

    def first_loss(self, rewards_BK: Tensor, lengths_BK: Tensor, mask_BK: Tensor | None = None) -> None:
        """None: not known."""


def preference_loss(name: str, **settings: object) -> PreferenceLoss | OwnLoss:
    """The loss of that name in `LOSSES` with some settings changed, or what a user's `module:name` makes of them."""
    if ":" in name:
        return _own_loss(name, settings)
    member = pick(LOSSES, name, "preference loss")
    for setting in settings:
        if setting not in member.settings:
            raise InputError(f"loss {name!r} has no setting {setting!r}; {suggest(setting, member.settings)}")
    try:
        return replace(member, **settings)
    except InputError as error:
        raise InputError(f"loss {name!r}: {error}") from None


def _own_loss(path: str, settings: dict[str, object]) -> PreferenceLoss | OwnLoss:
    make = import_dotted(path, "preference loss")
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        raise InputError(f"preference loss {path!r} cannot be made with the settings {settings}: {error}") from error
    loss = make(**settings)
    if not callable(loss):
        raise InputError(f"preference loss {path!r} makes {loss!r}; a function that returns loss_B is needed")
    return loss if isinstance(loss, PreferenceLoss | OwnLoss) else OwnLoss(loss)


def _there(like_BK: Tensor, mask_BK: Tensor | None) -> Tensor:
    return torch.ones_like(like_BK, dtype=torch.bool) if mask_BK is None else mask_BK.bool()


def whole_group(there_BK: Tensor) -> Tensor:
    """Ranks that compete when the group is one contest, shape [B, 1, K]."""
    return torch.arange(there_BK.shape[1], device=there_BK.device).expand(len(there_BK), 1, -1)


def every_pair(there_BK: Tensor) -> Tensor:
    """Ranks of every unordered pair, the better first, shape [B, K * (K - 1) / 2, 2]."""
    num_responses = there_BK.shape[1]
    pairs_2P = torch.triu_indices(num_responses, num_responses, offset=1, device=there_BK.device)
    return pairs_2P.T.expand(len(there_BK), -1, -1)


def best_and_worst(there_BK: Tensor) -> Tensor:
    """First and last rank of each group, shape [B, 1, 2]: of equal rewards the first is best and the last is worst."""
    worst_B = (there_BK.sum(dim=-1) - 1).clamp(min=0)
    return torch.stack([torch.zeros_like(worst_B), worst_B], dim=-1)[:, None]


def _log_softmax(values_BPC: Tensor, there_BPC: Tensor) -> Tensor:
    """Log-shares among those there; a finite floor elsewhere, so that a share of 0 times it is 0 and not NaN."""
    floor = torch.finfo(values_BPC.dtype).min / 4
    return values_BPC.masked_fill(~there_BPC, floor).log_softmax(dim=-1)


def _lead(contests: Contests) -> Tensor:
    """Implicit reward by which the better of a pair leads, shape [B, P]."""
    return contests.implicit_BPC[..., 0] - contests.implicit_BPC[..., 1]


def top_choice(contests: Contests, loss: PreferenceLoss) -> Tensor:
    """Plackett-Luce surprise that the best response is chosen first; of two, -log sigmoid(lead).

    Rafailov et al. 2023, eq. 7, and the first factor of its eq. 18: KL from a certain label to the policy's softmax.
    """
    return -_log_softmax(contests.implicit_BPC, contests.there_BPC)[..., 0]


def backward_kl(contests: Contests, loss: PreferenceLoss) -> Tensor:
    """KL from the target's softmax to the policy's; the loss of Nemotron-4 (Adler et al. 2024)."""
    target_BPC = _log_softmax(contests.target_BPC, contests.there_BPC)
    return (target_BPC.exp() * (target_BPC - _log_softmax(contests.implicit_BPC, contests.there_BPC))).sum(dim=-1)


def forward_kl(contests: Contests, loss: PreferenceLoss) -> Tensor:
    """KL from the policy's softmax to the target's."""
    policy_BPC = _log_softmax(contests.implicit_BPC, contests.there_BPC)
    return (policy_BPC.exp() * (policy_BPC - _log_softmax(contests.target_BPC, contests.there_BPC))).sum(dim=-1)


def squared(contests: Contests, loss: PreferenceLoss) -> Tensor:
    """Mean over unordered pairs of the squared gap between reward differences: twice the variance of the gaps."""
    count_BP = contests.there_BPC.sum(dim=-1)
    gap_BPC = contests.implicit_BPC - contests.target_BPC
    mean_BP = gap_BPC.sum(dim=-1) / count_BP.clamp(min=1)
    deviation_BPC = torch.where(contests.there_BPC, gap_BPC - mean_BP[..., None], 0)
    return 2 * deviation_BPC.square().sum(dim=-1) / (count_BP - 1).clamp(min=1)


def logistic(contests: Contests, loss: PreferenceLoss) -> Tensor:
    """-log sigmoid(lead - gamma), mixed with its mirror by label smoothing.

    cDPO (Mitchell 2023) has no gamma; it is a cross-entropy, so its least value is the entropy of the smoothed label.
    SimPO (Meng et al. 2024, eq. 6) has no smoothing and is reference-free and per token.
    """
    lead_BP = _lead(contests) - loss.gamma
    return -(1 - loss.label_smoothing) * logsigmoid(lead_BP) - loss.label_smoothing * logsigmoid(-lead_BP)


def robust(contests: Contests, loss: PreferenceLoss) -> Tensor:
    """DPO unbiased under flipped labels (Chowdhury et al. 2024); it may be negative and has no minimum."""
    share = loss.label_smoothing
    lead_BP = _lead(contests)
    return (share * logsigmoid(-lead_BP) - (1 - share) * logsigmoid(lead_BP)) / (1 - 2 * share)


def identity(contests: Contests, loss: PreferenceLoss) -> Tensor:
    """(lead / beta - 1 / (2 beta))²: IPO, beta for tau (Azar et al. 2023, eq. 17); TRL's `ipo` is this `per_token`."""
    return ((_lead(contests) - 0.5) / loss.beta).square()


def hinge(contests: Contests, loss: PreferenceLoss) -> Tensor:
    """max(0, 1 - lead): the hinge-norm of RSO (Liu et al. 2023), and with `reference_free` SLiC (Zhao et al. 2023)."""
    return (1 - _lead(contests)).relu()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


PAIRS: dict[str, Callable[[Tensor], Tensor]] = {"none": whole_group, "all": every_pair, "best_worst": best_and_worst}

CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "eta": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "label_smoothing": (lambda value: _is_number(value) and 0 <= value < 0.5, "a share in [0, 0.5)"),
    "gamma": (lambda value: _is_number(value) and value >= 0, "a number from 0"),
    "pairs": (lambda value: isinstance(value, str) and value in PAIRS, "one of " + ", ".join(PAIRS)),
    "per_token": (lambda value: isinstance(value, bool), "true or false"),
    "reference_free": (lambda value: isinstance(value, bool), "true or false"),
}

TOP_CHOICE = Distance(top_choice, kwise=True)
LOGISTIC = Distance(logistic, reads=("label_smoothing", "gamma"))

# beta: of rpo_* NeMo-Aligner's gpt_dpo.yaml (the paper names a range), of dpo_norm Tülu 3 (Lambert et al. 2024), of
# simpo with its gamma the paper's Llama-3-8B-Base run, else as dpo. A smoothing of 0.1 is ours: no paper has a default.
LOSSES: dict[str, PreferenceLoss] = {
    "dpo": PreferenceLoss(TOP_CHOICE),
    "dpo_norm": PreferenceLoss(TOP_CHOICE, beta=5.0, per_token=True),
    "cdpo": PreferenceLoss(LOGISTIC, label_smoothing=0.1, pairs="all"),
    "robust": PreferenceLoss(Distance(robust, reads=("label_smoothing",)), label_smoothing=0.1, pairs="all"),
    "ipo": PreferenceLoss(Distance(identity), pairs="all"),
    "hinge": PreferenceLoss(Distance(hinge), pairs="all"),
    "simpo": PreferenceLoss(LOGISTIC, beta=2.0, gamma=1.0, pairs="all", per_token=True, reference_free=True),
    "rpo_bwd_kl": PreferenceLoss(Distance(backward_kl, reads=("eta",), kwise=True), beta=0.2),
    "rpo_fwd_kl": PreferenceLoss(Distance(forward_kl, reads=("eta",), kwise=True), beta=0.2),
    "rpo_sq": PreferenceLoss(Distance(squared, reads=("eta",), kwise=True), beta=0.2),
}
