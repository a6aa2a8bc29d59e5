"""A saved folder holds the trained model: adapters on tied weights, and the comparison after a save."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MORE_TREE, SEQUENCES, SMALL, TREE, learned, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.errors import InputError, RunError
from align.models.policy import load_policy, save_policy
from align.models.reward_model import load_reward_model, save_reward_model, set_pad_token
from align.models.saving import weights as saving
from align.models.saving.comparison import compare_saved, model_outputs, random_groups
from align.models.settings import HeadSettings, LoraSettings, PolicySettings

TIED = SMALL | {"model_type": "llama", "vocab_size": 300, "tie_word_embeddings": True}
IDS = torch.arange(3, 20)[None]
GROUPS = [SEQUENCES["many"][:2], SEQUENCES["a pair"]]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}

# Adapters on the embeddings of tied models: configuration and targets
TIED_TARGETS = {
    "embeddings": (TIED, ["embed_tokens"]),
    "embeddings and others": (TIED, ["embed_tokens", "q_proj"]),
    "a regular expression": (TIED, r".*(embed_tokens|up_proj)"),
    "gemma, which scales its embeddings": (TIED | {"model_type": "gemma"}, ["embed_tokens", "v_proj"]),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ["wte", "c_fc"],
    ),
    "a model whose weights are not tied": (TIED | {"tie_word_embeddings": False}, ["embed_tokens", "q_proj"]),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def save_base(config, tokenizer_folder, folder):
    save_policy(*load_policy(PolicySettings(from_config=config, tokenizer=str(tokenizer_folder))), folder)
    return str(folder)


def adapted(path, targets, adapters="merged", **settings):
    return load_policy(PolicySettings(path=path, lora=LoraSettings(targets=targets, adapters=adapters, **settings)))


@pytest.mark.parametrize("how", TIED_TARGETS)
def test_merged_adapters_on_a_tied_weight_change_only_their_own_layer(tokenizer_folder, tmp_path, how):
    config, targets = TIED_TARGETS[how]
    base = save_base(config, tokenizer_folder, tmp_path / "base")
    policy, tokenizer = adapted(base, targets)
    head = policy.base.get_output_embeddings().weight.detach().clone()
    expected = logits(learned(policy, 1).hf)
    before = model_outputs(policy, GROUPS)
    written = save_policy(policy, tokenizer, tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(saved), expected, **TOLERANCE)
    assert torch.equal(saved.get_output_embeddings().weight, head), "the head has no adapter"
    assert not saved.config.tie_word_embeddings
    again, _ = load_policy(PolicySettings(path=str(tmp_path / "merged")))
    assert compare_saved(again, before, written=written, folder=tmp_path) < 1e-4
    after, tokenizer = load_policy(PolicySettings(path=str(tmp_path / "merged")))
    save_policy(after, tokenizer, tmp_path / "next")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "next")), logits(saved))


@pytest.mark.parametrize("adapters", ["continued", "stacked"])
@pytest.mark.parametrize("how", [name for name in TIED_TARGETS if "not tied" not in name])
def test_adapters_on_a_tied_weight_are_not_kept(tokenizer_folder, tmp_path, how, adapters):
    config, targets = TIED_TARGETS[how]
    base = save_base(config, tokenizer_folder, tmp_path / "base")
    with pytest.raises(InputError, match=r"^policy\.lora\.targets: (embed_tokens|wte) shares its weight"):
        adapted(base, targets, adapters)


def test_adapters_of_others_on_a_tied_weight_load_merged_and_are_not_trained_further(tokenizer_folder, tmp_path):
    base = save_base(TIED, tokenizer_folder, tmp_path / "base")
    policy, tokenizer = adapted(base, ["embed_tokens", "q_proj"])
    expected = logits(learned(policy, 1).hf)
    save_policy(policy, tokenizer, tmp_path / "adapters", merge=False)
    plain, _ = load_policy(PolicySettings(path=str(tmp_path / "adapters")))
    torch.testing.assert_close(logits(plain.hf), expected, **TOLERANCE)
    for adapters in ("continued", "stacked"):
        with pytest.raises(InputError, match="embed_tokens shares its weight"):
            load_policy(PolicySettings(path=str(tmp_path / "adapters"), lora=LoraSettings(adapters=adapters)))


def test_a_reward_model_with_adapters_on_its_embeddings_is_saved_as_trained(tokenizer_folder, tmp_path):
    base = save_base(TIED, tokenizer_folder, tmp_path / "base")
    settings = PolicySettings(path=base, lora=LoraSettings(targets=["embed_tokens", "q_proj"]))
    model, tokenizer = load_reward_model(settings, HeadSettings(attributes=("good",)))
    set_pad_token(model, tokenizer, {5})
    expected = model_outputs(learned(model, 1), GROUPS)
    written = save_reward_model(model, tokenizer, tmp_path / "saved")
    again, _ = load_reward_model(PolicySettings(path=str(tmp_path / "saved")))
    assert compare_saved(again, expected, written=written, folder=tmp_path) < 1e-4
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    scores = [stock(input_ids=torch.from_numpy(each.ids.astype(np.int64))[None]).logits for each in expected.sequences]
    torch.testing.assert_close(torch.cat(scores), expected.values, **TOLERANCE)


def edited(name, **values):
    def change(folder):
        written = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(written | values))

    return change


def one_bit(folder):
    (file,) = folder.glob("*model.safetensors")
    weights = load_file(file)
    name = min(weights)
    weights[name].view(torch.int32).flatten()[-1] ^= 1
    save_file(weights, file, metadata={"format": "pt"})


def written(write, folder):
    """The files of a model's weights, by name."""
    write(folder)
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "gemma"])
def test_files_of_weights_are_those_of_transformers(tmp_path, monkeypatch, kind, dtype):
    """Also those of an index, where experts that files hold one by one do not fall into several of them."""
    name, settings = (TREE | MORE_TREE)[kind]
    tied = {"tie_word_embeddings": kind == "gemma"}
    tiny_model(name, settings | tied).save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    if kind == "gemma":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for limit in (10**9, *([10_000] if kind in ("llama", "gpt2", "gemma") else [])):
        monkeypatch.setattr(saving, "SHARD_BYTES", limit)
        (tmp_path / f"own-{limit}").mkdir()
        own = written(partial(saving.write_weights, model, dtype=dtype), tmp_path / f"own-{limit}")
        save = partial(model.save_pretrained, state_dict=dict(weights), max_shard_size=limit)
        theirs = written(save, tmp_path / f"theirs-{limit}")
        assert own == theirs and (len(own) > 2) == (limit < 10**9)


