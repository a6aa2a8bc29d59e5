"""GGUF export: bits of the weights, their order, the tokenizer, and what transformers makes of a file alone."""

import json
import math
import shutil
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch
from exported import ARCHITECTURES, TEXTS, exported, saved, sentencepiece_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.compress.gguf_export import export_policy
from align.compress.gguf_tokenizer import vocabulary
from align.compress.settings import GGUF_BITS, GgufSettings
from align.errors import InputError, RunError
from align.models.loading.pretrained import load_base, silence_transformers
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.settings import LoraSettings, PolicySettings
from align.testing import tiny_policy

IDS = torch.arange(5, 37)[None]


@pytest.fixture(autouse=True)
def quiet():
    silence_transformers()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def loaded(folder):
    return load_base(PolicySettings(path=str(folder)))


def rounded(value, kind):
    """Return the values of a tensor after quantization, with the rows as they are: blocks lie within rows."""
    if value.dim() == 1:
        return value
    kind = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind).copy())


def assert_rounded(source, folder, kind):
    before, after = loaded(source).state_dict(), loaded(folder).state_dict()
    assert before.keys() == after.keys() and len(before) > 20
    for name, value in before.items():
        if value.dim() == 1 and "gemma" in source.name:  # stored as 1 + weight
            torch.testing.assert_close(after[name], value, atol=2e-7, rtol=0)
        else:
            assert torch.equal(after[name], rounded(value, kind)), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loaded_file_has_the_rounded_weights_bit_for_bit_and_transformers_computes_the_same(name, tmp_path):
    source = saved(tmp_path / name, ARCHITECTURES[name])
    file, report = exported(source)
    assert_rounded(source, file.parent, "Q8_0")
    alone = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert torch.equal(logits(alone), logits(loaded(file.parent)))
    size = report["compression"]
    assert size["bytes"] == file.stat().st_size and size["ratio"] == size["bytes"] / size["bytes_before"] < 1
    assert size["weights"] == sum(value.numel() for value in loaded(source).parameters())


@pytest.mark.parametrize("kind", GGUF_BITS)
def test_every_type_is_rounded_by_its_own_rule(kind, tmp_path):
    source = saved(tmp_path / "llama", ARCHITECTURES["llama"])
    file, report = exported(source, kind)
    assert_rounded(source, file.parent, kind)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds == {kind, "F32"} == set(report["tensors"]) and report["notes"] == []


def test_embeddings_may_have_another_type_and_odd_rows_are_counted(tmp_path):
    source = saved(tmp_path / "llama", {**ARCHITECTURES["llama"], "intermediate_size": 100})
    file, report = exported(source, "Q4_0", embeddings="Q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.1.attn_q.weight"] == "Q4_0" and kinds["blk.1.ffn_down.weight"] == "F16"
    assert report["notes"] == ["2 matrices are F16: their rows do not divide into blocks of 32 weights"]


def rotated_halves(vector, position, theta):
    """Return a head's vector after transformers' RoPE: the pairs are (i, i + half)."""
    half = len(vector) // 2
    angle = position * theta ** (-np.arange(half) / half)
    first, second = vector[:half], vector[half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    )


def rotated_neighbors(vector, position, theta):
    """Return a head's vector after llama.cpp's RoPE for this architecture: the pairs are (2i, 2i + 1)."""
    half = len(vector) // 2
    turned = vector[0::2] + 1j * vector[1::2]
    turned = turned * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.stack([turned.real, turned.imag], axis=1).ravel()


