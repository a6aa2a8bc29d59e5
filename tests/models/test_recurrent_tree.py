"""The tree forward of recurrent and hybrid models against transformers' own forward of each sequence."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_tree_batch import assert_same, run, values_and_gradients
from tiny_models import (
    MORE_RECURRENT,
    RECURRENT,
    SEQUENCES,
    SMALL,
    eager_copy,
    perturbed,
    stock_logps,
    tiny_model,
    token_sequences,
)
from tiny_training import comparisons, gap, llama, loop, preference, results
from transformers import AutoModelForCausalLM

from align.data.token_groups import TokenSequence
from align.errors import InputError, RunError
from align.models.policy import Policy, load_policy, save_policy
from align.models.probe import Forward, choose_forward
from align.models.settings import PolicySettings
from align.models.tree import recurrence
from align.models.tree.batch import tree_batch

needs_extra = pytest.mark.skipif(
    find_spec("tree_recurrence") is None, reason="tree-recurrence is not installed: pip install 'align[recurrent]'"
)
# Relative to a tensor's largest element. Sums over a path are rounded in fp32, in chunks that differ from path to path
TOLERANCE = 2e-5
# Three responses to one prompt with nested prefixes, and a response to the start of that prompt
NESTED = token_sequences("ABCDEFG|HIJKL ABCDEFG|HIJM ABCDEFG|HIJ ABC|ZY")


def recurrent(name, **changes):
    kind, settings = (RECURRENT | MORE_RECURRENT)[name]
    return tiny_model(kind, settings | changes)


def of_transformers(model, sequences):
    twin = eager_copy(model)
    return values_and_gradients(twin, stock_logps(twin, sequences))


def check(name, sequences):
    model = recurrent(name)
    expected = of_transformers(model, sequences)
    policy = Policy(model)
    assert choose_forward(policy, [sequences], "auto") == Forward("tree")
    for forward in ("tree", "plain"):
        assert_same(run(policy, forward, sequences), expected, TOLERANCE)


@needs_extra
@pytest.mark.parametrize("name", [*RECURRENT, *MORE_RECURRENT])
def test_the_tree_equals_transformers_in_values_and_gradients(name):
    check(name, NESTED)


@needs_extra
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("name", RECURRENT)
def test_any_tree_equals_transformers(name, sequences):
    check(name, sequences)


@needs_extra
@pytest.mark.parametrize("name", RECURRENT)
def test_branches_at_any_place_of_a_chunk_equal_transformers(name):
    """transformers computes the gated delta rule in chunks of 64 tokens."""
    draw = np.random.default_rng(0)
    trunk = draw.integers(3, 60, 150)
    sequences = []
    for shared, own in ((150, 20), (150, 1), (128, 70), (127, 5), (64, 64), (3, 140)):
        ids = np.concatenate([trunk[:shared], draw.integers(3, 60, own)]).astype(np.int32)
        sequences.append(TokenSequence(ids, np.arange(len(ids)) >= 2))
    model = recurrent(name, max_position_embeddings=256)
    expected = of_transformers(model, sequences)
    assert_same(run(Policy(model), "tree", sequences), expected, 5 * TOLERANCE)


@needs_extra
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bamba", "lfm2", "qwen3_5"])
def test_adapters_and_gradient_checkpointing_have_the_gradients_of_transformers(name, checkpointing):
    model = recurrent(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = perturbed(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))
    own = of_transformers(adapted.get_base_model(), NESTED)
    expected = {name if name == "log-probabilities" else f"base_model.model.{name}": own[name] for name in own}
    assert any("in_proj" in name for name in expected), "recurrent layers have adapters"
    policy = Policy(adapted).train()
    assert_same(run(policy, "tree", NESTED), expected, TOLERANCE)


@needs_extra
@pytest.mark.parametrize("name", RECURRENT)
def test_layers_compute_each_distinct_prefix_once(name):
    policy, rows = Policy(recurrent(name)), []
    for module in policy.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:-1].numel()))
    policy.use_forward("tree")
    policy(tree_batch(NESTED))
    distinct = len({tuple(each.ids[: at + 1]) for each in NESTED for at in range(len(each.ids))})
    assert distinct == 15 < sum(len(each.ids) for each in NESTED) // 2
    # A row has at most two experts, a shared one and its gate; none computes more rows than there are
    assert max(rows) == distinct
    assert rows.count(distinct) >= 3 * 2


@needs_extra
def test_a_layer_that_ignores_the_tree_raises(monkeypatch):
    monkeypatch.setattr(recurrence, "trie_keywords", lambda layout: {})
    for name in RECURRENT:
        with pytest.raises(RunError, match="the tree forward differs from transformers' by .* nats per token"):
            choose_forward(Policy(recurrent(name)), [NESTED], "auto")


@needs_extra
@pytest.mark.parametrize("name", RECURRENT)
def test_the_tree_does_not_depend_on_classes_that_sharding_replaces(name):
    policy = Policy(recurrent(name))
    for layer in policy.base.get_decoder().layers:
        layer.__class__ = type("Sharded", (type(layer),), {})  # as FSDP2 does
    assert choose_forward(policy, [NESTED], "auto") == Forward("tree")


@needs_extra
@pytest.mark.parametrize("name", RECURRENT)
def test_the_tree_passes_the_probe_in_bf16(name):
    assert choose_forward(Policy(recurrent(name)), [NESTED], "auto", precision="bf16") == Forward("tree")


@needs_extra
@pytest.mark.parametrize("name", RECURRENT)
def test_training_is_that_of_the_padded_forward(name, tmp_path):
    groups = comparisons(6, sizes=(2, 3))
    trained = {}
    for forward in ("tree", "plain"):
        model = Policy(recurrent(name, vocab_size=120)).train()
        made = loop(tmp_path / forward, preference("dpo"), groups, model=model, job={"forward": forward})
        trained[forward] = results(made)
    (lines, weights), (padded, padded_weights) = trained["tree"], trained["plain"]
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in padded], abs=1e-5)
    assert gap(weights, padded_weights) < 1e-4
    sequences = [each.ids for group in groups for each in group.sequences]
    distinct = {tuple(ids[: at + 1]) for ids in sequences for at in range(len(ids))}
    assert lines[0]["tokens_computed"] == len(distinct)
    assert padded[0]["tokens_computed"] == sum(map(len, sequences))


@needs_extra
def test_large_groups_run_at_once_with_a_message(tmp_path):
    groups = comparisons(2, sizes=(6,), longest=30)
    model = Policy(recurrent("lfm2", vocab_size=120)).train()
    made = loop(tmp_path, preference("dpo"), groups, model=model, tokens_per_micro_batch=40)
    assert made.forward == Forward("tree")
    assert model.max_rows is None
    note = "they run at once: the states of recurrent layers are not handed from one part to another"
    assert any(each.endswith(note) for each in made.progress.notes)


@needs_extra
@pytest.mark.parametrize("name", RECURRENT)
def test_a_saved_policy_and_cached_decoding_are_those_of_transformers(name, tokenizer_folder, tmp_path):
    kind, settings = RECURRENT[name]
    config = SMALL | settings | {"model_type": kind, "vocab_size": 300}
    config.pop("head_dim")  # which not all of them know
    policy, tokenizer = load_policy(PolicySettings(from_config=config, tokenizer=str(tokenizer_folder)))
    policy.use_forward("tree")
    save_policy(policy.eval(), tokenizer, tmp_path / "saved")
    with torch.no_grad():
        values = policy(tree_batch(NESTED))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(values, stock_logps(saved, NESTED), rtol=0, atol=2e-5)
        policy.use_forward("plain")
        ids = torch.arange(3, 10)[None]
        decoded = policy.hf.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        logits = saved(decoded, use_cache=False).logits[0]
    assert decoded[0, 7:].tolist() == logits[6:-1].argmax(dim=-1).tolist()


@pytest.mark.parametrize("name", [*RECURRENT, *MORE_RECURRENT])
def test_without_the_extra_models_are_padded_and_the_message_names_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr(recurrence, "find_spec", lambda module: None)
    policy = Policy(recurrent(name))
    forward = choose_forward(policy, [NESTED], "auto")
    assert forward.name == "plain" and not policy.is_tree
    assert forward.reason.startswith(type(policy.base).__name__)
    assert forward.reason.endswith("needs tree-recurrence: pip install 'align[recurrent]'")
    with pytest.raises(InputError, match=r"'tree' is not supported: .*align\[recurrent\]"):
        choose_forward(policy, [NESTED], "tree")


def test_other_models_do_not_load_the_extra(monkeypatch):
    monkeypatch.setattr(recurrence, "import_module", lambda module: pytest.fail(f"{module} was imported"))
    assert choose_forward(Policy(llama()), [NESTED], "auto") == Forward("tree")
