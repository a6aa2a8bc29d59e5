"""Tiled log-probabilities against dense ones: values, gradients, rounding and memory."""

import math

import pytest
import torch
from tiny_models import random_sequences, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from align.models.lm_head import logprobs
from align.models.lm_head.logprobs import LogitTransform, token_logps, token_logps_and_collisions
from align.models.policy import Policy
from align.models.tree.batch import tree_batch

TRANSFORMS = {
    "identity": LogitTransform(),
    "scaled": LogitTransform(scale=0.25),
    "soft-capped": LogitTransform(softcap=3.0),
    "both": LogitTransform(scale=1.7, softcap=5.0),
}
SHAPES = [(1, 4, 7), (5, 8, 33), (24, 16, 100)]  # positions, width, vocabulary
TILES = [(1 << 20, 8192), (64, 8192), (64, 4), (1, 3)]  # elements of a tile, rows of a block


@pytest.fixture(params=TILES, ids=[f"{elements} in a tile of {rows} rows" for elements, rows in TILES])
def tiles(request, monkeypatch):
    monkeypatch.setattr(logprobs, "TILE_CPU", request.param[0])
    monkeypatch.setattr(logprobs, "MAX_ROWS", request.param[1])


def drawn(num_positions, width, num_tokens, *, dtype=torch.float64, spread=1.0, sure=0.0):
    """Return hidden states, weight, bias and targets; `sure` moves a hidden state towards its target."""
    generator = torch.Generator().manual_seed(num_tokens)
    targets = torch.randint(num_tokens, (num_positions,), generator=generator)
    weight = spread * torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(num_positions, width, generator=generator, dtype=torch.float64) + sure * weight[targets]
    bias = spread * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    return [*(each.to(dtype).requires_grad_() for each in (hidden, weight, bias)), targets]


def dense(hidden, weight, bias, targets, transform):
    """Compute all logits at once, as a model with an LM head and a loss in fp32 does."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * transform.scale
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if transform.softcap:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(dim=-1)[torch.arange(len(targets)), targets]


def with_gradients(function, inputs, transform):
    """Return log-probabilities and the gradients of hidden states, weight and bias, in fp64."""
    logps = function(*inputs, transform)
    wanted = [each for each in inputs[:3] if each is not None]
    gradients = torch.autograd.grad(logps, wanted, torch.linspace(0.5, 2, len(logps), dtype=logps.dtype))
    return [each.detach().double() for each in (logps, *gradients)]


def largest_errors(found, expected):
    return [(one - other).abs().max().item() for one, other in zip(found, expected, strict=True)]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_tiled_logps_and_gradients_equal_dense_ones(shape, with_bias, transform, tiles):
    inputs = drawn(*shape)
    if not with_bias:
        inputs[2] = None
    found, expected = (with_gradients(function, inputs, transform) for function in (token_logps, dense))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_collisions_are_the_log_probability_that_two_samples_are_equal(shape, transform, tiles):
    inputs = drawn(*shape)
    found = with_gradients(lambda *given: token_logps_and_collisions(*given)[0], inputs, transform)
    for one, other in zip(found, with_gradients(token_logps, inputs, transform), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    _, collision_N = token_logps_and_collisions(*inputs, transform)
    hidden, weight, bias, _ = inputs
    p_NV = torch.nn.functional.linear(hidden, weight, bias)
    p_NV = transform.forward(p_NV.detach().clone()).softmax(dim=-1)
    torch.testing.assert_close(collision_N, p_NV.square().sum(dim=-1).log(), rtol=1e-10, atol=1e-11)
    assert not collision_N.requires_grad


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients_are_those_of_finite_differences(transform, monkeypatch):
    monkeypatch.setattr(logprobs, "TILE_CPU", 8)
    monkeypatch.setattr(logprobs, "MAX_ROWS", 2)
    hidden, weight, bias, targets = drawn(3, 4, 10)
    assert torch.autograd.gradcheck(lambda *inputs: token_logps(*inputs, targets, transform), (hidden, weight, bias))


class ProductCounter(TorchDispatchMode):
    """Count matrix products."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_tiles_save_products_and_change_no_bit(dtype, transform, monkeypatch):
    monkeypatch.setattr(logprobs, "TILE_CPU", 4 * 64)
    monkeypatch.setattr(logprobs, "MAX_ROWS", 4)
    inputs = drawn(12, 16, 200, dtype=dtype)
    num_tiles, found, counted = 3 * 4, [], []  # of 4 rows and 64 columns; the last ones of a block have 8
    for kept in (0, 5 * 4 * 64 - 1, 1 << 20):
        monkeypatch.setattr(logprobs, "KEPT_CPU", kept)
        with ProductCounter() as products:
            found.append(with_gradients(token_logps, inputs, transform))
        counted.append(products.number)
    assert all(torch.equal(one, other) for run in found[1:] for one, other in zip(run, found[0], strict=True))
    # The fourth tile is small, so five fit in a little less than five whole ones
    saved = [0, 5, num_tiles] if not transform.softcap else [0, 0, 0]
    assert counted == [4 * num_tiles - each for each in saved]


