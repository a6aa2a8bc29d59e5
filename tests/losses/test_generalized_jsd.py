"""The generalized Jensen-Shannon divergence against torch's KL, TRL's loss and its own limits."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from align.losses.distillation import generalized_jsd

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def logps(seed, shape=(6, 9), scale=2.0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw, dtype=torch.float64) * scale).log_softmax(dim=-1)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_the_weighted_sum_of_torchs_divergences(beta):
    student, teacher = logps(0), logps(1)
    if beta in (0.0, 1.0):
        p, q = (teacher, student) if beta == 0 else (student, teacher)
        expected = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    else:
        mixed = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
        parts = [kl_div(mixed, each, reduction="none", log_target=True).sum(-1) for each in (teacher, student)]
        expected = beta * parts[0] + (1 - beta) * parts[1]
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=beta), expected)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_that_of_trl(beta):
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher = logps(0), logps(1)
    expected = trl.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=beta).sum(), expected)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_no_divergence_and_others_a_bounded_one(beta):
    student, teacher = logps(0).requires_grad_(), logps(1)
    same = generalized_jsd(student, student.detach(), beta=beta)
    torch.testing.assert_close(same, torch.zeros(6, dtype=torch.float64))
    found = generalized_jsd(student, teacher, beta=beta)
    assert (found > 0).all()
    if 0 < beta < 1:
        entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert (found <= entropy).all()


def test_divided_by_beta_it_tends_to_the_forward_divergence():
    student, teacher = logps(0), logps(1)
    small = generalized_jsd(student, teacher, beta=1e-6) / 1e-6
    torch.testing.assert_close(small, generalized_jsd(student, teacher, beta=0.0), rtol=1e-3, atol=1e-6)
    large = generalized_jsd(student, teacher, beta=1 - 1e-6) / 1e-6
    torch.testing.assert_close(large, generalized_jsd(student, teacher, beta=1.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_merging_classes_never_adds_divergence(beta):
    """What is lost by taking all tokens but some as one class has a sign: data-processing inequality."""
    student, teacher = logps(0), logps(1)
    for kept in range(1, 9):
        merged = [
            torch.cat([each[:, :kept], each[:, kept:].logsumexp(-1, keepdim=True)], dim=1)
            for each in (student, teacher)
        ]
        assert (generalized_jsd(*merged, beta=beta) <= generalized_jsd(student, teacher, beta=beta) + 1e-12).all()


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_are_numerical_ones_also_with_an_empty_class(beta):
    logits, teacher = (
        torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
        logps(1, (3, 4)),
    )
    empty = torch.full((3, 1), -torch.inf, dtype=torch.float64)

    def loss(given):
        student = torch.cat([given.log_softmax(dim=-1), empty], dim=1)
        return generalized_jsd(student, torch.cat([teacher, empty], dim=1), beta=beta)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    torch.testing.assert_close(loss(logits), generalized_jsd(logits.log_softmax(-1), teacher, beta=beta))
