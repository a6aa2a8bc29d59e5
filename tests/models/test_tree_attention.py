"""Attention over root paths: every kernel against a softmax per row, and unsupported features."""

import inspect
import math
from functools import partial

import pytest
import torch
from tiny_models import SEQUENCES, token_sequences
from torch.nn.attention.varlen import varlen_attn

from align.errors import InputError
from align.models.tree import attention
from align.models.tree.attention import tree_attention
from align.models.tree.batch import tree_batch
from align.models.tree.kernels import BlockAttention, dense_attention, span_attention, varlen_attention

HEADS = [(1, 1), (4, 4), (4, 2), (6, 1)]  # query heads, key heads
WIDTHS = [4, 7, 16]


def documented_varlen(  # noqa: PLR0913 - the signature is PyTorch's
    query_THD, key_TGD, value_TGD, cu_queries, cu_keys, max_queries, max_keys, *, scale, window_size, enable_gqa=True
):
    """Emulate `varlen_attn` as documented, and check what its CUDA kernel requires of its arguments.

    Grouped heads are allowed by default as in PyTorch 2.11, where the keyword does not exist.
    """
    assert query_THD.dim() == key_TGD.dim() == value_TGD.dim() == 3
    assert query_THD.dtype == key_TGD.dtype == value_TGD.dtype
    assert query_THD.is_contiguous() and key_TGD.is_contiguous() and value_TGD.is_contiguous()
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert len(cu_queries) == len(cu_keys)
    queries, keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    assert (type(max_queries), max_queries) == (int, max(queries))
    assert (type(max_keys), max_keys) == (int, max(keys))
    assert cu_queries[0] == cu_keys[0] == 0
    assert (cu_queries[-1], cu_keys[-1]) == (len(query_THD), len(key_TGD))
    assert window_size == (-1, 0), "causal, without a window"
    groups, rest = divmod(query_THD.shape[1], key_TGD.shape[1])
    assert rest == 0 and (enable_gqa or groups == 1)
    outputs = []
    blocks = zip(query_THD.split(queries), key_TGD.split(keys), value_TGD.split(keys), strict=True)
    for query, key, value in blocks:
        for at in range(len(query)):
            seen = len(key) - len(query) + at + 1  # the last query is aligned with the last key
            for head in range(query.shape[1]):
                weights = (key[:seen, head // groups] @ query[at, head] * scale).float().softmax(dim=0)
                outputs.append(weights.to(value.dtype) @ value[:seen, head // groups])
    return torch.stack(outputs).view(len(query_THD), query_THD.shape[1], -1)


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
KERNELS = [
    pytest.param(documented_varlen, "cpu", torch.float32, 1e-5, id="documented fp32"),
    pytest.param(documented_varlen, "cpu", torch.bfloat16, 0.02, id="documented bf16"),
    pytest.param(varlen_attn, "cuda", torch.bfloat16, 0.02, id="CUDA bf16", marks=ON_GPU),
    pytest.param(varlen_attn, "cuda", torch.float16, 0.003, id="CUDA fp16", marks=ON_GPU),
]


def row_by_row(query, key, value, batch, scale, softcap=None):
    """Compute a softmax per row over its root path, [1, H, T, D] in fp64."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    path, outputs = [], []
    for row, depth in enumerate(batch.position_ids[0].tolist()):
        path = [*path[:depth], row]
        heads = []
        for head in range(query.shape[1]):
            scores = key[0, head // groups, path] @ query[0, head, row] * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() / scores.exp().sum()
            heads.append(weights @ value[0, head // groups, path])
        outputs.append(torch.stack(heads))
    return torch.stack(outputs, dim=1)[None]


def random_heads(heads, width, num_rows, *, dtype=torch.float32, device="cpu", value_width=None):
    generator = torch.Generator().manual_seed(num_rows)
    shapes = [(heads[0], width), (heads[1], width), (heads[1], value_width or width)]
    drawn = [torch.randn(1, num, num_rows, size, generator=generator) * 1.5 for num, size in shapes]
    return [each.to(device, dtype).requires_grad_() for each in drawn]


def with_gradients(function, inputs, *rest):
    """Return output and input gradients in fp64, for a fixed gradient of the output."""
    output = function(*inputs, *rest)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator).to(output)
    gradients = torch.autograd.grad(output, inputs, upstream)
    return [each.detach().double() for each in (output, *gradients)]


def largest_errors(found, expected):
    return [((one - other).abs().max() / other.abs().max()).item() for one, other in zip(found, expected, strict=True)]


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_block_and_matrix_attention_equal_a_softmax_per_row(sequences, dtype, tolerance):
    batch = tree_batch(sequences)
    num_cases = 0
    for heads, width in [(heads, width) for heads in HEADS for width in WIDTHS][:: 3 if len(sequences) > 9 else 1]:
        inputs = random_heads(heads, width, batch.num_tokens, dtype=dtype)
        scale = width**-0.5
        expected = with_gradients(row_by_row, inputs, batch, scale)
        blocks = with_gradients(BlockAttention.apply, inputs, batch.layout, scale)
        matrices = with_gradients(span_attention, inputs, batch.layout, scale, None)
        one_matrix = with_gradients(dense_attention, inputs, batch.layout, scale, None)
        for found in (blocks, matrices, one_matrix):
            assert max(largest_errors(found, expected)) <= tolerance
        num_cases += 1
    assert num_cases >= 4


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_soft_capping_and_narrow_values_equal_a_softmax_per_row(softcap):
    batch = tree_batch(SEQUENCES["shared response prefixes"])
    inputs = random_heads((4, 2), 8, batch.num_tokens, dtype=torch.float64, value_width=5)
    expected = with_gradients(row_by_row, inputs, batch, 8**-0.5, softcap)
    registered = partial(tree_attention, torch.nn.Module(), attention_mask=None, tree=batch.layout, softcap=softcap)
    found = with_gradients(lambda *heads: registered(*heads)[0].transpose(1, 2), inputs)
    one_matrix = with_gradients(dense_attention, inputs, batch.layout, 8**-0.5, softcap)
    assert max(largest_errors(found, expected) + largest_errors(one_matrix, expected)) <= 1e-10


@pytest.mark.parametrize("matrices", [dense_attention, span_attention])
def test_no_scores_are_kept_for_the_backward_pass(matrices):
    """The memory of a step is predicted without them; what is kept has the size of a query, key or value."""
    batch = tree_batch(token_sequences(9 * "ABCDE" + "|" + 9 * "FGHIJ"))
    inputs = random_heads((4, 2), 8, batch.num_tokens, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        output = matrices(*inputs, batch.layout, 8**-0.5, 20.0)
    assert kept and max(each.numel() for each in kept if each.is_floating_point()) <= 4 * 90 * 8 < 4 * 90 * 90
    output.sum().backward()


@pytest.mark.parametrize(("below", "way"), [(0, "dense_attention"), (1, "span_attention")])
def test_off_the_cpu_only_small_layouts_use_one_dense_matrix(monkeypatch, below, way):
    batch = tree_batch(SEQUENCES["13 responses"])
    heads = [each.to("meta") for each in random_heads((4, 2), 8, batch.num_tokens)]
    monkeypatch.setattr(attention, "_kernel_input", lambda each: each)  # torch has no autocast on `meta`
    taken = []
    for name in ("dense_attention", "span_attention"):
        made = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *given, name=name, made=made: taken.append(name) or made(*given))
    rows = batch.num_tokens
    monkeypatch.setattr(attention, "DENSE_SCORES", 4 * rows**2 - below)
    layout = batch.layout.to(torch.device("meta"))
    found, _ = tree_attention(torch.nn.Module(), *heads, None, tree=layout)
    assert (taken, found.shape) == ([way], (1, rows, 4, 8))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("sequences", ["13 responses", "nothing shared", "duplicates", "shared response prefixes"])
@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance"), KERNELS)
def test_variable_length_attention_equals_a_softmax_per_row(  # noqa: PLR0913 - a table's columns
    kernel, device, dtype, tolerance, sequences, heads
):
    batch = tree_batch(SEQUENCES[sequences])
    layout = batch.layout.to(torch.device(device))
    inputs = random_heads(heads, 16, batch.num_tokens, dtype=dtype, device=device)
    found = with_gradients(varlen_attention, inputs, layout, 0.25, kernel)
    expected = with_gradients(lambda *heads: row_by_row(*heads, batch, 0.25).transpose(1, 2), inputs)
    assert max(largest_errors(found, expected)) <= tolerance


def test_the_arguments_match_the_installed_kernel():
    batch = tree_batch(SEQUENCES["a pair"])
    signature = inspect.signature(varlen_attn)

    def bound(*arguments, **keywords):
        signature.bind(*arguments, **keywords)
        return documented_varlen(*arguments, **keywords)

    varlen_attention(*random_heads((4, 2), 16, batch.num_tokens), batch.layout, 0.25, bound)


@pytest.mark.parametrize("sequences", ["13 responses", "many"])
def test_block_attention_in_bf16_is_as_exact_as_dense_attention(sequences):
    batch = tree_batch(SEQUENCES[sequences])
    inputs = random_heads((4, 2), 16, batch.num_tokens, dtype=torch.bfloat16)
    seen, path = torch.zeros(batch.num_tokens, batch.num_tokens, dtype=torch.bool), []
    for row, depth in enumerate(batch.position_ids[0].tolist()):
        path = [*path[:depth], row]
        seen[row, path] = True
    dense = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=seen, scale=0.25, enable_gqa=True)
    expected = with_gradients(row_by_row, inputs, batch, 0.25)
    of_dense = largest_errors(with_gradients(dense, inputs), expected)
    of_blocks = largest_errors(with_gradients(BlockAttention.apply, inputs, batch.layout, 0.25), expected)
    assert all(one <= 2 * other for one, other in zip(of_blocks, of_dense, strict=True)), (of_blocks, of_dense)


def test_widely_spread_scores_stay_exact():
    batch = tree_batch(SEQUENCES["shared response prefixes"])
    query, key, value = random_heads((2, 2), 8, batch.num_tokens, dtype=torch.float64)
    inputs = [(30 * query).detach().requires_grad_(), key, value]
    expected = with_gradients(row_by_row, inputs, batch, 1.0)
    assert max(largest_errors(with_gradients(BlockAttention.apply, inputs, batch.layout, 1.0), expected)) <= 1e-10


def attend(mask=None, **keywords):
    batch = tree_batch(SEQUENCES["a pair"])
    query, key, value = random_heads((4, 2), 8, batch.num_tokens)
    return tree_attention(torch.nn.Linear(1, 1), query, key, value, mask, tree=batch.layout, **keywords)


# The longest sequence of "a pair" has 12 tokens.
UNSUPPORTED = {
    "dropout (0.1)": {"dropout": 0.1},
    "sliding window of 11 tokens": {"sliding_window": 11},
    "an attention mask": {"mask": torch.ones(1)},
    "attention with s_aux": {"s_aux": torch.zeros(4)},
    "attention with position_bias": {"position_bias": torch.zeros(1)},
    "attention with unknown_keyword": {"unknown_keyword": False},
    "not causal": {"is_causal": False},
}


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_unsupported_features_are_rejected_by_name(words):
    with pytest.raises(InputError, match="Linear") as error:
        attend(**UNSUPPORTED[words])
    assert words in str(error.value)
    assert "policy.forward" in str(error.value)


IGNORED = [
    {"dropout": 0.0},
    {"sliding_window": 12},
    {"sliding_window": None, "softcap": None, "s_aux": None},
    {"is_causal": True, "use_cache": False, "position_ids": torch.zeros(1), "output_attentions": False},
]


@pytest.mark.parametrize("keywords", IGNORED, ids=[" ".join(each) for each in IGNORED])
def test_keywords_without_effect_are_accepted(keywords):
    assert torch.equal(attend(**keywords)[0], attend()[0])


def test_a_missing_layout_is_an_error_that_names_the_setting():
    query, key, value = random_heads((1, 1), 8, 3)
    with pytest.raises(InputError, match="policy.forward: Linear does not pass .* use 'plain'"):
        tree_attention(torch.nn.Linear(1, 1), query, key, value, None)


def test_the_default_scale_is_that_of_the_head_width():
    assert torch.equal(attend()[0], attend(scaling=1 / math.sqrt(8))[0])
    assert not torch.equal(attend()[0], attend(scaling=0.5)[0])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_strided_heads_are_supported(which):
    batch = tree_batch(SEQUENCES["a pair"])
    inputs = random_heads((4, 2), 8, batch.num_tokens)
    expected = tree_attention(torch.nn.Module(), *inputs, None, tree=batch.layout)[0]
    inputs[which] = inputs[which].transpose(2, 3).contiguous().transpose(2, 3)
    assert inputs[which].stride(-1) != 1
    torch.testing.assert_close(tree_attention(torch.nn.Module(), *inputs, None, tree=batch.layout)[0], expected)


def test_autocast_casts_fp32_queries_to_the_dtype_of_values():
    batch = tree_batch(SEQUENCES["a pair"])
    query, key, value = random_heads((4, 2), 8, batch.num_tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = tree_attention(torch.nn.Module(), query, key, value.bfloat16(), None, tree=batch.layout)
    assert found.dtype == torch.bfloat16
    expected = row_by_row(query, key, value, batch, 8**-0.5).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.03)
