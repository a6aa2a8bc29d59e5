"""The loss of distillation: a divergence between the token distributions of a teacher and a student.

Shape legend: N positions, C classes: some tokens, and all other tokens together as the last class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generalized_jsd(student_NC: Tensor, teacher_NC: Tensor, *, beta: float) -> Tensor:
    """Return the generalized Jensen-Shannon divergence of two log-distributions, in nats, shape [N].

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student (Agarwal et al. 2024,
    GKD, arXiv:2306.13649, eq. 1). 0 is KL(teacher || student) and 1 is KL(student || teacher): as in TRL, without the
    factor by which the divergence vanishes toward them. A class to which both give no probability counts as 0.
    """
    is_empty_NC = teacher_NC.isneginf() & student_NC.isneginf()
    teacher_NC, student_NC = (each.masked_fill(is_empty_NC, 0.0) for each in (teacher_NC, student_NC))
    if beta == 0:
        return _kl(teacher_NC, student_NC)
    if beta == 1:
        return _kl(student_NC, teacher_NC)
    mixed_NC = torch.logaddexp(teacher_NC + math.log(beta), student_NC + math.log1p(-beta))
    mixed_NC = mixed_NC.masked_fill(is_empty_NC, 0.0)
    return beta * _kl(teacher_NC, mixed_NC) + (1 - beta) * _kl(student_NC, mixed_NC)


def _kl(p_NC: Tensor, q_NC: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities, shape [N]."""
    return (p_NC.exp() * (p_NC - q_NC)).sum(dim=-1)
