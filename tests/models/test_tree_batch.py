"""Tree, padded and transformers' own forward agree in values and in the gradient of every parameter."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    MORE_TREE,
    SEQUENCES,
    TREE,
    eager_copy,
    perturbed,
    random_sequences,
    stock_logps,
    tiny_model,
    token_sequences,
)

from align.data.token_groups import TokenSequence
from align.errors import InputError
from align.models.loading.origin import remove_randomness
from align.models.policy import Policy
from align.models.tree import attention
from align.models.tree.batch import count_tokens, count_work, plain_batch, tree_batch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
    ),
]
# Maximum error relative to a tensor's largest element. A gradient that is 0 in exact arithmetic (a key's bias) is
# compared with a hundredth of the model's largest gradient.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture
def nothing_rounded(monkeypatch):
    """Compute norms, softmax and rotary angles in fp64; transformers always computes them in fp32."""
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def weighted(logps_N):
    """Return a sum with another weight for each token, so that misplaced gradients are detected."""
    return (logps_N * torch.linspace(0.5, 1.5, len(logps_N), device=logps_N.device)).sum()


def values_and_gradients(model, logps_N):
    model.zero_grad()
    weighted(logps_N).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {"log-probabilities": logps_N.detach(), **gradients}


def run(policy, name, sequences):
    policy.use_forward(name)
    make = {"tree": tree_batch, "plain": plain_batch}[name]
    batch = make(sequences).to(next(policy.parameters()).device)
    return values_and_gradients(policy.hf, policy(batch))


def largest_errors(found, expected):
    """Return errors by name, relative to the largest element; None where only one has a gradient."""
    assert found.keys() == expected.keys()
    scale = max(value.abs().max() for value in expected.values())
    errors = {}
    for name, value in expected.items():
        size = max(value.abs().max(), 0.01 * scale)
        errors[name] = ((found[name] - value).abs().max() / size).item()
    return errors


def assert_same(found, expected, tolerance):
    wrong = {name: error for name, error in largest_errors(found, expected).items() if not error <= tolerance}
    assert not wrong, f"{len(wrong)} of {len(expected)} tensors differ: {wrong}"


def assert_three_agree(model, sequences):
    twin = eager_copy(model)
    tolerance = TOLERANCE[model.get_input_embeddings().weight.dtype]
    policy = Policy(model)
    expected = values_and_gradients(twin, stock_logps(twin, sequences))
    assert_same(run(policy, "tree", sequences), expected, tolerance)
    assert_same(run(policy, "plain", sequences), expected, tolerance)


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("kind", TREE)
def test_tree_and_padded_forward_equal_transformers(kind, sequences):
    assert_three_agree(tiny_model(*TREE[kind]), sequences)


@pytest.mark.parametrize(
    "sequences", ["shared response prefixes", "a prompt that several groups share", "13 responses"]
)
@pytest.mark.parametrize("kind", TREE)
def test_tree_and_padded_forward_equal_transformers_in_fp64(kind, sequences, nothing_rounded):
    assert_three_agree(tiny_model(*TREE[kind]).double(), SEQUENCES[sequences])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE_TREE)
def test_tree_and_padded_forward_equal_transformers_in_other_architectures(kind, nothing_rounded):
    assert_three_agree(tiny_model(*MORE_TREE[kind]).double(), SEQUENCES["13 responses"])


@pytest.mark.parametrize("kind", ["llama, grouped heads", "gpt2", "gemma2"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    sequences = SEQUENCES["13 responses"]
    model = tiny_model(*TREE[kind])
    remove_randomness(model.config)
    expected = run(Policy(eager_copy(model)), "tree", sequences)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model)
    policy.train()
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = attention.call_count()
    assert_same(run(policy, "tree", sequences), expected, TOLERANCE[torch.float32])
    assert attention.call_count() - before == 2 * model.config.num_hidden_layers, "each layer runs forward twice"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tree_and_padded_forward_equal_transformers_with_lora(checkpointing):
    sequences = SEQUENCES["a prompt that several groups share"]
    model = tiny_model("llama", {"attention_bias": True})
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    perturbed(adapted)
    base = eager_copy(adapted.get_base_model())  # contains the same adapters
    plain = values_and_gradients(base, stock_logps(base, sequences))
    expected = {name if name == "log-probabilities" else f"base_model.model.{name}": plain[name] for name in plain}
    policy = Policy(adapted)
    policy.train()
    for name in ("tree", "plain"):
        assert_same(run(policy, name, sequences), expected, TOLERANCE[torch.float32])
    assert len(expected) == 1 + 2 * 7 * 2, "two matrices for each of seven linear layers in two blocks"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama, grouped heads", "qwen3", "gpt2", "gemma2"])
def test_bf16_errors_of_the_tree_are_no_larger_than_padded(kind, device):
    model = tiny_model(*TREE[kind]).to(device)
    sequences = SEQUENCES["many"]
    policy = Policy(model)
    exact = run(policy, "plain", sequences)
    errors = {}
    for name in ("plain", "tree"):
        with torch.autocast(device, torch.bfloat16):
            errors[name] = largest_errors(run(policy, name, sequences), exact)
    for what in errors["plain"]:
        assert errors["tree"][what] <= 2 * errors["plain"][what] + 2**-8, what


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", TREE)
def test_tree_and_padded_forward_equal_transformers_on_a_gpu(kind):
    assert_three_agree(tiny_model(*TREE[kind]).cuda(), SEQUENCES["many"])


CASES = [*SEQUENCES.values(), *(random_sequences(seed, prompts=4, max_responses=13) for seed in range(40))]


def distinct_pairs(sequences):
    return {tuple(sequence.ids[: stop + 1]) for sequence in sequences for stop in range(len(sequence.ids))}


def prefixes_of_rows(batch):
    """Return the prefix of each row from tokens and depths: a row's parent is the last row of smaller depth."""
    path, found = [], []
    for token, depth in zip(batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), strict=True):
        path = [*path[:depth], token]
        assert len(path) == depth + 1
        found.append(tuple(path))
    return found


