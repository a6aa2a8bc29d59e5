"""Stochastic rounding to bf16: unbiased, exact for bf16 numbers, and the same wherever and however it is computed."""

import pytest
import torch

from align.train.sharding.bf16 import stochastic_rounding
from align.train.sharding.bf16.stochastic_rounding import round_stochastically

NUM_DRAWS = 4000


def rounded(values, *place):
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(values, place, out=out)
    return out.float()


def values_of(number, seed=0, scale=1.0):
    return torch.randn(number, generator=torch.Generator().manual_seed(seed)) * scale


def neighbours(values):
    """The bf16 numbers next to each value, towards zero and away from it, in double precision."""
    exponent = values.double().abs().log2().floor()
    distance = 2.0 ** (exponent - 7)  # bf16 has eight significant bits
    towards = (values.double().abs() / distance).floor() * distance
    return towards * values.double().sign(), (towards + distance) * values.double().sign()


def test_the_mean_of_many_draws_is_the_value_within_its_standard_error():
    values = values_of(500)
    draws = torch.stack([rounded(values, 0, step, "w") for step in range(NUM_DRAWS)]).double()
    towards, away = neighbours(values)
    share = (values.double() - towards) / (away - towards)
    standard_error = (share * (1 - share) / NUM_DRAWS).sqrt() * (away - towards).abs()
    score = (draws.mean(0) - values.double()) / standard_error
    assert score.abs().max() < 4.5  # of 500 standard normal numbers, with probability 0.997
    assert score.square().mean() == pytest.approx(1, abs=0.25)  # the spread is that of independent draws
    assert ((draws == towards) | (draws == away)).all()


def test_draws_of_neighbouring_elements_and_steps_are_independent():
    half = torch.full((4096,), 1 + 2.0**-8)  # halfway between two bf16 numbers
    up = torch.stack([rounded(half, 0, step, "w") > 1 for step in range(64)]).double() - 0.5
    for shifted in (up[:, 1:] * up[:, :-1], up[1:] * up[:-1], up[1:, 1:] * up[:-1, :-1]):
        assert abs(shifted.mean() * 4) < 4.5 / shifted.numel() ** 0.5


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bf16_numbers_are_unchanged(scale):
    exact = values_of(1000, scale=scale).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    for values in (exact, special):
        out = rounded(values, 0, 1, "w")
        assert torch.equal(out.nan_to_num(7.0), values.nan_to_num(7.0))
        assert torch.equal(out.nan_to_num(7.0).signbit(), values.nan_to_num(7.0).signbit())


def test_draws_depend_on_seed_step_and_name_and_on_nothing_else(monkeypatch):
    values = values_of(5000).reshape(50, 100)
    expected = rounded(values, 3, 7, "w")
    torch.manual_seed(1)
    assert torch.equal(rounded(values, 3, 7, "w"), expected)
    monkeypatch.setattr(stochastic_rounding, "BLOCK", 77)
    assert torch.equal(rounded(values, 3, 7, "w"), expected)
    for place in ((4, 7, "w"), (3, 8, "w"), (3, 7, "v")):
        assert (rounded(values, *place) != expected).float().mean() > 0.2
