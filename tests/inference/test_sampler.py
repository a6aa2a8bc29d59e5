"""Sampling of tokens: distributions, and independence of rows."""

import math

import numpy as np
import pytest
import torch
from frequencies import are_drawn_from, shares_by_definition

from align.errors import RunError
from align.inference.sampler import NUM_LIKELY, sample_tokens, uniform_numbers

NUM_DRAWS = 20_000


def drawn(logits, temperature, top_p):
    numbers = [number for seed in range(NUM_DRAWS // 100) for number in uniform_numbers(seed, 100)]
    return sample_tokens(logits.expand(NUM_DRAWS, -1), numbers, temperature=temperature, top_p=top_p)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
def test_token_frequencies_match_temperature_and_top_p(temperature, top_p):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1))
    tokens = drawn(logits, temperature, top_p)
    assert are_drawn_from(tokens, shares_by_definition(logits, temperature, top_p))
    assert not are_drawn_from(tokens, shares_by_definition(logits, 1.15 * temperature, top_p))


def test_a_flat_distribution_uses_the_whole_vocabulary():
    vocabulary = 4 * NUM_LIKELY
    logits = 0.1 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    tokens = drawn(logits, 1.0, 0.9)
    assert len(set(tokens)) > NUM_LIKELY
    assert are_drawn_from(tokens, shares_by_definition(logits, 1.0, 0.9))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_token_of_a_row_does_not_depend_on_other_rows(top_p):
    generator = torch.Generator().manual_seed(2)
    flat_and_sharp = torch.tensor([0.1, 4.0] * 8)[:, None]
    logits = flat_and_sharp * torch.randn(16, 3 * NUM_LIKELY, generator=generator)
    numbers = torch.rand(16, generator=generator).tolist()
    together = sample_tokens(logits, numbers, temperature=1.0, top_p=top_p)
    alone = [
        sample_tokens(logits[row : row + 1], numbers[row : row + 1], temperature=1.0, top_p=top_p)[0]
        for row in range(16)
    ]
    assert together == alone
    assert sample_tokens(logits.flip(0), numbers[::-1], temperature=1.0, top_p=top_p) == together[::-1]


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    assert sample_tokens(logits, [0.99] * 5, temperature=0, top_p=1.0) == [
        int(np.argmax(row)) for row in logits.numpy()
    ]


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_tokens_of_probability_zero_are_never_sampled(number, top_p):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    assert sample_tokens(logits, [number], temperature=1.0, top_p=top_p)[0] in (1, 3)


def test_non_finite_logits_raise_a_run_error():
    for temperature in (0, 1.0):
        with pytest.raises(RunError, match="not finite"):
            sample_tokens(torch.tensor([[1.0, torch.nan]]), [0.5], temperature=temperature, top_p=1.0)


def test_a_larger_count_extends_the_numbers_and_seeds_differ():
    assert uniform_numbers(7, 100)[:10] == uniform_numbers(7, 10)
    assert not set(uniform_numbers(7, 100)) & set(uniform_numbers(8, 100))
    many = np.array(uniform_numbers(7, 100_000))
    assert many.min() >= 0
    assert many.max() < 1
    shares = np.histogram(many, bins=20, range=(0, 1))[0] / len(many)
    np.testing.assert_allclose(shares, 0.05, atol=5 * math.sqrt(0.05 * 0.95 / len(many)))


def test_a_single_row_samples_the_same_token_on_two_threads():
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        borders = 0
        for _ in range(12):
            logits_BV = torch.randn(8, 49152, generator=generator) * 4
            for row, one in enumerate(logits_BV):
                top = one.topk(40).values
                sums = [
                    (top - total).exp().cumsum(-1) for total in (one[None].logsumexp(-1), logits_BV.logsumexp(-1)[row])
                ]
                for top_p in (
                    {value for each in sums for value in each.tolist() if value < 1}
                    if not sums[0].equal(sums[1])
                    else ()
                ):
                    borders += 1
                    alone = sample_tokens(one[None], [0.9999999], temperature=1.0, top_p=top_p)
                    assert (
                        alone == sample_tokens(logits_BV, [0.9999999] * 8, temperature=1.0, top_p=top_p)[row : row + 1]
                    )
        if not borders:
            pytest.skip("this machine adds up a row alone as it does beside others")
    finally:
        torch.set_num_threads(before)
