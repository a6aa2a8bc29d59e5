"""Initialization of a reward head by ridge regression on the decoder's hidden states.

Training a randomly initialized head together with its decoder distorts the decoder's features (Kumar et al. 2022).
Heads in transformers have no bias, and neither has this regression. Hidden states share a large common component that
acts as a constant; the penalty shrinks predictions towards the mean label along it instead of towards 0.
Shape legend: N rows, D width, A attributes, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Candidate penalties as multiples of the mean squared singular value
PENALTIES = torch.logspace(-6, 3, 37, dtype=torch.float64)


@torch.no_grad()
def init_head(weight_AD: Tensor, states_ND: Tensor, label_NA: Tensor) -> Tensor:
    """Return head weights fitted to the known labels (not NaN); an attribute without labels keeps its weights."""
    weight_AD = weight_AD.clone()
    for weight_D, label_N in zip(weight_AD, label_NA.double().T, strict=True):
        known_N = ~label_N.isnan()
        if known_N.any():
            weight_D.copy_(fit_attribute(states_ND[known_N].double(), label_N[known_N]))
    return weight_AD


def fit_attribute(states_ND: Tensor, label_N: Tensor) -> Tensor:
    """Return weights, shape [D], that predict the mean label plus a ridge regression of the deviation from it."""
    mean = label_N.mean()
    constant_D = ridge_regression(states_ND, torch.ones_like(label_N))
    return mean * constant_D + ridge_regression(states_ND, label_N - mean)


def ridge_regression(states_ND: Tensor, label_N: Tensor) -> Tensor:
    """Return regression weights without a bias, shape [D], for the penalty with the least leave-one-out error.

    The leave-one-out residual is residual / (1 - leverage), for all rows and penalties from one decomposition (PRESS,
    Allen 1974).
    """
    left_NR, singular_R, right_RD = torch.linalg.svd(states_ND, full_matrices=False)
    square_R = singular_R.square()
    projection_R = left_NR.T @ label_N
    errors: list[float] = []
    for penalty in PENALTIES * square_R.mean():
        shrinkage_R = square_R / (square_R + penalty)
        leverage_N = left_NR.square() @ shrinkage_R
        residual_N = (label_N - left_NR @ (shrinkage_R * projection_R)) / (1 - leverage_N)
        errors.append(float(residual_N.square().mean()))
    best = PENALTIES[errors.index(min(errors))] * square_R.mean()
    return right_RD.T @ (singular_R / (square_R + best) * projection_R)
