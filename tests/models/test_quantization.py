"""Quantized bases under adapters: products, training, saving, and unsupported cases."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SEQUENCES, SMALL, learned, stock_logps, trained
from torch import nn
from transformers import AutoModelForCausalLM

from align.errors import InputError
from align.models.loading import quantization
from align.models.policy import load_policy, save_policy
from align.models.settings import LoraSettings, PolicySettings
from align.models.tree.batch import plain_batch, tree_batch
from align.models.weights import fingerprint

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (align[qlora])"
)
# Widths that bitsandbytes supports on a CPU
WIDE = SMALL | {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "vocab_size": 300, "model_type": "llama"}
IDS = torch.arange(3, 20)[None]
# Quantile-spaced values of NF4 and the block that shares a scale (Dettmers et al. 2023, app. E and sec. 3)
NF4_VALUES = [-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4_VALUES += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
BLOCK = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    """Return a folder with a policy without adapters."""
    folder = tmp_path_factory.mktemp("run") / "base"
    save_policy(*load_policy(PolicySettings(from_config=WIDE, tokenizer=str(tokenizer_folder))), folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load(path, adapters="stacked", *, quantize="nf4", seed=0, **settings):
    lora = LoraSettings(adapters=adapters, **settings) if adapters else None
    return load_policy(PolicySettings(path=str(path), lora=lora, quantize=quantize, seed=seed))


def rounded(weight):
    """Return the weight in NF4 with scales in fp32."""
    blocks = weight.flatten().view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NF4_VALUES)
    nearest = (blocks / scales)[..., None].sub(values).abs().argmin(dim=-1)
    return (values[nearest] * scales).view_as(weight)


@needs_bitsandbytes
def test_only_linear_layers_are_quantized(base):
    policy, _ = load(base, rank=4)
    plain = AutoModelForCausalLM.from_pretrained(base)
    there = dict(policy.base.named_parameters())
    four = {name.replace(".base_layer", ""): value for name, value in there.items() if value.dtype == torch.uint8}
    linear = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert four.keys() == linear - {"lm_head.weight"} and len(four) == 14
    assert all(value.numel() == dict(plain.named_parameters())[name].numel() / 2 for name, value in four.items())
    assert {value.dtype for name, value in there.items() if value.dtype != torch.uint8} == {torch.float32}
    assert trained(policy) == {name for name, _ in policy.named_parameters() if "lora_" in name}


@needs_bitsandbytes
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_products_use_the_nearest_nf4_values(base, mode):
    policy, _ = load(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data)
    getattr(policy, mode)()
    # Scales in 8 bits have errors of up to 1/256 of their range; the 4 bits move the logits by more than 0.3
    torch.testing.assert_close(logits(policy.hf), logits(plain), atol=0.02, rtol=0)
    assert (logits(policy.hf) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1


@needs_bitsandbytes
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["a pair", "many"])
def test_tree_padded_and_transformers_forwards_agree(base, name, checkpointing):
    settings = PolicySettings(
        path=str(base), quantize="nf4", lora=LoraSettings(adapters="stacked"), gradient_checkpointing=checkpointing
    )
    policy = learned(load_policy(settings)[0], 3)
    expected = stock_logps(policy.base, SEQUENCES[name])
    gradients = []
    for make, forward in ((plain_batch, "plain"), (tree_batch, "tree")):
        policy.use_forward(forward)
        policy.zero_grad()
        answer = policy(make(SEQUENCES[name]))
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
        answer.sum().backward()
        gradients.append({name: value.grad for name, value in policy.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == trained(policy)
    for each, other in zip(gradients[0].values(), gradients[1].values(), strict=True):
        torch.testing.assert_close(each, other, atol=1e-4, rtol=1e-4)


@needs_bitsandbytes
def test_products_follow_autocast_and_weights_are_not_rounded(tmp_path, tokenizer_folder):
    fresh = WIDE | {"model_type": "qwen2", "head_dim": None}  # its projections have biases
    fresh = {name: value for name, value in fresh.items() if value is not None}
    made, tokenizer = load_policy(PolicySettings(from_config=fresh, tokenizer=str(tokenizer_folder)))
    for name, value in made.named_parameters():
        if "bias" in name:
            value.data.normal_()
    save_policy(made, tokenizer, tmp_path)
    policy, _ = load(tmp_path)
    exact, before = logits(policy.hf), fingerprint(policy)
    seen = set()
    layer = policy.base.model.layers[0].mlp.up_proj.base_layer
    layer.register_forward_hook(lambda _, given, answer: seen.add(answer.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(policy.hf)
    assert seen == {torch.bfloat16}
    assert 0 < (half.float() - exact).abs().max() < 0.1
    assert torch.equal(logits(policy.hf), exact) and fingerprint(policy) == before


@needs_bitsandbytes
@pytest.mark.parametrize("adapters", ["continued", "stacked"])
def test_adapters_on_a_quantized_base_round_trip(base, tmp_path, adapters):
    policy, tokenizer = load(base, adapters, rank=4)
    expected = logits(learned(policy, 1).hf)
    save_policy(policy, tokenizer, tmp_path / "sft", merge=False)
    saved = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert {name for name in saved if "lora_" not in name} == set() and len(saved) == 28
    assert not list((tmp_path / "sft").glob("model*"))
    assert json.loads((tmp_path / "sft" / "made_of.json").read_text())["quantize"] == "nf4"
    again, _ = load(tmp_path / "sft", adapters, rank=4)
    assert torch.equal(logits(again.hf), expected)
    assert fingerprint(again) == fingerprint(load(tmp_path / "sft", adapters, rank=4)[0])
    assert fingerprint(again) != fingerprint(load(base, adapters, rank=4)[0])


@needs_bitsandbytes
def test_merging_for_evaluation_dequantizes_the_base(base, tmp_path):
    policy, tokenizer = load(base, rank=4)
    expected = logits(learned(policy, 1).hf)
    save_policy(policy, tokenizer, tmp_path / "sft", merge=False)
    plain, tokenizer = load(tmp_path / "sft", None, quantize=None)
    assert {value.dtype for value in plain.parameters()} == {torch.float32}
    assert trained(plain) == {name for name, _ in plain.named_parameters()} and len(trained(plain)) == 21
    torch.testing.assert_close(logits(plain.hf), expected, atol=2e-5, rtol=1e-5)
    save_policy(plain, tokenizer, tmp_path / "plain")
    written = (tmp_path / "plain" / "config.json").read_text()
    assert "quantization" not in written
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(again), expected, atol=2e-5, rtol=1e-5)


@needs_bitsandbytes
def test_merging_into_unquantized_weights_would_change_the_policy(base, tmp_path):
    policy, tokenizer = load(base, rank=4)
    expected = logits(learned(policy, 1).hf).log_softmax(-1)
    save_policy(policy, tokenizer, tmp_path, merge=False)
    (tmp_path / "made_of.json").unlink()  # folders of adapters from other programs do not have it
    gap = (logits(load(tmp_path, None, quantize=None)[0].hf).log_softmax(-1) - expected).abs().max()
    assert gap > 0.05


@needs_bitsandbytes
def test_adapters_cannot_be_merged_into_quantized_weights(base, tmp_path):
    policy, tokenizer = load(base)
    with pytest.raises(InputError, match=r"policy\.quantize: adapters cannot be merged into weights in 4 bits"):
        save_policy(policy, tokenizer, tmp_path)


@needs_bitsandbytes
def test_quantize_must_match_the_base_of_the_adapters(base, tmp_path):
    for name, quantize in (("four", "nf4"), ("full_tensor", None)):
        policy, tokenizer = load(base, quantize=quantize)
        save_policy(policy, tokenizer, tmp_path / name, merge=False)
    with pytest.raises(InputError, match=r"policy\.quantize: .* trained on an nf4 base; set nf4"):
        load(tmp_path / "four", quantize=None)
    with pytest.raises(
        InputError, match=r"policy\.quantize: .* trained on a base in full precision; remove this setting"
    ):
        load(tmp_path / "full_tensor")
    policy, _ = load(tmp_path / "four", "merged", quantize=None)  # new adapters on the merged ones
    assert {value.dtype for value in policy.parameters()} == {torch.float32}


@needs_bitsandbytes
def test_already_quantized_weights_are_rejected(base, tmp_path):
    load(base)[0].hf.unload().save_pretrained(tmp_path / "four")
    load_policy(PolicySettings(path=str(base)))[1].save_pretrained(tmp_path / "four")
    for adapters, quantize in ((None, None), ("stacked", "nf4"), ("merged", None)):
        with pytest.raises(
            InputError, match="are already quantized; give the model in full precision and set policy.quantize"
        ):
            load(tmp_path / "four", adapters, quantize=quantize)


@needs_bitsandbytes
@pytest.mark.skipif(torch.cuda.is_available(), reason="the defect is of bitsandbytes' CPU kernel")
def test_unsupported_layer_widths_are_rejected(tmp_path, tokenizer_folder):
    fresh = WIDE | {"intermediate_size": 96}
    save_policy(*load_policy(PolicySettings(from_config=fresh, tokenizer=str(tokenizer_folder))), tmp_path)
    with pytest.raises(InputError, match="has layers of 96"):
        load(tmp_path)


@needs_bitsandbytes
def test_conv1d_layers_are_rejected(tmp_path, tokenizer_folder):
    fresh = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300}
    save_policy(*load_policy(PolicySettings(from_config=fresh, tokenizer=str(tokenizer_folder))), tmp_path)
    with pytest.raises(InputError, match="has Conv1D layers \\(as GPT-2\\)"):
        load(tmp_path)


def test_a_missing_bitsandbytes_is_named(base, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^policy\.quantize: bitsandbytes is not installed: pip install bitsandbytes"):
        load(base)


LAUNCHES = {
    "weights partitioned while they are loaded": (
        lambda patch: patch.setattr(quantization, "is_deepspeed_zero3_enabled", lambda: True),
        "set zero3_init_flag to false",
    ),
    "FSDP": (lambda patch: patch.setenv("ACCELERATE_USE_FSDP", "true"), "FSDP does not shard weights in 4 bits"),
}


@pytest.mark.parametrize("how", LAUNCHES)
def test_unsupported_launches_are_rejected(base, monkeypatch, how):
    change, words = LAUNCHES[how]
    monkeypatch.setattr(quantization, "find_spec", lambda name: "there")
    change(monkeypatch)
    with pytest.raises(InputError, match=rf"^policy\.quantize: .*{words}"):
        load(base)


WITHOUT = {
    "no adapters": ({}, "weights in 4 bits cannot be trained; set lora"),
    "merged adapters": ({"lora": LoraSettings()}, "the next step would quantize the merged adapters"),
}


@pytest.mark.parametrize("how", WITHOUT)
def test_quantize_requires_unmerged_adapters(how):
    settings, words = WITHOUT[how]
    with pytest.raises(InputError, match=words):
        PolicySettings(path="somewhere", quantize="nf4", **settings)


def test_only_full_precision_checkpoints_can_be_quantized(tmp_path):
    lora = LoraSettings(adapters="stacked")
    with pytest.raises(InputError, match=r"policy\.quantize: a randomly initialized model cannot be quantized"):
        load_policy(PolicySettings(from_config=WIDE, quantize="nf4", lora=lora))
    with pytest.raises(InputError, match=r"policy\.quantize: gguf:.* is already quantized"):
        load_policy(PolicySettings(path=f"gguf:{tmp_path}/model.gguf", quantize="nf4", lora=lora))