DAMAGE = {
    "the last bit of a weight": (("merged", "continued", "stacked"), one_bit),
    "the base of the rotary embedding": (("merged",), edited("config.json", rope_parameters={"rope_theta": 10.0})),
    "the epsilon of the norms": (("merged",), edited("config.json", rms_norm_eps=0.1)),
    "the activation": (("merged",), edited("config.json", hidden_act="relu")),
    "the scale of the adapters": (("continued", "stacked"), edited("adapter_config.json", lora_alpha=64)),
}


@pytest.mark.parametrize(("adapters", "how"), [(way, how) for how, (ways, _) in DAMAGE.items() for way in ways])
def test_a_folder_that_is_not_what_was_trained_is_found(tokenizer_folder, tmp_path, adapters, how):
    base = save_base(SMALL | {"model_type": "llama", "vocab_size": 300}, tokenizer_folder, tmp_path / "base")
    policy, tokenizer = adapted(base, "all-linear", adapters, rank=4)
    expected = model_outputs(learned(policy, 1), GROUPS)
    written = save_policy(policy, tokenizer, tmp_path / "saved", merge=adapters == "merged")
    lora = None if adapters == "merged" else LoraSettings(adapters="continued")
    settings = PolicySettings(path=str(tmp_path / "saved"), lora=lora)
    assert compare_saved(load_policy(settings)[0], expected, written=written, folder=tmp_path) < 1e-4
    DAMAGE[how][1](tmp_path / "saved")
    with pytest.raises(RunError, match="are not those that were saved|differs from the trained one by up to"):
        compare_saved(load_policy(settings)[0], expected, written=written, folder=tmp_path)


def test_outputs_are_those_of_transformers_and_of_both_forwards(tokenizer_folder):
    policy, _ = load_policy(PolicySettings(from_config=TIED, tokenizer=str(tokenizer_folder)))
    outputs = model_outputs(policy, GROUPS)
    assert len(outputs.sequences) == 4
    for each, values in zip(
        outputs.sequences, outputs.values.split([len(each.ids) - 1 for each in outputs.sequences]), strict=True
    ):
        ids = torch.from_numpy(each.ids.astype(np.int64))
        logps = policy.hf(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        torch.testing.assert_close(values, logps[range(len(ids) - 1), ids[1:]].detach(), **TOLERANCE)
    policy.use_forward("tree")
    torch.testing.assert_close(model_outputs(policy, GROUPS).values, outputs.values, **TOLERANCE)
    assert policy.training
    assert {int(each.max()) // 100 for group in random_groups(300) for each in [group[0].ids]} == {2}
