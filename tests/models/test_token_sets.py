"""Log-probabilities of sets of tokens against those from full logits, values and gradients."""

import pytest
import torch

from align.models.lm_head import logprobs
from align.models.lm_head.logprobs import LogitTransform
from align.models.lm_head.token_sets import set_logps, top_tokens

PLAIN, CAPPED = LogitTransform(), LogitTransform(scale=0.5, softcap=4.0)


@pytest.fixture(autouse=True, params=[1 << 20, 150], ids=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(logprobs, "TILE_CPU", request.param)
    monkeypatch.setattr(logprobs, "TILE_MULTIPLE", 8)
    monkeypatch.setattr(logprobs, "MAX_ROWS", 5)


def inputs(positions=7, width=6, vocabulary=53, *, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        for shape in ((positions, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (positions,), generator=draw)
    return [each.requires_grad_() for each in (hidden, weight, bias)], targets


def full(hidden, weight, bias, transform):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if transform.softcap:
        logits = torch.tanh(logits * transform.scale / transform.softcap) * transform.softcap
    return logits.log_softmax(dim=-1)


def expected(logps, targets, tokens):
    """Return the same from log-probabilities of the whole vocabulary: the rest is a sum over all other tokens."""
    others = torch.ones_like(logps, dtype=torch.bool).scatter(1, tokens, value=False)
    rest = torch.stack([row[mask].exp().sum().log() for row, mask in zip(logps, others, strict=True)])
    return torch.cat([logps.gather(1, targets[:, None]), logps.gather(1, tokens), rest[:, None]], dim=1)


@pytest.mark.parametrize("transform", [PLAIN, CAPPED])
@pytest.mark.parametrize("number", [1, 4, 52])
def test_values_and_gradients_are_those_of_full_logits(transform, number):
    leaves, targets = inputs()
    logps = full(*leaves, transform)
    tokens = torch.rand(7, 53, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :number]
    whole, found = expected(logps, targets, tokens), set_logps(*leaves, targets, tokens, transform)
    torch.testing.assert_close(found, whole)
    direction = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((each * direction).sum(), leaves) for each in (found, whole)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_pass_the_numerical_check():
    leaves, targets = inputs(positions=3, vocabulary=11)
    tokens = torch.tensor([[0, 10], [3, 4], [7, 2]])
    assert torch.autograd.gradcheck(lambda *given: set_logps(*given, targets, tokens, CAPPED), leaves)


def test_all_tokens_leave_no_rest_and_its_gradient_is_zero():
    leaves, targets = inputs()
    logps = full(*leaves, PLAIN)
    tokens = torch.arange(53).expand(7, 53)
    found = set_logps(*leaves, targets, tokens, PLAIN)
    assert found[:, -1].isneginf().all()
    torch.testing.assert_close(found[:, 1:-1], logps)
    (gradient,) = torch.autograd.grad(found[:, 1:].masked_fill(found[:, 1:].isneginf(), 0).sum(), leaves[:1])
    (by_hand,) = torch.autograd.grad(logps.sum(), leaves[:1])
    torch.testing.assert_close(gradient, by_hand)


def test_a_small_rest_keeps_its_precision_in_fp32():
    (hidden, weight, _), targets = inputs(dtype=torch.float32)
    sharp = hidden.detach() * 30  # the rest is far below the precision of 1 - sum(p)
    tokens = top_tokens(sharp, weight, None, 8, PLAIN)
    exact = expected(full(sharp.double(), weight.double(), None, PLAIN), targets, tokens)[:, -1]
    assert exact.max() < -9 and exact.min() < -20
    torch.testing.assert_close(
        set_logps(sharp, weight, None, targets, tokens, PLAIN)[:, -1].double(), exact, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("number", [1, 9, 53])
def test_top_tokens_are_the_most_likely_of_the_whole_vocabulary(number):
    (hidden, weight, bias), _ = inputs(positions=12)
    for transform in (PLAIN, CAPPED):
        logps = full(hidden, weight, bias, transform)
        assert torch.equal(top_tokens(hidden, weight, bias, number, transform), logps.topk(number, dim=1).indices)