@pytest.mark.parametrize("sequences", CASES, ids=range(len(CASES)))
def test_every_distinct_prefix_is_computed_once(sequences):
    batch = tree_batch(sequences)
    rows = prefixes_of_rows(batch)
    assert set(rows) == distinct_pairs(sequences)
    assert len(rows) == len(set(rows)) == batch.num_tokens == batch.layout.num_rows == count_tokens(sequences)
    assert batch.work() == count_work(sequences)


@pytest.mark.parametrize("make", [tree_batch, plain_batch])
@pytest.mark.parametrize("sequences", CASES, ids=range(len(CASES)))
def test_a_target_is_predicted_from_the_row_before_it(sequences, make):
    batch = make(sequences)
    if batch.layout is not None:
        rows = prefixes_of_rows(batch)
    else:
        rows = [tuple(row[: at + 1]) for row in batch.input_ids.tolist() for at in range(len(row))]
    places = zip(batch.sequence_N.tolist(), batch.rows_N.tolist(), batch.targets_N.tolist(), strict=True)
    found = [(number, rows[row], target) for number, row, target in places]
    expected = [
        (number, tuple(sequence.ids[:at]), sequence.ids[at])
        for number, sequence in enumerate(sequences)
        for at in np.flatnonzero(sequence.loss_mask)
    ]
    assert found == expected
    assert batch.num_sequences == len(sequences)


@pytest.mark.parametrize("make", [tree_batch, plain_batch])
def test_a_first_token_cannot_be_in_the_loss(make):
    sequence = TokenSequence(np.array([5, 6, 7], np.int32), np.array([True, False, True]))
    with pytest.raises(InputError, match="the loss mask of a sequence holds its first token"):
        make([sequence])


@pytest.mark.parametrize("sequences", CASES, ids=range(len(CASES)))
def test_spans_know_their_ancestors_and_subtrees(sequences):
    batch = tree_batch(sequences)
    rows, layout = prefixes_of_rows(batch), batch.layout
    paths = layout.paths.kv_rows.split(layout.paths.cu_keys.diff().tolist())
    assert [row for span in layout.spans for row in range(span.start, span.stop)] == list(range(len(rows)))
    for span, path in zip(layout.spans, paths, strict=True):
        last = rows[span.stop - 1]
        assert [rows[row] for row in path] == [last[: depth + 1] for depth in range(len(last))]
        below = [row for row in range(len(rows)) if rows[row][: len(last)] == last and row >= span.stop]
        assert below == list(range(span.stop, span.subtree_stop))
        followers = {prefix for prefix in rows if prefix[:-1] == last}
        assert len(followers) != 1, "a path without a branch is one span"
    assert layout.max_depth == max(len(prefix) for prefix in rows)
    assert layout.paths.cu_queries.tolist() == [0, *(span.stop for span in layout.spans)]


def test_the_padded_batch_pads_right_and_does_not_count_padding():
    batch = plain_batch(token_sequences("ABC|D A|B"))
    assert batch.input_ids.tolist() == [[3, 4, 5, 6], [3, 4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.num_tokens == 6
