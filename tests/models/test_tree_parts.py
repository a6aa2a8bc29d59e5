"""A tree in parts against the same tree at once and against transformers: values, gradients, rows and memory."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_tree_attention import documented_varlen, row_by_row
from tiny_models import (
    MORE_TREE,
    SEQUENCES,
    TREE,
    perturbed,
    stock_logps,
    tiny_model,
    token_sequences,
)
from transformers import AutoConfig, AutoModelForSequenceClassification

from align.errors import InputError
from align.models.policy import Policy
from align.models.reward_model import RewardModel
from align.models.settings import Rating
from align.models.tree import attention
from align.models.tree.batch import count_tokens, tree_batch
from align.models.tree.kernels import BlockAttention, dense_attention, span_attention, varlen_attention
from align.models.tree.parts import cut_batch, rows_held

# 64 responses of 3 to 18 tokens to a prompt of 8: 4 first tokens, 16 second ones after each
LARGE = token_sequences(
    " ".join(f"ABCDEFGH|{first}{chr(65 + at)}XYZXYZXYZXYZXYZXYZ"[: 12 + at] for first in "ABCD" for at in range(16))
)


def as_tree(kind, settings=None, *, dtype=torch.float64):
    made = Policy(tiny_model(kind, settings).to(dtype)).eval()
    made.use_forward("tree")
    return made


def weighted(outputs):
    """A sum whose gradient differs from output to output."""
    weights = torch.linspace(-1, 1.5, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
    return (outputs * weights).sum()


def outputs_and_gradients(model, batch, max_rows):
    model.max_rows = max_rows
    model.zero_grad()
    outputs = model(batch)
    weighted(outputs).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return outputs.detach(), gradients


def check_equal(found, expected, tolerance=2e-6):
    """Compare to within a tolerance in the unit of each value, or of its largest one if that is above 1.

    Models compute their norms in fp32 whatever their weights are; a wrong mask causes errors above 1e-2.
    """
    assert found[1].keys() == expected[1].keys()
    for name, value in {"outputs": expected[0], **expected[1]}.items():
        other = found[0] if name == "outputs" else found[1][name]
        assert (other - value).abs().max() <= tolerance * max(1, value.abs().max()), name


@pytest.mark.parametrize("name", [*TREE, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_TREE)])
def test_parts_equal_the_tree_at_once_and_transformers(name):
    model = as_tree(*(TREE | MORE_TREE)[name])
    sequences = SEQUENCES["shared response prefixes"] + token_sequences("ABC|DEFGHIJ ABC|ZY")
    batch = tree_batch(sequences)
    expected = outputs_and_gradients(model, batch, None)
    for max_rows in (1, 6, 12):
        assert len(cut_batch(batch, max_rows)) > 2
        check_equal(outputs_and_gradients(model, batch, max_rows), expected)
    model.use_forward("plain")
    torch.testing.assert_close(expected[0], stock_logps(model.hf, sequences).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_any_tree_can_be_cut(sequences):
    model, batch = as_tree("llama"), tree_batch(sequences)
    expected = outputs_and_gradients(model, batch, None)
    num_cut = 0
    for max_rows in {1 if batch.num_tokens < 40 else 30, batch.num_tokens // 2, batch.num_tokens - 1}:
        parts = cut_batch(batch, max_rows)
        assert not parts or sum(part.batch.num_tokens for part in parts) == batch.num_tokens
        num_cut += bool(parts)
        check_equal(outputs_and_gradients(model, batch, max_rows), expected)
    leaves = [span for span in batch.layout.spans if span.subtree_stop == span.stop]
    assert num_cut >= min(2, len(leaves) - 1)


def rows_run(model, batch, *, max_rows):
    """Return the rows of each forward pass of the decoder, in order, without and with gradients."""
    rows, embedding = [], model.base.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model.max_rows = max_rows
    with torch.no_grad():
        model(batch)
    without, rows[:] = [*rows], []
    weighted(model(batch)).backward()
    hook.remove()
    return without, rows


@pytest.mark.parametrize("max_rows", [40, 100])
def test_a_large_group_computes_each_distinct_prefix_once(max_rows):
    assert len(LARGE) == 64
    distinct = {tuple(sequence.ids[: at + 1]) for sequence in LARGE for at in range(len(sequence.ids))}
    model, batch = as_tree("llama", {"max_position_embeddings": 128}), tree_batch(LARGE)
    without, rows = rows_run(model, batch, max_rows=max_rows)
    assert sum(without) == len(distinct) == count_tokens(LARGE) == batch.work().tokens > 3 * max_rows
    shared = 8 + 4  # the prompt and the first tokens
    assert rows_held(batch, max_rows) == shared + max(without[1:])
    assert without[0] == shared and max(without[1:]) <= max(max_rows - shared, max_rows // 2)
    assert rows == [*without, *without[-2:0:-1]]  # parts but the last one again, in backward order; shared rows once
    check_equal(outputs_and_gradients(model, batch, max_rows), outputs_and_gradients(model, batch, None))


def test_without_shared_rows_only_the_last_part_keeps_its_activations():
    model, batch = as_tree("llama"), tree_batch(token_sequences("ABC|DEFG HIJ|KLMN OPQ|RSTU"))
    without, rows = rows_run(model, batch, max_rows=7)
    assert without == [7, 7, 7] and rows == [*without, 7, 7]
    check_equal(outputs_and_gradients(model, batch, 7), outputs_and_gradients(model, batch, None))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_gradient_checkpointing_recomputes_the_layers_of_parts(kind):
    model, batch = as_tree(*TREE[kind]), tree_batch(LARGE[:20])
    expected = outputs_and_gradients(model, batch, None)
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    calls = attention.call_count()
    check_equal(outputs_and_gradients(model, batch, 40), expected)
    passes = len(cut_batch(batch, 40))
    layers = model.base.config.num_hidden_layers
    assert attention.call_count() - calls == layers * (2 + 3 * (passes - 2) + 2)


def test_adapter_dropout_has_the_same_masks_in_parts():
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    model = Policy(perturbed(get_peft_model(tiny_model("llama"), config)).double()).train()
    model.use_forward("tree")
    batch = tree_batch(LARGE[:20])
    with model.dropout.active(7, 3):
        expected = outputs_and_gradients(model, batch, None)
        check_equal(outputs_and_gradients(model, batch, 40), expected)
    with model.dropout.active(7, 4):
        assert (outputs_and_gradients(model, batch, 40)[0] - expected[0]).abs().max() > 1e-2


def test_reward_models_and_collisions_run_in_parts():
    values = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 61, "num_labels": 3}
    config = AutoConfig.for_model("llama", num_attention_heads=4, pad_token_id=0, **values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    model = RewardModel(hf, Rating(("a", "b", "c"), (1.0, 1.0, 1.0)))
    model.use_forward("tree")
    sequences = [*SEQUENCES["a prefix of another"], *LARGE[:20]]
    batch = tree_batch(sequences)
    expected = outputs_and_gradients(model, batch, None)
    assert expected[0].shape == (len(sequences), 3)
    check_equal(outputs_and_gradients(model, batch, 20), expected)
    policy = as_tree("llama")
    at_once = policy(batch, collisions=True)
    policy.max_rows = 20
    assert at_once.shape == (2, len(batch.targets_N))
    torch.testing.assert_close(policy(batch, collisions=True), at_once, rtol=0, atol=2e-6)


def test_parts_in_bf16_are_as_exact_as_the_tree_at_once():
    model, batch = as_tree("llama", dtype=torch.float32), tree_batch(LARGE)
    exact = outputs_and_gradients(model, batch, None)

    def errors(max_rows):
        with torch.autocast("cpu", torch.bfloat16):
            found = outputs_and_gradients(model, batch, max_rows)
        flat = [torch.cat([each[0], *(value.flatten() for value in each[1].values())]) for each in (found, exact)]
        return (flat[0] - flat[1]).square().mean().sqrt().item()

    assert len(cut_batch(batch, 40)) > 10
    assert errors(40) <= 1.2 * errors(None)


def test_nothing_of_a_step_stays_in_memory():
    model, batch = as_tree("llama"), tree_batch(LARGE[:20])
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.max_rows = 40
    kept = []
    model.base.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: kept.append(weakref.ref(output))
    )
    gc.disable()
    try:
        weighted(model(batch)).backward()
        assert len(kept) > 3 and all(each() is None for each in kept)
    finally:
        gc.enable()


def test_a_module_that_runs_twice_is_an_error():
    model = as_tree("llama")
    layers = model.base.model.layers
    layers[1].self_attn = layers[0].self_attn
    model.max_rows = 4
    with pytest.raises(InputError, match="LlamaAttention runs several times in a forward pass"):
        model(tree_batch(SEQUENCES["shared response prefixes"]))


@pytest.mark.parametrize("kernel", ["blocks", "spans", "matrix", "variable lengths"])
def test_every_kernel_attends_from_a_part_to_the_shared_rows(kernel):
    batch, generator = tree_batch(LARGE[10:40]), torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, batch.num_tokens, 8, generator=generator).double() for heads in (4, 2, 2)
    )
    whole = [each.requires_grad_() for each in (query, key, value)]
    kernels = {
        "blocks": lambda *heads, tree: BlockAttention.apply(*heads, tree, 0.3),
        "spans": lambda *heads, tree: span_attention(*heads, tree, 0.3, None),
        "matrix": lambda *heads, tree: dense_attention(*heads, tree, 0.3, None),
        "variable lengths": lambda *heads, tree: varlen_attention(*heads, tree, 0.3, documented_varlen).transpose(1, 2),
    }
    expected = row_by_row(query, key, value, batch, 0.3)
    weights = torch.randn(expected.shape, generator=generator).double()
    gradients = torch.autograd.grad((expected * weights).sum(), whole)
    shared, *parts = cut_batch(batch, 40)
    rows = [torch.tensor([place_of(batch)[key] for key in part.batch.key_T.tolist()]) for part in (shared, *parts)]
    found, total = torch.zeros_like(expected), torch.zeros((), dtype=torch.float64)
    for part, own in zip((shared, *parts), rows, strict=True):
        seen = own if part is shared else torch.cat([rows[0], own])
        output = kernels[kernel](query[:, :, own], key[:, :, seen], value[:, :, seen], tree=part.batch.layout)
        found[:, :, own] = output.detach()
        total = total + (output * weights[:, :, own]).sum()
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)
    for one, other in zip(torch.autograd.grad(total, whole), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def place_of(batch):
    """Return the row of each prefix hash of a tree."""
    return {key: row for row, key in enumerate(batch.key_T.tolist())}
