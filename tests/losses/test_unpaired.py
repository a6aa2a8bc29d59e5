"""Losses on labelled responses against pure-Python arithmetic."""

import math

import pytest
import torch

from align.errors import InputError
from align.losses.table import LOSSES, preference_loss
from align.losses.unpaired import UnpairedLoss, lack_of_labels

NAMES = [name for name, loss in LOSSES.items() if isinstance(loss, UnpairedLoss)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def random_labelled(num_groups, num_responses, *, seed=0):
    """Return log-probabilities, labels and lengths of random groups."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_responses)
    reference_BK = -30 * torch.rand(shape, generator=generator, dtype=torch.float64)
    policy_BK = reference_BK + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels_BK = torch.randint(0, 2, shape, generator=generator).double()
    return policy_BK, reference_BK, labels_BK, torch.ones(shape)


def python_loss(policy, reference, label, *, beta, desirable, undesirable, kl):
    """Compute lambda - value of one response (Ethayarajh et al. 2024, eq. 7)."""
    ratio = policy - reference
    if label:
        return desirable - desirable * sigmoid(beta * (ratio - kl))
    return undesirable - undesirable * sigmoid(beta * (kl - ratio))


def test_the_table_has_both_forms():
    assert NAMES == ["kto", "apo_zero_unpaired"]


@pytest.mark.parametrize("num_responses", [1, 3])
@pytest.mark.parametrize("kl", [0.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_a_group_costs_the_mean_of_its_responses(name, kl, num_responses):
    groups = random_labelled(6, num_responses)
    loss = preference_loss(name, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    found_B = loss(*groups, kl=kl)
    settings = {"beta": 0.3, "desirable": 1.3, "undesirable": 0.7, "kl": kl if name == "kto" else 0.0}
    for found, *row in zip(found_B.tolist(), *(tensor_BK.tolist() for tensor_BK in groups[:3]), strict=True):
        costs = [python_loss(*one, **settings) for one in zip(*row, strict=True)]
        assert found == pytest.approx(sum(costs) / num_responses, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences_and_masked_responses_have_none(name):
    policy_BK, *rest = random_labelled(4, 3, seed=1)
    mask_BK = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]]).bool()
    policy_BK[~mask_BK], rest[1][~mask_BK] = math.nan, math.nan
    loss = preference_loss(name, beta=0.5)
    kept = policy_BK[mask_BK].requires_grad_()

    def loss_of(values):
        return loss(torch.zeros(4, 3, dtype=torch.float64).masked_scatter(mask_BK, values), *rest, mask_BK, kl=1.5)

    assert torch.autograd.gradcheck(loss_of, kept)
    policy_BK.requires_grad_()
    (gradient_BK,) = torch.autograd.grad(loss(policy_BK, *rest, mask_BK, kl=1.5).sum(), policy_BK)
    assert (gradient_BK[~mask_BK] == 0).all()
    assert ((gradient_BK[mask_BK] < 0) == (rest[1][mask_BK] > 0)).all()  # descent raises the desirable ones only


def test_the_loss_is_finite_at_extreme_log_ratios():
    ratios_BK = torch.tensor([[1e5], [-1e5], [1e5], [-1e5]], requires_grad=True)
    labels_BK = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    loss_B = preference_loss("kto", beta=1.0)(ratios_BK, ratios_BK.detach() * 0, labels_BK, labels_BK + 1, kl=3.0)
    assert loss_B.tolist() == [0, 1, 1, 0]
    assert torch.autograd.grad(loss_B.sum(), ratios_BK)[0].isfinite().all()


def test_kto_without_its_reference_point_is_an_error():
    groups = random_labelled(2, 1)
    with pytest.raises(InputError, match="needs kl, the reference point; apo_zero_unpaired is the loss without it"):
        preference_loss("kto")(*groups)
    assert preference_loss("apo_zero_unpaired")(*groups).equal(preference_loss("kto")(*groups, kl=0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"desirable_weight": 0}, "loss 'kto': desirable_weight must be a number above 0, not 0"),
        ({"beta": -1.0}, "loss 'kto': beta must be a number above 0, not -1.0"),
        ({"eta": 1.0}, "loss 'kto' has no setting 'eta'"),
        ({"uses_kl": False}, "loss 'kto' has no setting 'uses_kl'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError) as error:
        preference_loss("kto", **settings)
    assert message in str(error.value)


def test_labels_are_rewards_of_one_and_zero():
    assert lack_of_labels([1.0, 0.0, 0], "kto") is None
    assert "a reward is 0.5, and kto needs labels" in lack_of_labels([1.0, 0.5], "kto")
    assert "the row has no labels, and kto needs one for each response" in lack_of_labels(None, "kto")
