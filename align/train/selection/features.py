"""One vector for each group, from the input of the head in a forward pass; their cosines couple the rows of a choice.

`embedding`: the mean of the hidden states that enter the head: those that predict the trained tokens of the group, or
those of the last tokens for a reward model (as RDS compares rows; Ivison et al. 2025, arXiv:2503.01807).

`gradient`: the gradient of the group's loss with respect to the weights of the head. It is a sum over the positions n
that enter the head, of d_n h_n^T, where h_n is the hidden state and d_n the gradient of the loss with respect to the
logits: for a log-probability (1 at the target - softmax) times the derivative of the loss with respect to it. Both
factors are projected, R^T d_n and Q^T h_n, with random signs over the square root of their number, so that inner
products are kept in expectation (Johnson and Lindenstrauss 1984; LESS, Xia et al. 2024, arXiv:2402.04333, projects
gradients in this way).

Shape legend: B groups, S sequences, N positions that enter the head, D width, V vocabulary, P projected dimensions,
F features.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from align.models.backbone import Backbone
from align.models.lm_head.logprobs import residual_sketches
from align.models.policy import Policy, logit_transform
from align.train.objectives.base import ScoredObjective
from align.train.objectives.batch import GroupBatch
from align.train.selection.sampler import Floats

PROJECTED = 64  # dimensions of each factor of a gradient: an inner product has a relative error of about 1/8 x sqrt(2)


class HeadFeatures:
    """Computes the features of groups from the forward passes within `recording`."""

    def __init__(
        self, model: Backbone, objective: ScoredObjective, kind: Literal["embedding", "gradient"], *, seed: int
    ) -> None:
        self._model = model
        self._objective = objective
        self._is_gradient = kind == "gradient"
        self._seed = seed
        self._predicts_tokens = isinstance(model, Policy)
        self._hidden_ND = self._residual_NP = cast("Tensor | None", None)

    @property
    def num_heads(self) -> int:
        """Return how often a scoring pass computes the product with the head."""
        return 2 if self._is_gradient and self._predicts_tokens else 1

    @contextmanager
    def recording(self) -> Generator[None]:
        """Keep what enters the head in forward passes of the model, where sharded weights are gathered."""
        handle = self._model.linear_head.register_forward_pre_hook(self._record, with_kwargs=True)
        try:
            with self._model.whole_trees():
                yield
        finally:
            handle.remove()
            self._hidden_ND = self._residual_NP = None

    def _record(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden_ND = cast(Tensor, args[0]).detach()
        if self._is_gradient and self._predicts_tokens:
            layer = cast(nn.Linear, head)
            signs_VP = self._signs(len(layer.weight), "vocabulary").to(self._hidden_ND.device)
            transform = logit_transform(self._model.base.config)
            self._residual_NP = residual_sketches(
                self._hidden_ND, layer.weight, layer.bias, kwargs["targets"], transform, signs_VP
            )

    def of(self, outputs_S: Tensor, batch: GroupBatch) -> Tensor:
        """Return the features of the groups of the batch of the last forward pass, fp32, shape [B, F]."""
        assert self._hidden_ND is not None, "no forward pass was recorded"
        hidden_ND = self._hidden_ND.float()
        tokens, device = batch.tokens, hidden_ND.device
        sizes_B = torch.tensor(batch.sizes, device=device)
        group_S = torch.arange(len(batch.sizes), device=device).repeat_interleave(sizes_B)
        sequence_N = tokens.sequence_N if self._predicts_tokens else torch.arange(len(group_S), device=device)
        group_N = group_S[sequence_N]
        if not self._is_gradient:
            sums_BD = hidden_ND.new_zeros(len(batch.sizes), hidden_ND.shape[1]).index_add(0, group_N, hidden_ND)
            return sums_BD / group_N.bincount(minlength=len(batch.sizes)).clamp(min=1)[:, None]
        hidden_NP = hidden_ND @ self._signs(hidden_ND.shape[1], "width").to(hidden_ND)
        slopes_SA = self._slopes(outputs_S, batch).float()
        d_NP = slopes_SA[sequence_N] if self._residual_NP is None else slopes_SA[sequence_N] * self._residual_NP
        members = [group_N == group for group in range(len(batch.sizes))]
        return torch.stack([(d_NP[of_group].T @ hidden_NP[of_group]).flatten() for of_group in members])

    def _slopes(self, outputs_S: Tensor, batch: GroupBatch) -> Tensor:
        """Return the derivative of the loss of its group with respect to each output of a sequence, shape [S, A]."""
        with torch.enable_grad():
            outputs_S = outputs_S.detach().requires_grad_()
            (slopes_S,) = torch.autograd.grad(self._objective.group_losses(outputs_S, batch).sum(), outputs_S)
        return slopes_S.reshape(len(outputs_S), -1)

    def _signs(self, rows: int, name: str) -> Tensor:
        """Return random signs over sqrt(P), shape [rows, P], which depend on the seed and the name."""
        return _random_signs(2 * self._seed + (name == "width"), rows)


@lru_cache(maxsize=2)  # for the vocabulary and the width
def _random_signs(seed: int, rows: int) -> Tensor:
    signs = torch.randint(0, 2, (rows, PROJECTED), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return (2 * signs.float() - 1) / PROJECTED**0.5


def mean_cosine(cosine_BB: Floats) -> float:
    """Return the mean over every two different rows; 0 for a single row."""
    number = len(cosine_BB)
    return float((cosine_BB.sum() - cosine_BB.trace()) / max(1, number * (number - 1)))


def similarities(features_BF: Floats, *, centered: bool) -> Floats:
    """Return the cosine of the features of every two rows, shape [B, B]; 0 for a row whose features are all 0.

    `centered` subtracts the mean of the rows first: hidden states share a large common part, so that their cosines are
    all close to 1.
    """
    if centered:
        features_BF = features_BF - features_BF.mean(axis=0)
    norms_B1 = np.linalg.norm(features_BF, axis=1, keepdims=True)
    unit_BF = np.divide(features_BF, norms_B1, out=np.zeros_like(features_BF), where=norms_B1 > 0)
    return unit_BF @ unit_BF.T
