"""The choice of the forward pass, and errors that stop a run before it starts."""

import copy

import pytest
import torch
from tiny_models import MORE_TREE, PLAIN, SEQUENCES, TREE, random_sequences, stock_logps, tiny_model, token_sequences
from transformers import AttentionInterface

from align.errors import InputError, RunError
from align.models import probe
from align.models.lm_head.logprobs import LogitTransform
from align.models.lm_head.patch import patch_lm_head
from align.models.policy import Policy
from align.models.probe import Forward, choose_forward
from align.models.tree import attention
from align.models.tree.batch import plain_batch, tree_batch

GROUPS = [token_sequences("ABCDEFG|HIJKL ABCDEFG|MNO ABCDEFG|MNP"), token_sequences("AQ|R AQ|STU")]
FLAT = [sequence for group in GROUPS for sequence in group]


def answer(policy, sequences, forward):
    make = {"tree": tree_batch, "plain": plain_batch}[forward.name]
    assert policy.is_tree == (forward.name == "tree"), "the policy is left set to what was chosen"
    return policy(make(sequences))


@pytest.mark.parametrize("kind", TREE)
def test_auto_chooses_the_tree_where_it_is_exact(kind):
    policy = Policy(tiny_model(*TREE[kind]))
    assert choose_forward(policy, GROUPS, "auto") == Forward("tree")
    assert policy.is_tree


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE_TREE)
def test_auto_chooses_the_tree_in_other_architectures(kind):
    assert choose_forward(Policy(tiny_model(*MORE_TREE[kind])), GROUPS, "auto") == Forward("tree")


