import math

import pytest
import torch

from align.losses.contrastive import sigmoid_losses


def test_each_element_is_the_binary_cross_entropy_of_one_pair():
    generator = torch.Generator().manual_seed(0)
    anchor, positive = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    found = sigmoid_losses(anchor, positive, 10.0, -3.0)
    for i in range(5):
        for j in range(5):
            cosine = sum(a * p for a, p in zip(anchor[i].tolist(), positive[j].tolist(), strict=True)) / (
                math.hypot(*anchor[i].tolist()) * math.hypot(*positive[j].tolist())
            )
            probability = 1 / (1 + math.exp(-(10 * cosine - 3)))
            expected = -math.log(probability if i == j else 1 - probability)
            assert found[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_the_loss_of_a_part_of_a_batch_is_a_part_of_the_matrix_and_its_gradient_is_right():
    generator = torch.Generator().manual_seed(1)
    anchor, positive = (
        torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    scale, bias = (torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (10.0, -10.0))
    part = torch.tensor([4, 1, 3])
    whole = sigmoid_losses(anchor, positive, scale, bias)
    torch.testing.assert_close(whole[part][:, part], sigmoid_losses(anchor[part], positive[part], scale, bias))
    assert torch.autograd.gradcheck(sigmoid_losses, (anchor, positive, scale, bias))
