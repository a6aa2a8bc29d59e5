"""GGUF files as policies: loading, saving as a folder, and invalid files."""

import os

import gguf
import numpy as np
import pytest
import torch
from tiny_models import perturbed
from transformers import AutoModelForCausalLM

from align.errors import InputError
from align.models.loading.pretrained import silence_transformers
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.settings import LoraSettings, PolicySettings
from align.models.weights import fingerprint

IDS = torch.arange(3, 20)[None]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_missing_or_invalid_gguf_file_is_named_in_the_error(tmp_path):
    with pytest.raises(InputError, match=r"no such GGUF file: .*nowhere\.gguf"):
        load_policy(PolicySettings(path=f"gguf:{tmp_path}/nowhere.gguf"))
    (tmp_path / "letter.gguf").write_text("Dear reader")
    with pytest.raises(InputError, match=r"letter\.gguf"):
        load_policy(PolicySettings(path=f"gguf:{tmp_path}/letter.gguf"))
    with pytest.raises(InputError, match=r"letter\.gguf"):
        load_tokenizer(PolicySettings(path=f"gguf:{tmp_path}/letter.gguf"))


@pytest.fixture
def tiny_gguf(tmp_path):
    """Write a GGUF file of a random Llama, with llama.cpp's names of its weights."""
    width, wide, heads, tokens = 32, 48, 4, 300
    shapes = {"token_embd": (tokens, width), "output": (tokens, width), "output_norm": (width,)}
    for layer in range(2):
        block = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (width, wide)}
        block |= {f"attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
        block |= {"ffn_gate": (wide, width), "ffn_up": (wide, width)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    draw = np.random.default_rng(0)
    drawn = {name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(tokens)
    for name, value in drawn.items():
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"gguf:{tmp_path}/tiny.gguf", drawn


def test_a_gguf_file_becomes_a_plain_folder(tiny_gguf, tokenizer_folder, tmp_path):
    path, drawn = tiny_gguf
    policy, tokenizer = load_policy(PolicySettings(path=path, tokenizer=str(tokenizer_folder)))
    for name, there in {"output": "lm_head", "blk.1.ffn_up": "model.layers.1.mlp.up_proj"}.items():
        assert torch.equal(policy.hf.state_dict()[f"{there}.weight"], torch.from_numpy(drawn[name]))
    save_policy(policy, tokenizer, tmp_path / "saved")
    assert "gguf" not in (tmp_path / "saved" / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(policy.hf))
    assert fingerprint(load_policy(PolicySettings(path=str(tmp_path / "saved")))[0]) == fingerprint(policy)


def test_loading_a_gguf_file_shows_no_progress_bar(tiny_gguf, tokenizer_folder, capfd):
    silence_transformers()
    load_policy(PolicySettings(path=tiny_gguf[0], tokenizer=str(tokenizer_folder)))
    assert capfd.readouterr() == ("", "")


def test_adapters_on_a_gguf_base_load_again(tiny_gguf, tokenizer_folder, tmp_path):
    settings = PolicySettings(path=tiny_gguf[0], tokenizer=str(tokenizer_folder), lora=LoraSettings(rank=2))
    policy, tokenizer = load_policy(settings)
    expected = logits(perturbed(policy).hf)
    save_policy(policy, tokenizer, tmp_path / "adapters", merge=False)
    again, _ = load_policy(PolicySettings(path=str(tmp_path / "adapters"), lora=LoraSettings(adapters="continued")))
    assert torch.equal(logits(again.hf), expected)
    plain, _ = load_policy(PolicySettings(path=str(tmp_path / "adapters")))
    torch.testing.assert_close(logits(plain.hf), expected, atol=2e-5, rtol=1e-5)


def test_a_truncated_gguf_file_raises_a_one_line_error(tiny_gguf, tokenizer_folder, tmp_path):
    with (tmp_path / "tiny.gguf").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)
    with pytest.raises(InputError, match=r"cannot load a model from 'gguf:.*tiny\.gguf'"):
        load_policy(PolicySettings(path=tiny_gguf[0], tokenizer=str(tokenizer_folder)))
