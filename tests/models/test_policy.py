"""Policies: loading, saving, adapters, and invalid sources."""

import json

import pytest
import torch
from tiny_models import SEQUENCES, SMALL, TREE, perturbed, stock_logps, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import Policy, load_policy, response_logps, save_policy
from align.models.settings import LoraSettings, PolicySettings
from align.models.tree.batch import plain_batch, tree_batch
from align.models.weights import fingerprint

FRESH = SMALL | {"model_type": "llama", "vocab_size": 300}
IDS = torch.arange(3, 20)[None]


@pytest.fixture
def settings(tokenizer_folder):
    """Return settings of a randomly initialized policy, with changes by name."""
    return lambda **changes: PolicySettings(**{"from_config": FRESH, "tokenizer": str(tokenizer_folder)} | changes)


@pytest.fixture
def model_folder(tmp_path, settings):
    policy, tokenizer = load_policy(settings())
    save_policy(policy, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def weights(policy):
    return policy.hf.state_dict()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_path_stands_for_settings_with_it(model_folder):
    expected, _ = load_policy(PolicySettings(path=str(model_folder)))
    for path in (model_folder, str(model_folder)):
        policy, tokenizer = load_policy(path)
        assert fingerprint(policy) == fingerprint(expected) and tokenizer.chat_template is not None


def test_a_randomly_initialized_policy_depends_only_on_its_seed(settings):
    torch.manual_seed(1)
    first, _ = load_policy(settings(seed=7))
    torch.manual_seed(2)
    second, _ = load_policy(settings(seed=7))
    other, _ = load_policy(settings(seed=8))
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    assert not torch.equal(weights(first)["lm_head.weight"], weights(other)["lm_head.weight"])


@pytest.mark.parametrize("lora", [None, LoraSettings()])
def test_loading_a_policy_leaves_the_global_generator_unchanged(settings, lora):
    before = torch.get_rng_state()
    load_policy(settings(lora=lora))
    assert torch.equal(torch.get_rng_state(), before)


def test_new_adapters_depend_on_the_seed(settings):
    found = [weights(load_policy(settings(lora=LoraSettings(rank=4), seed=seed))[0]) for seed in (7, 7)]
    adapters = [name for name in found[0] if "lora_A" in name]
    assert len(adapters) == 14, "seven linear layers in two blocks, and not the LM head"
    assert all(torch.equal(found[0][name], found[1][name]) and found[0][name].any() for name in adapters)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("forward", ["plain", "tree"])
def test_a_saved_policy_loads_bit_for_bit(settings, tmp_path, tied, forward):
    policy, tokenizer = load_policy(settings(from_config=FRESH | {"tie_word_embeddings": tied}))
    policy.use_forward("plain")
    expected = logits(policy.hf)
    policy.use_forward(forward)
    save_policy(policy, tokenizer, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)
    assert loaded.dtype == torch.float32
    written = (tmp_path / "saved" / "config.json").read_text()
    assert "attn_implementation" not in written and "align" not in written
    assert json.loads(written)["tie_word_embeddings"] == tied
    assert [file.name for file in (tmp_path / "saved").iterdir() if file.suffix in (".bin", ".pt", ".pkl")] == []


def test_tokenizer_template_and_end_of_sequence_are_saved_with_it(model_folder, tokenizer_folder):
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tokenizer_folder, model_folder))
    assert after.chat_template == before.chat_template
    assert after.get_vocab() == before.get_vocab()
    generation = json.loads((model_folder / "generation_config.json").read_text())
    assert generation["pad_token_id"] == before.pad_token_id