def test_attention_scores_in_llama_cpps_order_of_rotary_pairs_are_the_policys(tmp_path):
    source = saved(tmp_path / "llama", ARCHITECTURES["llama"])
    file, _ = exported(source, "F16")
    stored = {tensor.name: np.array(tensor.data, np.float64) for tensor in gguf.GGUFReader(file).tensors}
    own = {name: value.half().double().numpy() for name, value in loaded(source).state_dict().items()}
    x, y = np.random.default_rng(0).normal(size=(2, 64))
    for head in range(4):
        of_q, of_k = slice(16 * head, 16 * head + 16), slice(16 * (head // 2), 16 * (head // 2) + 16)
        q, k = (own[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qk")
        expected = rotated_halves(q[of_q] @ x, 9, 5000.0) @ rotated_halves(k[of_k] @ y, 4, 5000.0)
        q, k = (stored[f"blk.1.attn_{name}.weight"] for name in "qk")
        score = rotated_neighbors(q[of_q] @ x, 9, 5000.0) @ rotated_neighbors(k[of_k] @ y, 4, 5000.0)
        garbage = rotated_halves(q[of_q] @ x, 9, 5000.0) @ rotated_halves(k[of_k] @ y, 4, 5000.0)
        assert score == pytest.approx(expected, rel=1e-9) and garbage != pytest.approx(expected, rel=1e-2)


def test_a_misplaced_tensor_stops_the_export(tmp_path, monkeypatch):
    source = saved(tmp_path / "llama", ARCHITECTURES["llama"])
    monkeypatch.setattr("align.compress.gguf_export.stored_form", lambda found, config, name, value: value)
    with pytest.raises(RunError, match=r"k_proj\.weight differs from the policy's by 1\.\d+ of its norm"):
        exported(source)


def test_nan_among_the_weights_stops_the_export(tmp_path):
    source = saved(tmp_path / "llama", ARCHITECTURES["llama"])
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"model\.norm\.weight differs from the policy's by nan of its norm"):
        exported(source, "F16")


def test_llama_3s_scaled_frequencies_are_divided_by_the_stored_factors(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    source = saved(tmp_path / "llama", {"model_type": "llama", "rope_parameters": rope})
    file, _ = exported(source, "F16")
    (factors,) = (each.data for each in gguf.GGUFReader(file).tensors if each.name == "rope_freqs.weight")
    frequencies = 10000.0 ** (-np.arange(8) / 8) / factors
    np.testing.assert_allclose(loaded(source).model.rotary_emb.inv_freq.numpy(), frequencies, rtol=1e-6)
    assert set(np.round(factors, 4)) >= {1.0, 8.0}
    torch.testing.assert_close(logits(loaded(file.parent)), logits(loaded(source)), atol=0.05, rtol=0)


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_special_tokens_template_and_generation_settings_are_in_the_file(tmp_path):
    source = saved(tmp_path / "llama", ARCHITECTURES["llama"])
    settings = {"eos_token_id": [1, 0, 5], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40}
    (source / "generation_config.json").write_text(json.dumps(settings))
    file, report = exported(source)
    found, tokenizer = fields(file), load_tokenizer(PolicySettings(path=str(source)))
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id == 1
    assert (found["tokenizer.ggml.eot_token_id"], found["tokenizer.ggml.padding_token_id"]) == (0, 2)
    assert not found["tokenizer.ggml.add_bos_token"] and not found["tokenizer.ggml.add_eos_token"]
    assert found["general.sampling.temp"] == pytest.approx(0.7) and found["general.sampling.top_k"] == 40
    assert report["notes"] == ["generation also stops at the tokens [5], which a GGUF file has no key for"]
    assert loaded(file.parent).generation_config.eos_token_id == [1, 0, 5]
    assert len(found["tokenizer.ggml.tokens"]) == len(tokenizer) + 3 == found["llama.vocab_size"]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_tokenizer_in_the_file_encodes_as_the_policys(kind, tmp_path):
    tokenizer = sentencepiece_tokenizer() if kind == "sentencepiece" else None
    source = saved(tmp_path / kind, ARCHITECTURES["llama"], tokenizer)
    file, _ = exported(source)
    own = load_tokenizer(PolicySettings(path=str(source)))
    (tmp_path / "alone").mkdir()
    shutil.copy(file, tmp_path / "alone")
    alone = AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file=file.name)
    beside = load_tokenizer(PolicySettings(path=str(file.parent)))
    texts = [*TEXTS, own.apply_chat_template([{"role": "user", "content": TEXTS[0]}], tokenize=False)]
    for text in texts:
        expected = own.encode(text, add_special_tokens=False)
        assert beside.encode(text, add_special_tokens=False) == expected
        assert alone.encode(text, add_special_tokens=False) == expected
    assert alone.chat_template == own.chat_template


def merged_by_score(text, scores):
    """Return tokens as llama.cpp's SentencePiece tokenizer does: merge the neighbors of the best score, repeatedly."""
    parts = list("▁" + text.replace(" ", "▁"))
    while pairs := [(-scores[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]:
        _, at = min(pairs)
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts


def test_the_scores_of_sentencepiece_order_merges_as_the_tokenizer_does():
    tokenizer = sentencepiece_tokenizer()
    found = vocabulary(tokenizer, size=len(tokenizer))
    assert (found.model, found.space_prefix) == ("llama", True)
    scores = dict(zip(found.tokens, found.scores, strict=True))
    for text in TEXTS[:2]:
        expected = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
        assert merged_by_score(text, scores) == expected and len(expected) < len(text)
    kinds = {token: kind.name for token, kind in zip(found.tokens, found.types, strict=True)}
    names = {"<unk>": "UNKNOWN", "<s>": "CONTROL", "<0x41>": "BYTE", "▁": "NORMAL"}
    assert {token: kinds[token] for token in names} == names


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(pattern):
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, {**BYTES, "use_regex": False}]}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({**BYTES, "use_regex": True}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [DIGITS, {**BYTES, "use_regex": True}]}, "smollm"),
        (split(LLAMA_3), "llama-bpe"),
        (split(LLAMA_3.replace("{1,3}", "")), "qwen2"),
        (split(r"\w+"), None),
        ({**BYTES, "use_regex": True, "add_prefix_space": True}, None),
    ],
)
def test_pre_tokenizers_get_llama_cpps_name_and_an_unknown_one_is_an_error(part, name):
    tokenizer = tiny_policy()[1]
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["pre_tokenizer"], parts["model"]["ignore_merges"] = part, True
    tokenizer.backend_tokenizer.from_str(json.dumps(parts))
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(parts))
    if name is not None:
        assert vocabulary(tokenizer, size=len(tokenizer)).pre == name
        return
    with pytest.raises(InputError, match=r"no name that `align` knows for the pre-tokenizer .*set pre_tokenizer"):
        vocabulary(tokenizer, size=len(tokenizer))
    assert vocabulary(tokenizer, size=len(tokenizer), pre="mine").pre == "mine"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "no architecture that GGUF export supports is called 'gpt2'"),
        ({"model_type": "llama", "attention_bias": True}, "llama cannot hold that attention_bias is True"),
        ({"model_type": "gemma2", "head_dim": 16}, "gemma2 cannot hold that query_pre_attn_scalar is 256"),
        (
            {**ARCHITECTURES["gemma2"], "attn_logit_softcapping": None},
            "gemma2 cannot hold that attn_logit_softcapping is None",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "RoPE scaling 'yarn' is not exported",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused(config, message, tmp_path, monkeypatch):
    if config["model_type"] == "gpt2":
        monkeypatch.setattr("exported.SMALL", {"n_embd": 64, "n_head": 2, "n_layer": 1})
    source = saved(tmp_path / "plain", config)
    with pytest.raises(InputError, match=message):
        exported(source)


def test_adapters_are_merged_first_and_never_into_a_quantized_base(tmp_path):
    source = saved(tmp_path / "base", ARCHITECTURES["llama, tied"])
    settings = PolicySettings(path=str(source), lora=LoraSettings(rank=2, targets=["q_proj", "embed_tokens"]))
    policy, tokenizer = load_policy(settings)
    for value in policy.parameters():
        if value.requires_grad:
            value.data += 0.1
    save_policy(policy, tokenizer, tmp_path / "adapters", merge=False)
    (tmp_path / "out").mkdir()
    export_policy(str(tmp_path / "adapters"), tmp_path / "out" / "merged.gguf", GgufSettings(gguf="F16"))
    merged, found = loaded(tmp_path / "adapters"), loaded(tmp_path / "out")
    policy, _ = load_policy(PolicySettings(path=str(tmp_path / "adapters")))
    for name, value in policy.hf.state_dict().items():
        expected = value.half().float() if value.dim() > 1 else value
        assert torch.equal(found.state_dict()[name], expected), name
    assert not torch.equal(merged.state_dict()["model.embed_tokens.weight"], found.state_dict()["lm_head.weight"])
    info = json.loads((tmp_path / "adapters" / "made_of.json").read_text())
    (tmp_path / "adapters" / "made_of.json").write_text(json.dumps({**info, "quantize": "nf4"}))
    with pytest.raises(InputError, match=r"is quantized \(nf4\), and adapters are never merged into quantized weights"):
        export_policy(str(tmp_path / "adapters"), tmp_path / "out" / "again.gguf", GgufSettings())