@pytest.mark.parametrize("kind", PLAIN)
def test_auto_falls_back_to_the_padded_forward_with_a_reason(kind):
    model_type, settings, words = PLAIN[kind]
    model = tiny_model(model_type, settings)
    policy = Policy(model)
    expected = stock_logps(model, FLAT)
    forward = choose_forward(policy, GROUPS, "auto")
    assert forward.name == "plain"
    assert words in forward.reason and len(forward.reason) > 20
    torch.testing.assert_close(answer(policy, FLAT, forward), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", PLAIN)
def test_requesting_an_unsupported_tree_is_an_error(kind):
    model_type, settings, words = PLAIN[kind]
    policy = Policy(tiny_model(model_type, settings))
    with pytest.raises(InputError, match="^policy.forward: 'tree' is not supported: ") as error:
        choose_forward(policy, GROUPS, "tree")
    assert words in str(error.value)


def test_plain_chooses_the_padded_forward():
    policy = Policy(tiny_model("llama"))
    assert choose_forward(policy, GROUPS, "plain").name == "plain"
    assert not policy.is_tree


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_the_tree_supports_a_sliding_window_that_no_sequence_exceeds(kind, settings):
    longest = max(len(sequence.ids) for sequence in FLAT)
    for window, name in ((longest, "tree"), (longest - 1, "plain")):
        model = tiny_model(kind, settings | {"sliding_window": window})
        policy = Policy(model)
        expected = stock_logps(model, FLAT)
        forward = choose_forward(policy, GROUPS, "auto")
        assert forward.name == name
        torch.testing.assert_close(answer(policy, FLAT, forward), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
        ("qwen3", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4, "layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_an_unused_sliding_window_does_not_disable_the_tree(kind, settings):
    assert choose_forward(Policy(tiny_model(kind, settings)), GROUPS, "auto") == Forward("tree")


@pytest.mark.parametrize(("window", "name"), [(53, "tree"), (52, "plain")])
def test_a_sliding_window_is_compared_with_the_full_sequence_lengths(window, name):
    groups = [token_sequences("AB" * 26 + "|C")]
    assert len(groups[0][0].ids) == 53 > probe.PROBE_LENGTH
    policy = Policy(tiny_model("mistral", {"sliding_window": window}))
    assert choose_forward(policy, groups, "auto").name == name


def test_a_longer_sequence_after_the_probe_is_rejected():
    policy = Policy(tiny_model("mistral", {"sliding_window": 20}))
    choose_forward(policy, GROUPS, "auto")
    with pytest.raises(InputError, match="sliding window of 20 tokens, shorter than the longest sequence"):
        policy(tree_batch(token_sequences("ABCDEFGHIJ|KLMNOPQRSTU")))


def to_rows_before(module, query, key, value, attention_mask, *, tree=None, scaling=None, **keywords):
    """Compute causal attention over the whole row, so that siblings attend to each other."""
    attention._calls["tree"] += tree is not None
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return output.transpose(1, 2), None


def with_another_scale(module, query, key, value, attention_mask, *, scaling=None, **keywords):
    return attention.tree_attention(module, query, key, value, attention_mask, scaling=scaling * 0.7, **keywords)


def wrong_in_bf16(module, query, key, value, attention_mask, **keywords):
    wrong = torch.is_autocast_enabled("cpu")
    function = to_rows_before if wrong else attention.tree_attention
    return function(module, query, key, value, attention_mask, **keywords)


@pytest.fixture
def registered():
    """Register another function under the tree's name for one test."""
    yield lambda function: AttentionInterface.register(attention.NAME, function)
    AttentionInterface.register(attention.NAME, attention.tree_attention)


# At transformers' default of 0.02 attention is nearly uniform, and its scale has little effect
@pytest.mark.parametrize(
    ("wrong", "spread"), [(to_rows_before, 0.02), (to_rows_before, 0.1), (with_another_scale, 0.1)]
)
def test_wrong_attention_raises(wrong, spread, registered):
    registered(wrong)
    policy = Policy(tiny_model("llama", {"initializer_range": spread}))
    with pytest.raises(RunError, match="the tree forward differs from transformers' by .* nats per token"):
        choose_forward(policy, GROUPS, "auto")


def test_wrong_positions_raise(monkeypatch):
    def by_row(sequences):
        batch = tree_batch(sequences)
        batch.position_ids.copy_(torch.arange(batch.num_tokens))
        return batch

    monkeypatch.setattr(probe, "tree_batch", by_row)
    with pytest.raises(RunError, match="the tree forward differs from transformers' by"):
        choose_forward(Policy(tiny_model("llama")), GROUPS, "auto")


@pytest.mark.parametrize(
    ("kind", "settings", "believed"),
    [
        ("granite", {"logits_scaling": 3.0}, LogitTransform()),
        ("gemma2", {"final_logit_softcapping": 3.0}, LogitTransform()),
        ("llama", {}, LogitTransform(scale=1.1)),
    ],
)
def test_an_unknown_logit_transform_raises(kind, settings, believed):
    policy = Policy(tiny_model(kind, settings))
    patch_lm_head(policy.base.get_output_embeddings(), believed)
    with pytest.raises(RunError, match="the plain forward differs from transformers' by"):
        choose_forward(policy, GROUPS, "auto")


def test_nan_weights_raise():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(RunError, match="differs from transformers' by nan"):
        choose_forward(Policy(model), GROUPS, "auto")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2"])
def test_the_tree_passes_the_probe_in_bf16(kind):
    policy = Policy(tiny_model(*TREE[kind]))
    assert choose_forward(policy, GROUPS, "auto", precision="bf16") == Forward("tree")
    assert policy.is_tree


def test_attention_that_is_wrong_only_in_bf16_raises(registered):
    registered(wrong_in_bf16)
    policy = Policy(tiny_model("llama"))
    choose_forward(policy, GROUPS, "auto")
    with pytest.raises(RunError, match="in bf16 the RMS error of the tree forward is"):
        choose_forward(policy, GROUPS, "auto", precision="bf16")


@pytest.mark.parametrize(
    "groups",
    [
        [token_sequences("A|B")],
        [token_sequences("ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJKLMNOPQRSTUVWXYZ|AB ABCDEFGHIJ|CD")],
        [SEQUENCES["duplicates"]],
        [random_sequences(3, prompts=1, max_responses=13)],
    ],
)
def test_probed_sequences_always_branch(groups, monkeypatch):
    made = []
    monkeypatch.setattr(probe, "tree_batch", lambda sequences: made.append(tree_batch(sequences)) or made[-1])
    assert choose_forward(Policy(tiny_model("llama")), groups, "auto") == Forward("tree")
    longest = max(len(sequence.ids) for sequence in groups[0])
    assert all(len(batch.layout.spans) > 1 for batch in made) or longest < 4
    assert all(batch.layout.max_depth <= probe.PROBE_LENGTH for batch in made)


def test_probing_changes_neither_weights_nor_gradients_nor_the_mode():
    policy = Policy(tiny_model("llama")).train()
    before = copy.deepcopy(policy.state_dict())
    choose_forward(policy, GROUPS, "auto")
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in policy.parameters())
    assert policy.training
