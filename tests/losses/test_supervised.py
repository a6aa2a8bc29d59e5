"""Reward model losses against arithmetic by hand."""

import math

import pytest
import torch

from align.losses.supervised import BRADLEY_TERRY, attribute_squared_error


def test_missing_labels_are_ignored():
    predicted_BA = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]], dtype=torch.float64, requires_grad=True)
    label_BA = torch.tensor([[3.0, math.nan, 2.5], [math.nan, 0.0, -100.0]], dtype=torch.float64)
    mask_BA = torch.tensor([[True, True, True], [True, True, False]])
    total_B, count_B = attribute_squared_error(predicted_BA, label_BA, mask_BA)
    assert total_B.tolist() == [4.25, 16]
    assert count_B.tolist() == [2, 1]
    total_B.sum().backward()
    assert predicted_BA.grad.tolist() == [[-4, 0, 1], [0, 8, 0]]
    unmasked_B, unmasked_count_B = attribute_squared_error(predicted_BA, label_BA)
    assert unmasked_B.tolist() == [4.25, 16 + 104**2]
    assert unmasked_count_B.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("form", "lead", "strength", "value"),
    [
        ("bt", 2, 3, 0.126928),
        ("bt_margin", 2, 3, 1.313262),
        ("bt_scaled", 2, 3, 0.380784),
        ("bt", -1, 2, 1.313262),
        ("bt_margin", -1, 2, 3.048587),
        ("bt_scaled", -1, 2, 2.626523),
    ],
)
def test_bradley_terry_has_hand_computed_values(form, lead, strength, value):
    loss_B = BRADLEY_TERRY[form](torch.tensor([float(lead)]), torch.tensor([float(strength)]))
    assert loss_B.tolist() == pytest.approx([value], abs=6e-7)


@pytest.mark.parametrize("form", BRADLEY_TERRY)
def test_bradley_terry_gradients_are_correct_and_finite_at_extremes(form):
    lead_B = torch.tensor([-1e4, -2.0, 0.0, 3.0, 1e4], dtype=torch.float64, requires_grad=True)
    strength_B = torch.tensor([3.0, 1.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    loss = BRADLEY_TERRY[form]
    assert torch.autograd.gradcheck(lambda lead: loss(lead, strength_B), lead_B, atol=1e-4)
    assert loss(lead_B.float(), strength_B.float()).isfinite().all()
