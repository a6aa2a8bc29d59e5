"""Influence of layers against a computation by hand, and policies without some of their layers."""

import copy
import json

import numpy as np
import pytest
import torch
from exported import ARCHITECTURES, saved
from safetensors import safe_open
from transformers import Gemma3Config

from align.compress.layer_dropping import block_influence, write_without_layers
from align.compress.weights import StoredWeights
from align.data.token_groups import TokenSequence
from align.errors import InputError
from align.models.loading.pretrained import load_base
from align.models.policy import Policy, load_policy, save_policy
from align.models.settings import PolicySettings
from align.stages.compression.dropping import check_number, least, planned_settings
from align.testing import tiny_policy

LAYERS = {"num_hidden_layers": 4}
CASES = {
    "llama": ARCHITECTURES["llama"] | LAYERS,
    "llama, tied": ARCHITECTURES["llama, tied"] | LAYERS,
    "qwen3": ARCHITECTURES["qwen3"]
    | LAYERS
    | {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma2": ARCHITECTURES["gemma2"] | LAYERS | {"sliding_window": 4},
    "gemma3": ARCHITECTURES["gemma3"] | {"sliding_window": 4},
    "smollm3": {"model_type": "smollm3", **LAYERS},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **LAYERS},
}


def sequences(seed=0, number=6):
    """Return sequences of random tokens, some of which share a prefix."""
    draw = np.random.default_rng(seed)
    prefix = draw.integers(3, 300, 7)
    found = []
    for index in range(number):
        ids = draw.integers(3, 300, draw.integers(2, 12))
        ids = np.concatenate([prefix, ids]) if index % 2 else ids
        found.append(TokenSequence(ids.astype(np.int32), np.arange(len(ids)) > 0))
    return found


def load(folder):
    return load_policy(PolicySettings(path=str(folder)))[0].eval()