def test_the_chat_template_of_the_settings_is_the_tokenizers_and_is_saved_with_it(settings, tmp_path):
    policy, tokenizer = load_policy(settings(chat_template="chatml"))
    save_policy(policy, tokenizer, tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        text = each.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert text == "<|im_start|>user\na<|im_end|>\n"


STOPS = [(1, None, 1), (None, 9, [1, 9]), ([7, 8], 9, [1, 7, 8, 9])]


@pytest.mark.parametrize(("before", "end_of_turn", "after"), STOPS)
def test_generation_stops_at_eos_end_of_turn_and_previous_stop_tokens(tmp_path, settings, before, end_of_turn, after):
    policy, tokenizer = load_policy(settings(from_config=FRESH | {"eos_token_id": before}))
    assert tokenizer.eos_token_id == 1
    save_policy(policy, tokenizer, tmp_path, end_of_turn=end_of_turn)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == after


def test_the_fingerprint_survives_saving_and_loading(settings, model_folder):
    loaded, _ = load_policy(PolicySettings(path=str(model_folder)))
    assert fingerprint(loaded) == fingerprint(load_policy(settings())[0])


def test_every_weight_changes_the_fingerprint(settings):
    policy = perturbed(load_policy(settings(lora=LoraSettings(rank=2)))[0])
    seen = {fingerprint(policy)}
    for _, value in policy.named_parameters():
        value.data.flatten()[-1] += 2**-10
        seen.add(fingerprint(policy))
    assert len(seen) == 1 + len(list(policy.parameters())) > 30


@pytest.mark.parametrize("checkpointing", [False, True])
def test_merged_adapters_give_the_same_logits(settings, tmp_path, checkpointing):
    policy, tokenizer = load_policy(settings(lora=LoraSettings(rank=4), gradient_checkpointing=checkpointing))
    fresh = logits(policy.hf)
    expected = logits(perturbed(policy).hf)
    assert not torch.allclose(expected, fresh, atol=0.01)
    save_policy(policy, tokenizer, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_in_the_working_directory_is_ignored(settings, tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    load_policy(settings())


def test_dropout_and_router_noise_are_off_everywhere(settings):
    fresh = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "attn_pdrop": 0.3}
    policy, _ = load_policy(settings(from_config=fresh))
    rates = {module.p for module in policy.modules() if isinstance(module, torch.nn.Dropout)}
    assert policy.training and rates == {0.0}
    assert torch.equal(logits(policy.hf), logits(policy.hf))
    assert {name: value for name, value in policy.base.config.to_dict().items() if "pdrop" in name and value} == {}
    noisy = FRESH | {"model_type": "phimoe", "num_local_experts": 4, "router_jitter_noise": 0.1}
    policy, _ = load_policy(settings(from_config={name: value for name, value in noisy.items() if name != "head_dim"}))
    assert torch.equal(logits(policy.hf), logits(policy.hf))


def test_a_checkpoints_dropout_is_off_too(settings, tmp_path):
    policy, tokenizer = load_policy(settings())
    save_policy(policy, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attention_dropout": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy, _ = load_policy(PolicySettings(path=str(tmp_path)))
    assert torch.equal(logits(policy.hf), logits(policy.hf))


def test_gradient_checkpointing_follows_the_setting(settings):
    for wanted in (False, True):
        policy, _ = load_policy(settings(gradient_checkpointing=wanted))
        assert policy.base.is_gradient_checkpointing == wanted


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_switching_back_from_the_tree_restores_the_models_attention(kind):
    policy = Policy(tiny_model(*TREE[kind]))
    own = policy.base.config._attn_implementation
    policy.use_forward("tree")
    assert policy.is_tree
    policy.use_forward("plain")
    assert policy.base.config._attn_implementation == own


def test_a_batch_for_the_other_forward_is_rejected():
    policy = Policy(tiny_model("llama"))
    with pytest.raises(AssertionError):
        policy(tree_batch(SEQUENCES["a pair"]))
    policy.use_forward("tree")
    with pytest.raises(AssertionError):
        policy(plain_batch(SEQUENCES["a pair"]))


def truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def without_head(folder):
    model = LlamaForSequenceClassification(LlamaConfig(**FRESH, num_labels=5))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def with_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


BROKEN = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load a model"),
    "truncated weights": (lambda folder: truncated(folder / "model.safetensors"), "cannot load a model"),
    "another size": (with_config(hidden_size=64), "cannot load a model"),
    "a value of the wrong type": (with_config(hidden_size="wide"), "cannot load a model"),
    "an unknown architecture": (with_config(model_type="lama"), "cannot load a model"),
    "not a causal language model": (with_config(model_type="t5"), "cannot load a model"),
    "a configuration that is not JSON": (lambda folder: truncated(folder / "config.json"), "cannot load a model"),
    "a missing LM head": (without_head, "lacks 1 of the model's weights, such as lm_head.weight"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load a tokenizer"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_folder_raises_a_one_line_error(model_folder, how, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change, words = BROKEN[how]
    change(model_folder)
    with pytest.raises(InputError) as error:
        load_policy(PolicySettings(path=str(model_folder)))
    assert words in str(error.value) and str(model_folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_told_beside_what_the_hub_says(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot load a model from 'models/gone' \(no such folder here\): "):
        load_policy(PolicySettings(path="models/gone"))


INVALID_CONFIGS = {
    "no model_type": ({"model_type": None}, "from_config.model_type: a transformers architecture is required"),
    "an unknown model_type": ({"model_type": "lama"}, "'lama'; did you mean 'llama'?"),
    "an unknown key": (
        {"hidden_sise": 32},
        "from_config.hidden_sise: unknown key of llama; did you mean 'hidden_size'?",
    ),
    "a value of the wrong type": ({"hidden_size": "wide"}, "expected int, got str"),
    "a width that heads do not divide": ({"hidden_size": 30}, "not a multiple of the number of attention heads"),
    "an unknown activation": ({"hidden_act": "relux"}, "relux"),
    "not a causal language model": ({"model_type": "t5", "num_key_value_heads": None}, "T5Config"),
}


@pytest.mark.parametrize("how", INVALID_CONFIGS)
def test_an_invalid_configuration_raises_a_one_line_error(settings, how):
    changes, words = INVALID_CONFIGS[how]
    fresh = FRESH | changes
    if changes.get("model_type") == "t5":
        fresh = {"model_type": "t5"}
    with pytest.raises(InputError) as error:
        load_policy(settings(from_config=fresh))
    assert words in str(error.value)
    assert "\n" not in str(error.value) and "policy.from_config" in str(error.value)


def test_exactly_one_of_path_and_from_config_is_required(settings):
    for wrong in (PolicySettings(), settings(path="somewhere")):
        with pytest.raises(InputError, match="either path .* or from_config"):
            load_policy(wrong)


def test_from_config_requires_a_tokenizer():
    with pytest.raises(InputError, match=r"policy\.tokenizer"):
        load_tokenizer(PolicySettings(from_config=FRESH))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_rejected(settings):
    with pytest.raises(InputError, match="tokenizer has 259 tokens but the model only 100 embeddings"):
        load_policy(settings(from_config=FRESH | {"vocab_size": 100}))


def test_a_missing_path_is_named_in_the_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'/no/such/model'"):
        load_policy(PolicySettings(path="/no/such/model"))


def test_an_adapter_on_the_lm_head_is_rejected(settings):
    with pytest.raises(InputError, match="the LM head cannot have an adapter"):
        load_policy(settings(lora=LoraSettings(targets=["lm_head", "q_proj"])))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["no_such_layer"],
            r"policy\.lora\.targets: the model has no module 'no_such_layer'; .*available: down_",
        ),
        (
            ["q_proj", "vproj"],
            r"policy\.lora\.targets: the model has no module 'vproj'; did you mean 'v_proj'\?",
        ),
        ("no_such_layer", "policy\\.lora\\.targets: .*no_such_layer"),
    ],
)
def test_unknown_target_modules_are_rejected(settings, targets, message):
    with pytest.raises(InputError, match=f"^{message}"):
        load_policy(settings(lora=LoraSettings(targets=targets)))


def test_policy_logps_equal_those_of_transformers_logits(settings):
    policy, _ = load_policy(settings())
    sequences = SEQUENCES["many"]
    expected = stock_logps(policy.base, sequences)
    for name, make in (("plain", plain_batch), ("tree", tree_batch)):
        policy.use_forward(name)
        torch.testing.assert_close(policy(make(sequences)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("forward", ["tree", "plain"])
def test_response_logps_are_sums_over_plain_logits(settings, forward):
    policy, _ = load_policy(settings())
    by_size = [SEQUENCES["13 responses"][:2], SEQUENCES["one"], SEQUENCES["shared response prefixes"]]
    groups = [TokenGroup(tuple(sequences), None, None, (), row) for row, sequences in enumerate(by_size)]
    rows = [
        torch.stack([stock_logps(policy.base, [one]).double().sum() for one in group.sequences]) for group in groups
    ]
    expected = torch.stack([torch.nn.functional.pad(row, (0, 4 - len(row))) for row in rows])
    weights = torch.arange(1.0, 13.0).view(3, 4)
    gradients = torch.autograd.grad((weights * expected).sum(), list(policy.parameters()))
    policy.use_forward(forward)
    logps = response_logps(policy, groups)
    assert (logps.shape, logps.dtype) == ((3, 4), torch.float64)
    torch.testing.assert_close(logps, expected, rtol=0, atol=5e-5)
    for value, other in zip(
        torch.autograd.grad((weights * logps).sum(), list(policy.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
