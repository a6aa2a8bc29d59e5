"""A broken model is refused in one line that names it, whatever is wrong with its files."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from align.errors import InputError
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.reward_model import load_reward_model, save_reward_model, set_pad_token
from align.models.settings import PolicySettings
from align.testing.tiny import tiny_policy


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_policy(*tiny_policy(), folder)
    return folder


@pytest.fixture
def model(good, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def refused(path, load=load_policy):
    with pytest.raises(InputError) as error:
        load(PolicySettings(path=str(path)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


# Values that no model can have
IMPOSSIBLE = {
    "hidden_size": [-1, 0, "wide", None, 10**12, 3.5, [32]],
    "num_attention_heads": [0, -1, None, "four", 7],
    "num_hidden_layers": [-1, 0, None, "2", 1],
    "num_key_value_heads": [0, 3],
    "vocab_size": [-1, 0, None, 10**12, "many"],
    "intermediate_size": [-5, 0],
    "rms_norm_eps": ["small", None],
    "hidden_act": ["nope", None, 3],
    "head_dim": [0, -1],
    "model_type": ["nope", None, 3, ""],
    "rope_parameters": [{"rope_type": "nope"}, 3],
    "architectures": [3],
    "dtype": ["nope"],
    "pad_token_id": [10**9],
    "max_position_embeddings": [0, -1],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}, {}, 3],
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_impossible_values_of_a_configuration_are_refused_in_one_line(model, key, value):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: value}))
    assert str(model) in refused(model)


def test_a_missing_library_is_named(model):
    config = json.loads((model / "config.json").read_text())
    asked = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (model / "config.json").write_text(json.dumps(config | asked))
    assert "optimum" in refused(model)


JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json")


@pytest.mark.parametrize("body", [b"", b"[]", b"3", b"{", b"null", b"\x00\xff"])
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_torn_file_is_refused_and_named(model, name, body):
    (model / name).write_bytes(body)
    assert str(model) in refused(model)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 2000, -1])
def test_weights_that_are_cut_off_are_refused(model, size):
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:size])
    assert str(model) in refused(model)


NAMES = ("../good.safetensors", "/etc/passwd", "pytorch_model.bin", "a.pkl", "sub/a.safetensors", "", 3, None)


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_safetensors_files_of_its_own_folder_only(model, name):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "a.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "a.safetensors")}))
    load_policy(PolicySettings(path=str(model)))
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
    # All of them exist, so nothing but the name is wrong with them
    (model / "sub").mkdir()
    for other in ("../good.safetensors", "sub/a.safetensors"):
        shutil.copy(model / "a.safetensors", model / other)
    for other in ("pytorch_model.bin", "a.pkl"):
        torch.save(weights, model / other)
    assert "is not the name of a safetensors file in the same folder" in refused(model)


def test_pickled_weights_are_not_opened(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert str(model) in refused(model)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "v_head.weight", "model.layers.0.mlp.up_proj.bias"]
)
def test_a_weight_that_the_model_does_not_use_is_as_wrong_as_a_missing_one(model, name):
    change_weights(model, lambda weights: weights | {name: torch.zeros(2)})
    assert f"has 1 weights that its configuration does not use, such as {name}" in refused(model)
    change_weights(model, lambda weights: {key: value for key, value in weights.items() if "layers.1.mlp" not in key})
    assert "lacks 3 of the model's weights" in refused(model)


def test_a_reward_model_with_unused_weights_is_refused(model, tmp_path):
    reward, tokenizer = load_reward_model(PolicySettings(path=str(model)))
    set_pad_token(reward, tokenizer, {1})
    save_reward_model(reward, tokenizer, tmp_path / "reward")
    load_reward_model(PolicySettings(path=str(tmp_path / "reward")))
    assert "is a reward model, not a policy" in refused(tmp_path / "reward")
    change_weights(tmp_path / "reward", lambda weights: weights | {"lm_head.weight": torch.zeros(2)})
    assert "such as lm_head.weight" in refused(tmp_path / "reward", load_reward_model)


LONG = [
    "x" * 5000,
    "folder/" + "x" * 300,
    "gguf:" + "x" * 5000,
    "a\0b",
    "gguf:a\0b",
    "gguf:",
    "~nobody/x",
    "gguf:~nobody/x",
]


@pytest.mark.parametrize("path", LONG)
def test_a_name_that_is_no_path_is_refused_in_one_line(path):
    refused(path)
    with pytest.raises(InputError):
        load_tokenizer(PolicySettings(from_config={"model_type": "llama"}, tokenizer=path))


def gguf_file(path, *, layers, written=2):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(300)
    shapes = {"token_embd": (300, 32), "output": (300, 32), "output_norm": (32,)}
    for layer in range(written):
        block = {"attn_norm": (32,), "ffn_norm": (32,), "ffn_down": (32, 48), "ffn_gate": (48, 32), "ffn_up": (48, 32)}
        block |= {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return f"gguf:{path}"


def loads_gguf(path, tokenizer):
    return load_policy(PolicySettings(path=path, tokenizer=str(tokenizer)))


def test_a_gguf_file_with_more_or_fewer_layers_than_its_header_says_is_refused(tokenizer_folder, tmp_path):
    loads_gguf(gguf_file(tmp_path / "right.gguf", layers=2), tokenizer_folder)
    with pytest.raises(InputError, match=r"has 9 weights that its configuration does not use, such as blk\.1\."):
        loads_gguf(gguf_file(tmp_path / "more.gguf", layers=1), tokenizer_folder)
    with pytest.raises(InputError, match=r"lacks \d+ of the model's weights"):
        loads_gguf(gguf_file(tmp_path / "fewer.gguf", layers=3), tokenizer_folder)


@pytest.mark.parametrize("share", [0, 1e-5, 1e-4, 1e-3, 0.01, 0.3, 0.9, 0.999])
def test_a_gguf_file_that_is_cut_off_anywhere_is_refused_in_one_line(tokenizer_folder, tmp_path, share):
    path = gguf_file(tmp_path / "cut.gguf", layers=2)
    with (tmp_path / "cut.gguf").open("r+b") as file:
        file.truncate(int(share * (tmp_path / "cut.gguf").stat().st_size))
    with pytest.raises(InputError, match=r"cut\.gguf") as error:
        loads_gguf(path, tokenizer_folder)
    assert "\n" not in str(error.value)