def test_a_pass_without_gradients_keeps_no_tile():
    inputs, kept = drawn(5, 8, 33), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda each: each
    ):
        token_logps(*inputs, LogitTransform())
        assert (5, 33) in kept
        kept.clear()
        with torch.no_grad():
            token_logps(*inputs, LogitTransform())
    assert kept == []


@pytest.mark.parametrize("sure", [0.0, 1.0, 3.0], ids=["unsure", "sure", "very sure"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_rounding_costs_no_more_than_in_dense_computation(dtype, tiny, transform, sure, monkeypatch):
    monkeypatch.setattr(logprobs, "TILE_CPU", 64 * 100)
    inputs = drawn(64, 32, 301, dtype=dtype, spread=0.4, sure=sure)
    exact = [each.detach().double().requires_grad_() for each in inputs[:3]]
    expected = with_gradients(dense, [*exact, inputs[3]], transform)
    chunked = largest_errors(with_gradients(token_logps, inputs, transform), expected)
    at_once = largest_errors(with_gradients(dense, inputs, transform), expected)
    for one, other, value in zip(chunked, at_once, expected, strict=True):
        assert one <= 2 * other + tiny * value.abs().max()


def test_log_probabilities_are_never_positive_in_bf16(monkeypatch):
    monkeypatch.setattr(logprobs, "TILE_CPU", 64 * 100)
    inputs = drawn(64, 32, 301, dtype=torch.bfloat16, spread=0.4, sure=20.0)
    assert token_logps(*inputs, LogitTransform()).max() <= 0


def test_autocast_applies_to_forward_and_backward():
    inputs = drawn(16, 8, 100, dtype=torch.float32)
    expected = with_gradients(lambda hidden, *rest: token_logps(hidden.bfloat16(), *rest), inputs, LogitTransform())
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(*inputs, LogitTransform())
    gradients = torch.autograd.grad(logps, inputs[:3], torch.linspace(0.5, 2, len(logps)))
    assert logps.dtype == torch.float32
    for one, other in zip([logps, *gradients], expected, strict=True):
        assert torch.equal(one.double(), other)


def test_logits_of_ten_thousand_stay_finite(tiles):
    weight = torch.tensor([[1e4], [-1e4], [0.0], [9.99e3]], requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0], [1.0], [1.0]], requires_grad=True)
    logps = token_logps(hidden, weight, None, torch.tensor([0, 1, 1, 3]), LogitTransform())
    tail = math.log1p(math.exp(-10))
    spacing = 2**-10  # of fp32 numbers near 1e4
    torch.testing.assert_close(logps, torch.tensor([-tail, 0.0, -2e4 - tail, -10 - tail]), rtol=0, atol=spacing)
    logps.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_frozen_inputs_get_no_gradient_and_do_not_change_other_gradients(frozen):
    inputs = drawn(5, 4, 30)
    expected = with_gradients(token_logps, inputs, LogitTransform())[1:]
    given = [each.detach().requires_grad_(at not in frozen) for at, each in enumerate(inputs[:3])]
    logps = token_logps(*given, inputs[3], LogitTransform())
    logps.backward(torch.linspace(0.5, 2, len(logps), dtype=logps.dtype))
    for at, each in enumerate(given):
        if at in frozen:
            assert each.grad is None
        else:
            torch.testing.assert_close(each.grad, expected[at])


def test_an_empty_batch_of_targets_works():
    hidden, weight, bias, _ = drawn(1, 4, 30)
    none = hidden.new_empty(0, 4).requires_grad_()
    logps = token_logps(none, weight, bias, torch.empty(0, dtype=torch.int64), LogitTransform())
    logps.sum().backward()
    assert logps.shape == (0,)
    assert not weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Record the size of the largest tensor that any operation returned, backward passes included."""

    elements, operations = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        self.operations += 1
        return result


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("freeze_weight", [False, True])
def test_no_tensor_is_larger_than_a_tile(transform, freeze_weight, monkeypatch):
    monkeypatch.setattr(logprobs, "TILE_CPU", 1 << 15)
    num_positions, width, num_tokens = 512, 4, 4096
    hidden, weight, bias, targets = drawn(num_positions, width, num_tokens, dtype=torch.float32)
    weight.requires_grad_(not freeze_weight)
    with LargestTensor() as made:
        token_logps(hidden, weight, bias, targets, transform).sum().backward()
    forward_and_backward = 2 * num_tokens * num_positions // logprobs.TILE_CPU
    assert made.operations > 4 * forward_and_backward, "the mode saw both passes"
    assert made.elements <= logprobs.TILE_CPU < num_positions * num_tokens / 50


def test_a_policy_never_materializes_all_logits(monkeypatch):
    monkeypatch.setattr(logprobs, "TILE_CPU", 1 << 15)
    policy = Policy(tiny_model("llama", {"vocab_size": 4001}))
    policy.use_forward("tree")
    batch = tree_batch(random_sequences(0, prompts=8, max_responses=13, alphabet=50))
    assert len(batch.targets_N) > 64
    with LargestTensor() as made:
        policy(batch).sum().backward()
    weight = policy.base.get_output_embeddings().weight.numel()
    assert made.elements == weight, "the weight's gradient is the largest"
    assert made.elements < batch.num_tokens * 4001 / 2
