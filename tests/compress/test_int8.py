"""Copies of policies in int8: rounded as torchao's documentation says, loaded by transformers, never trained."""

import json
from importlib.util import find_spec

import pytest
import torch
from exported import saved
from safetensors.torch import load_file
from small_runs import OF_COPY, TIED_POLICY, run
from transformers import AutoModelForCausalLM

from align.compress import int8 as module
from align.compress.int8 import quantize_policy
from align.errors import InputError
from align.inference.settings import LocalSettings, SamplingSettings
from align.inference.transformers_engine import TransformersEngine
from align.models.loading import int8
from align.models.policy import load_policy, save_policy
from align.models.settings import LoraSettings, PolicySettings
from align.records import Message, Prompt

IDS = torch.arange(3, 40)[None]
METHODS = ("int8", "int8_dynamic")


def by_hand(value, dim):
    """Values rounded to 127 steps on either side of zero, with the largest of a row or token as its scale."""
    scale = value.abs().amax(dim=dim, keepdim=True) / 127.5
    return (value / scale).round().clamp(-128, 127) * scale


@pytest.fixture(scope="module", params=METHODS)
def copies(request, tmp_path_factory):
    """A method, a policy, its copy, and what is reported of it."""
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("policies")
    source = saved(folder / "base", {"model_type": "llama", "tie_word_embeddings": True})
    target = folder / "small"
    target.mkdir()
    return request.param, source, target, quantize_policy(str(source), target, request.param)


def test_a_layer_multiplies_what_is_rounded_by_hand(copies):
    method, source, target, _ = copies
    weight = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    layer = AutoModelForCausalLM.from_pretrained(target).model.layers[0].mlp.up_proj
    x = torch.randn(50, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rounded = by_hand(x, 1) if method == "int8_dynamic" else x
    error = (layer(x) - x @ weight.T).norm()
    # A value may lie half-way between two steps, where the last bit of the scale decides
    assert (layer(x) - rounded @ by_hand(weight, 1).T).norm() < 0.2 * error < 0.01 * (x @ weight.T).norm()


def test_logits_of_a_copy_are_close_and_greedy_answers_agree(copies):
    _, source, target, _ = copies
    exact, found = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(IDS).logits for each in (source, target)
    )
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()
    assert (found.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_the_linear_layers_take_a_byte_for_each_weight_and_the_others_stay(copies):
    _, source, target, report = copies
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    linear = [name for name in before if name.endswith("proj.weight")]
    in_bytes = sum(
        value.numel() for name, value in after.items() if value.dtype == torch.int8 and name.endswith("qdata")
    )
    assert report["layers"] == len(linear) == 14 and in_bytes == sum(before[name].numel() for name in linear)
    kept = "model.embed_tokens.weight"
    assert torch.equal(after[kept], before[kept])
    size = report["compression"]
    assert size["bytes"] == (target / "model.safetensors").stat().st_size < 0.6 * size["bytes_before"]


def test_align_evaluates_a_copy_and_neither_trains_nor_saves_it(copies, tmp_path):
    _, source, target, _ = copies
    policy, tokenizer = load_policy(PolicySettings(path=str(target)))
    assert not any(value.requires_grad for value in policy.parameters())
    assert tokenizer.chat_template == load_policy(PolicySettings(path=str(source)))[1].chat_template
    with pytest.raises(InputError, match="policy: its weights are in int8, and can only be evaluated"):
        save_policy(policy, tokenizer, tmp_path)
    with pytest.raises(InputError, match="quantized; give the model in full precision"):
        quantize_policy(str(target), tmp_path, "int8")


def test_an_engine_that_quantizes_in_memory_samples_what_it_samples_from_the_copy(copies):
    method, source, target, _ = copies
    prompts = [Prompt((Message("user", text),)) for text in ("Why?", "Name a river.", "Count to three.")]
    sampling = SamplingSettings(num_responses=2, max_new_tokens=12, seed=5)

    def samples(path, **settings):
        local = LocalSettings(precision="fp32", batch_size=4, **settings)
        engine = TransformersEngine.load(str(path), local, name="one")
        return {(each.key, each.number): each.text for each in engine.sample(prompts, sampling)}

    found = samples(source, quantize=method)
    assert len(found) == 6
    assert found == samples(target) != samples(source)


def test_only_an_engine_that_quantizes_has_another_cache_key():
    assert LocalSettings().cache_key() == {"tokenizer": None, "chat_template": None, "precision": "bf16"}
    if find_spec("torchao") is not None:
        assert LocalSettings(quantize="int8").cache_key() == {**LocalSettings().cache_key(), "quantize": "int8"}


def test_adapters_are_merged_first(copies, tmp_path):
    method, source, _, _ = copies
    lora = LoraSettings(rank=2, alpha=16, adapters="continued")
    policy, tokenizer = load_policy(PolicySettings(path=str(source), lora=lora))
    torch.manual_seed(0)
    for name, value in policy.named_parameters():
        value.data += 0.05 * torch.randn_like(value) * ("lora_B" in name)
    save_policy(policy, tokenizer, tmp_path / "adapters", merge=False)
    (tmp_path / "merged").mkdir()
    quantize_policy(str(tmp_path / "adapters"), tmp_path / "merged", method)
    exact = policy.eval().hf(IDS).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    base = AutoModelForCausalLM.from_pretrained(source)(IDS).logits
    assert (found - exact).abs().max() < 0.1 * (base - exact).abs().max()


def test_a_copy_that_loads_with_other_values_is_refused(copies, monkeypatch, tmp_path):
    method, source, _, _ = copies
    logits = module._logits
    monkeypatch.setattr(module, "_logits", lambda model: logits(model) + torch.rand(()))
    with pytest.raises(RuntimeError, match="the logits differ once the policy has been saved and loaded"):
        quantize_policy(str(source), tmp_path, method)


STEPS = (
    TIED_POLICY
    + """\
data:
  asked: {{path: "tasks:general", split: test, limit: 4}}
  shown: {{path: "tasks:general", limit: 8}}
steps:
  base: {{stage: import, vocab_size: 300}}
  small: {{stage: quantize}}
"""
    + OF_COPY
)
TRAINED = "  sft: {{stage: sft, policy: small, data: shown, train: {{learning_rate: 1.0e-3}}}}\n"


@pytest.mark.slow
def test_a_recipe_evaluates_a_copy_and_cannot_train_it(tmp_path):
    pytest.importorskip("torchao")
    run(tmp_path, text=STEPS)
    table = json.loads((tmp_path / "runs/small/table.json").read_text())
    assert 0 < table["small"]["fidelity kl"]["value"] < 0.01
    with pytest.raises(InputError, match="its weights are in int8"):
        run(tmp_path, text=STEPS + TRAINED, until="sft")


def test_without_torchao_the_stage_is_refused(monkeypatch):
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"stage: torchao, which computes in int8, is not installed: pip install"):
        int8.check_torchao(("stage",))
    with pytest.raises(InputError, match=r"torchao, which computes in int8, is not installed"):
        LocalSettings(quantize="int8")