def influence_by_hand(policy, texts):
    """Return the mean of 1 - cos for each layer: one sequence at a time, from transformers' own hidden states.

    The last of them has been normalized, so the output of the last layer is what the final norm is given.
    """
    last = []
    hook = policy.hf.model.norm.register_forward_pre_hook(lambda module, given: last.append(given[0]))
    sums, count = 0.0, 0
    for text in texts:
        ids = torch.from_numpy(text.ids.astype(np.int64))[None]
        with torch.no_grad():
            states = policy.hf(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        points = np.stack([each[0].double().numpy() for each in (*states[:-1], last.pop())])
        before, after = points[:-1], points[1:]
        cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
        sums, count = sums + (1 - cosine).sum(1), count + len(text.ids)
    hook.remove()
    return sums / count


@pytest.mark.parametrize("name", CASES)
def test_influence_is_that_of_the_states_between_layers(tmp_path, name):
    policy, texts = load(saved(tmp_path / "p", CASES[name])), sequences()
    expected = influence_by_hand(policy, texts)
    assert len(expected) == CASES[name]["num_hidden_layers"] and expected.std() > 1e-3
    np.testing.assert_allclose(block_influence(policy, texts), expected, rtol=1e-4, atol=1e-6)


def test_influence_does_not_depend_on_the_order_of_rows_or_on_shared_prefixes(tmp_path):
    policy, texts = load(saved(tmp_path / "p", CASES["llama"])), sequences()
    whole = block_influence(policy, texts)
    np.testing.assert_allclose(block_influence(policy, texts[::-1]), whole, rtol=1e-5)
    np.testing.assert_allclose(block_influence(policy, texts * 2), whole, rtol=1e-5)


def chained(policy, kept, ids):
    """Return the logits of a copy of the policy in memory whose list of layers has only those that are kept."""
    twin = copy.deepcopy(policy.hf)
    twin.model.layers = torch.nn.ModuleList([twin.model.layers[layer] for layer in kept])
    twin.config.num_hidden_layers = len(kept)
    for key in ("layer_types", "no_rope_layers"):
        if getattr(twin.config, key, None):
            setattr(twin.config, key, [getattr(twin.config, key)[layer] for layer in kept])
    with torch.no_grad():
        return twin(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_the_written_policy_is_the_policy_with_the_layers_skipped(tmp_path, name):
    folder, out = saved(tmp_path / "p", CASES[name]), tmp_path / "out"
    out.mkdir()
    policy, dropped = load(folder), [1, 2]
    write_without_layers(policy, StoredWeights(folder), dropped, out)
    found = load(out)
    kept = [layer for layer in range(CASES[name]["num_hidden_layers"]) if layer not in dropped]
    assert found.hf.config.num_hidden_layers == len(kept)
    types = getattr(policy.hf.config, "layer_types", None)
    if types:
        assert found.hf.config.layer_types == [types[layer] for layer in kept]
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = found.hf(input_ids=ids, use_cache=False).logits
        whole = policy.hf(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, chained(policy, kept, ids), rtol=0, atol=1e-6)
    assert (logits - whole).abs().max() > 1e-2
    assert {path.name for path in out.iterdir()} >= {"tokenizer.json", "config.json", "chat_template.jinja"}


def test_shards_keep_their_bytes_and_their_index(tmp_path):
    folder, out = saved(tmp_path / "p", CASES["llama"]), tmp_path / "out"
    (folder / "model.safetensors").unlink()
    load_from = saved(tmp_path / "q", CASES["llama"])
    load(load_from).hf.bfloat16().save_pretrained(folder, max_shard_size="40KB")
    out.mkdir()
    write_without_layers(load(folder), StoredWeights(folder), [0, 3], out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored, found = StoredWeights(folder), StoredWeights(out)
    assert found.names == sorted(index["weight_map"]) and len(set(index["weight_map"].values())) > 2
    size = 0
    for name in found.names:
        old = name.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1.")
        assert torch.equal(found.read(name), stored.read(old)) and found.read(name).dtype == torch.bfloat16
        size += found.read(name).numel() * 2
    assert index["metadata"]["total_size"] == size
    with safe_open(found.files[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_layers_that_change_nothing_are_dropped(tmp_path):
    folder, out = saved(tmp_path / "p", ARCHITECTURES["llama"] | {"num_hidden_layers": 5}), tmp_path / "out"
    policy = load(folder)
    for layer in (1, 4):
        policy.hf.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        policy.hf.model.layers[layer].mlp.down_proj.weight.data.zero_()
    policy.hf.save_pretrained(folder)
    influence = block_influence(policy, sequences())
    assert least(influence, 2) == [1, 4] and max(influence[1], influence[4]) < 1e-6
    out.mkdir()
    write_without_layers(policy, StoredWeights(folder), [1, 4], out)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load(out).hf(input_ids=ids).logits, policy.hf(input_ids=ids).logits)


@pytest.mark.parametrize("scaled", [False, True])
def test_layers_that_depend_on_their_number_are_refused(tmp_path, scaled):
    tokenizer = tiny_policy()[1]
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 400}
    config |= {"scale_attn_by_inverse_layer_idx": scaled, "initializer_range": 0.2}
    policy = Policy(load_base(PolicySettings(from_config=config)))
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    save_policy(policy, tokenizer, tmp_path / "in")
    stored = StoredWeights(tmp_path / "in")
    if scaled:
        with pytest.raises(InputError, match="its layers depend on their number"):
            write_without_layers(policy, stored, [0], tmp_path / "out")
    else:
        write_without_layers(policy, stored, [0], tmp_path / "out")
        assert load(tmp_path / "out").hf.config.n_layer == 2


@pytest.mark.parametrize("name", CASES)
def test_the_planned_model_has_the_size_of_the_written_one(tmp_path, name):
    folder, out = saved(tmp_path / "p", CASES[name]), tmp_path / "out"
    out.mkdir()
    write_without_layers(load(folder), StoredWeights(folder), [0, 1], out)
    planned = load_base(planned_settings(PolicySettings(path=str(folder)), 2))
    assert planned.num_parameters() == load(out).hf.num_parameters()


def test_a_model_of_images_and_text_is_refused():
    with pytest.raises(InputError, match="policy: gemma3 has more than a decoder of text"):
        check_number(Gemma3Config(), 1)
