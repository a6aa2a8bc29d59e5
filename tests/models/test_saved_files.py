"""What a saved folder says of the model: configuration, dtype, tokenizer and generation stay what they were."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import SEQUENCES, SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from align.errors import InputError, RunError
from align.models.policy import load_policy, save_policy
from align.models.reward_model import load_reward_model, save_reward_model, set_pad_token
from align.models.saving.comparison import compare_saved, model_outputs
from align.models.saving.folder import check_saveable
from align.models.settings import LoraSettings, PolicySettings

LLAMA = SMALL | {"model_type": "llama", "vocab_size": 300}
GROUPS = [SEQUENCES["many"][:2], SEQUENCES["a pair"]]


@pytest.fixture
def model(tokenizer_folder, tmp_path):
    """Return a folder with a policy."""
    save_policy(*load_policy(PolicySettings(from_config=LLAMA, tokenizer=str(tokenizer_folder))), tmp_path / "model")
    return tmp_path / "model"


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def saved_again(path, folder, **options):
    save_policy(*load_policy(PolicySettings(path=str(path))), folder, **options)
    return folder


def content(folder, name="config.json"):
    return json.loads((folder / name).read_text())


DROPOUT = {
    "llama": {**LLAMA, "attention_dropout": 0.125},
    "gpt2": {
        "model_type": "gpt2",
        **{"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        **{"attn_pdrop": 0.125, "embd_pdrop": 0.25, "resid_pdrop": 0.5},
    },
    "phimoe": {
        **{name: LLAMA[name] for name in LLAMA if name != "head_dim"},
        "model_type": "phimoe",
        "num_local_experts": 4,
        "router_jitter_noise": 0.25,
    },
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_off_in_training_and_stays_in_the_saved_configuration(tokenizer_folder, tmp_path, kind):
    wanted = {name: value for name, value in DROPOUT[kind].items() if any(word in name for word in ("drop", "jitter"))}
    policy, tokenizer = load_policy(PolicySettings(from_config=DROPOUT[kind], tokenizer=str(tokenizer_folder)))
    assert all(getattr(policy.base.config, name) == 0 for name in wanted)
    save_policy(policy, tokenizer, tmp_path / "first")
    again, _ = load_policy(PolicySettings(path=str(tmp_path / "first")))
    assert all(getattr(again.base.config, name) == 0 for name in wanted)
    second = saved_again(tmp_path / "first", tmp_path / "second")
    for folder in (tmp_path / "first", second):
        assert {name: content(folder)[name] for name in wanted} == wanted


def test_a_reward_model_keeps_the_dropout_of_its_policy(tokenizer_folder, tmp_path):
    save_policy(
        *load_policy(PolicySettings(from_config=DROPOUT["llama"], tokenizer=str(tokenizer_folder))), tmp_path / "a"
    )
    reward, tokenizer = load_reward_model(PolicySettings(path=str(tmp_path / "a")))
    set_pad_token(reward, tokenizer, {1})
    save_reward_model(reward, tokenizer, tmp_path / "b")
    assert content(tmp_path / "b")["attention_dropout"] == 0.125


def test_adapters_that_are_trained_further_keep_their_dropout(model, tmp_path):
    options = {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    foreign = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**options))
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "foreign")
    foreign.save_pretrained(tmp_path / "foreign")
    settings = PolicySettings(path=str(tmp_path / "foreign"), lora=LoraSettings(adapters="continued"))
    policy, tokenizer = load_policy(settings)
    save_policy(policy, tokenizer, tmp_path / "saved", merge=False)
    assert content(tmp_path / "saved", "adapter_config.json")["lora_dropout"] == 0.5


@pytest.mark.parametrize(
    "name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "TokenizersBackend"]
)
def test_the_class_of_the_tokenizer_stays(model, tmp_path, name):
    edit(model / "tokenizer_config.json", tokenizer_class=name)
    folder = saved_again(model, tmp_path / "saved")
    assert content(folder, "tokenizer_config.json")["tokenizer_class"] == name
    text = "Hello, world!"
    assert AutoTokenizer.from_pretrained(folder).encode(text) == AutoTokenizer.from_pretrained(model).encode(text)


# dtype of the model's own files, what is asked for, and what is saved
DTYPES = [
    ("bfloat16", "original", "bfloat16"),
    ("float32", "original", "float32"),
    ("float16", "original", "float16"),
    ("bfloat16", "fp32", "float32"),
    ("float32", "bf16", "bfloat16"),
]


@pytest.mark.parametrize(("own", "asked", "expected"), DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_saved_in_the_dtype_of_the_original_or_that_asked_for(model, tmp_path, own, asked, expected, tied):
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, own))
    if tied:
        stock.config.tie_word_embeddings = True
        stock.tie_weights()
    stock.save_pretrained(tmp_path / "own")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "own")
    policy, tokenizer = load_policy(PolicySettings(path=str(tmp_path / "own")))
    assert {value.dtype for value in policy.parameters()} == {torch.float32}, "trained in fp32"
    generator = torch.Generator().manual_seed(0)
    for value in policy.parameters():
        value.data += 0.01 * torch.randn(value.shape, generator=generator)
    trained = {name: value.detach().clone() for name, value in policy.hf.named_parameters()}
    expected_outputs = model_outputs(policy, GROUPS)
    written = save_policy(policy, tokenizer, tmp_path / "saved", dtype=asked)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert content(tmp_path / "saved")["dtype"] == expected
    assert weights.keys() == trained.keys(), "a tied weight is written once"
    for name, value in weights.items():
        assert torch.equal(value, trained[name].to(getattr(torch, expected)))
    assert all(torch.equal(value, trained[name]) for name, value in policy.hf.named_parameters()), "and is left alone"
    again, _ = load_policy(PolicySettings(path=str(tmp_path / "saved")))
    compare_saved(again, expected_outputs, written=written, folder=tmp_path)
    edit(tmp_path / "saved" / "config.json", rms_norm_eps=1e6)
    again, _ = load_policy(PolicySettings(path=str(tmp_path / "saved")))
    with pytest.raises(RunError, match="differs from the trained one"):
        compare_saved(again, expected_outputs, written=written, folder=tmp_path)


# As published: transformers loads them and refuses to save them
INEFFECTIVE = {
    "temperature": {"do_sample": False, "temperature": 0.7},
    "several": {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
    "no word of sampling": {"temperature": 0.2, "typical_p": 0.5},
    "beams": {"length_penalty": 2.0, "early_stopping": True},
}


@pytest.mark.parametrize("how", INEFFECTIVE)
def test_a_generation_configuration_with_fields_without_effect_is_saved_without_them(model, tmp_path, how):
    wanted = INEFFECTIVE[how]
    edit(model / "generation_config.json", **wanted)
    policy, tokenizer = load_policy(PolicySettings(path=str(model)))
    assert set(check_saveable(policy, tokenizer)) == wanted.keys() - {"do_sample"}
    save_policy(policy, tokenizer, tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert not saved.do_sample and saved.eos_token_id is not None
    saved.validate(strict=True)


def test_effective_fields_of_a_generation_configuration_stay(model, tmp_path):
    wanted = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    edit(model / "generation_config.json", **wanted)
    saved = content(saved_again(model, tmp_path / "saved"), "generation_config.json")
    assert {name: saved[name] for name in wanted} == wanted


IMPOSSIBLE = {
    "no new tokens": {"max_new_tokens": -1},
    "more sequences than beams": {"num_return_sequences": 3},
    "an unknown cache": {"cache_implementation": "nope"},
    "a text for a number": {"max_new_tokens": "many"},
}


@pytest.mark.parametrize("how", IMPOSSIBLE)
def test_a_generation_configuration_that_cannot_be_saved_is_refused_before_training(model, how):
    edit(model / "generation_config.json", **IMPOSSIBLE[how])
    with pytest.raises(InputError, match=r"^policy: (this model could not be saved|cannot load)") as error:
        check_saveable(*load_policy(PolicySettings(path=str(model))))
    assert "\n" not in str(error.value)


def refuse(*arguments, **named):
    raise ValueError("it is Sunday")


def test_a_tokenizer_that_cannot_be_saved_or_loads_otherwise_is_refused_before_training(model, monkeypatch):
    policy, tokenizer = load_policy(PolicySettings(path=str(model)))
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", refuse)
        with pytest.raises(InputError, match="this model could not be saved after training: .*it is Sunday"):
            check_saveable(policy, tokenizer)
    policy, tokenizer = load_policy(PolicySettings(path=str(model)))
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: [id(self)])
    with pytest.raises(InputError, match="encodes text differently once it has been saved"):
        check_saveable(policy, tokenizer)
