"""The router auxiliary loss of a mixture of experts (Fedus et al. 2021, eq. 4), as in transformers.

Shape legend: T rows of a batch, E experts, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.models.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Routing:
    """Sums over the layers and counted rows of a batch, fp64."""

    chosen_E: Tensor  # how many tokens each expert is chosen by
    probability_E: Tensor  # of each expert; with gradients
    count: Tensor  # layers times counted rows, scalar

    def each(self, function: Callable[[Tensor], Tensor]) -> Routing:
        """Return the function of each of the sums."""
        return Routing(function(self.chosen_E), function(self.probability_E), function(self.count))

    def detach(self) -> Routing:
        """Return the sums without gradients."""
        return self.each(Tensor.detach)

    def __add__(self, other: Routing) -> Routing:
        """Return the sums over both."""
        return Routing(
            self.chosen_E + other.chosen_E, self.probability_E + other.probability_E, self.count + other.count
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoss:
    """E times the sum over experts of the share of tokens that choose the expert and its mean probability.

    It is at least the number of chosen experts, which perfect balance reaches. Only the probability has a gradient.
    """

    coefficient: float  # of the auxiliary loss in the training loss
    num_experts: int
    num_chosen: int  # experts of each token

    def routing(self, router_logits: Sequence[Tensor], weight_T: Tensor) -> Routing:
        """Return the sums over the rows of a batch, each of which counts as often as its weight says."""
        weight_T = weight_T.double()
        chosen_E = probability_E = torch.zeros(self.num_experts, dtype=torch.float64, device=weight_T.device)
        for logits_TE in router_logits:
            probability_TE = logits_TE.softmax(dim=-1)
            chosen_TK = probability_TE.topk(self.num_chosen, dim=-1).indices
            chosen_E = chosen_E.index_add(0, chosen_TK.flatten(), weight_T.repeat_interleave(self.num_chosen))
            probability_E = probability_E + weight_T @ probability_TE.double()
        return Routing(chosen_E, probability_E, weight_T.sum() * len(router_logits))

    def value(self, whole: Routing, part: Routing | None = None) -> Tensor:
        """Return the auxiliary loss, or what a part contributes to it; gradients flow to the part's probabilities.

        The choices are those of the whole, so that the contributions of all parts add up to the loss of the whole.
        """
        part = part or whole
        return self.num_experts * (whole.chosen_E @ part.probability_E) / whole.count.square()


def router_loss(model: Backbone) -> RouterLoss | None:
    """Return the auxiliary loss that the model's configuration asks for: `output_router_logits`, with a coefficient."""
    base: Any = model.base
    config = base.config.get_text_config()
    coefficient = float(getattr(base, "router_aux_loss_coef", None) or 0.0)
    if not (getattr(config, "output_router_logits", False) and coefficient):
        return None
    return RouterLoss(coefficient=coefficient, num_experts=base.num_experts, num_chosen=base.num_experts_per_tok)
