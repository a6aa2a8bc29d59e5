"""Where the head of a reward model starts: a ridge regression on what the decoder already knows.

Training a head from nothing together with its decoder distorts the decoder first (Kumar et al. 2022). The heads of
transformers have no bias, and neither has the regression: last hidden states have most of their length in common, so
that a direction in them stands for a constant. The penalty pulls to the mean label along it, and not to 0.
Shape legend: N rows, D width, A attributes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Penalties that are tried, as shares of the mean square of a singular value.
PENALTIES = torch.logspace(-6, 3, 37, dtype=torch.float64)


@torch.no_grad()
def started(weight_AD: Tensor, states_ND: Tensor, label_NA: Tensor) -> Tensor:
    """Each attribute's weights as the ridge regression of its known labels; without any they are as they were."""
    weight_AD = weight_AD.clone()
    for weight_D, label_N in zip(weight_AD, label_NA.double().T, strict=True):
        known_N = ~label_N.isnan()
        if known_N.any():
            weight_D.copy_(regression(states_ND[known_N].double(), label_N[known_N]))
    return weight_AD


def regression(states_ND: Tensor, label_N: Tensor) -> Tensor:
    """Weights, shape [D], that predict the mean label and what can be told of the distance from it."""
    level = label_N.mean()
    constant_D = ridge(states_ND, torch.ones_like(label_N))
    return level * constant_D + ridge(states_ND, label_N - level)


def ridge(states_ND: Tensor, label_N: Tensor) -> Tensor:
    """Weights of the regression without a bias, shape [D], under the penalty with the least leave-one-out error.

    That error is residual / (1 - leverage), for all rows and penalties from one decomposition (Allen 1974, PRESS).
    """
    left_NR, singular_R, right_RD = torch.linalg.svd(states_ND, full_matrices=False)
    square_R, along_R = singular_R.square(), left_NR.T @ label_N
    errors: list[float] = []
    for penalty in PENALTIES * square_R.mean():
        shrunk_R = square_R / (square_R + penalty)
        leverage_N = left_NR.square() @ shrunk_R
        left_out_N = (label_N - left_NR @ (shrunk_R * along_R)) / (1 - leverage_N)
        errors.append(float(left_out_N.square().mean()))
    best = PENALTIES[errors.index(min(errors))] * square_R.mean()
    return right_RD.T @ (singular_R / (square_R + best) * along_R)
