import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from align.accounting.flops import Work, decoder_from_config, forward_flops, training_flops
from align.errors import InputError

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 3, **SPECIAL}
GROUPED = {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, **SPECIAL}

CONFIGS = {
    "llama": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama, one key-value head for each": transformers.LlamaConfig(**SIZES, num_attention_heads=4),
    "llama, tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "qwen3, heads wider than hidden": transformers.Qwen3Config(**GROUPED, head_dim=24),
    "gemma": transformers.GemmaConfig(**GROUPED, head_dim=16),
    "gemma2": transformers.Gemma2Config(**GROUPED, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(**GROUPED, head_dim=16),
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2, inner": transformers.GPT2Config(**GPT2, n_inner=72),
    "opt": transformers.OPTConfig(
        **SPECIAL,
        vocab_size=131,
        hidden_size=48,
        ffn_dim=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=48,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES, num_attention_heads=4),
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=5, num_experts_per_tok=2),
    "olmoe": transformers.OlmoeConfig(**SIZES, num_attention_heads=4, num_experts=6, num_experts_per_tok=3),
    "phimoe": transformers.PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe, one dense layer": transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=24, mlp_only_layers=[1]),
    "qwen2_moe, shared expert, every second layer": transformers.Qwen2MoeConfig(
        **GROUPED, **EXPERTS, shared_expert_intermediate_size=40, decoder_sparse_step=2
    ),
}


def causal_model(config):
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_num_weights_equals_the_models_matrices(name):
    model, counted = causal_model(CONFIGS[name]), decoder_from_config(CONFIGS[name].to_dict())
    embedded = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = [weight for weight in model.parameters() if weight.ndim > 1 and id(weight) not in embedded]
    positions = sum(weight.numel() for key, weight in model.named_parameters() if "wpe" in key or "positions" in key)
    assert counted.num_linear == sum(weight.numel() for weight in matrices) - positions
    assert counted.num_weights - counted.num_linear == len(embedded) * 131 * 48


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_equal_torchs_flop_counter(name):
    model, counted = causal_model(CONFIGS[name]), decoder_from_config(CONFIGS[name].to_dict())
    tokens = torch.randint(131, (2, 29))
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=tokens, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    work = Work(2 * 29, 2 * 29**2, 2 * 29)
    assert forward.get_total_flops() == forward_flops(counted, work)
    assert forward.get_total_flops() + backward.get_total_flops() == training_flops(counted, work)


def test_flops_are_linear_in_tokens_pairs_and_targets():
    model = decoder_from_config(CONFIGS["llama"].to_dict())
    nothing = forward_flops(model, Work(0, 0, 0))
    token, pair, target = (forward_flops(model, Work(*unit)) for unit in [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
    assert nothing == 0
    assert forward_flops(model, Work(5, 7, 3)) == 5 * token + 7 * pair + 3 * target


def test_published_models_have_their_published_size():
    llama = transformers.LlamaConfig(num_key_value_heads=8, vocab_size=128256, intermediate_size=14336)
    assert decoder_from_config(llama.to_dict()).num_weights == pytest.approx(8.03e9, rel=1e-3)
    assert decoder_from_config(transformers.GPT2Config().to_dict()).num_weights == pytest.approx(124.4e6, rel=0.01)
    assert decoder_from_config(transformers.NemotronConfig().to_dict()).gated is False


WRONG_CONFIGS = [
    ({}, "has no hidden_size"),
    ({"hidden_size": 8, "num_attention_heads": 2}, "has no num_hidden_layers"),
    (transformers.DeepseekV3Config().to_dict(), "kv_lora_rank 512"),
    (transformers.GptOssConfig().to_dict(), "mixtral, olmoe, .*, not gpt_oss"),
    (transformers.Qwen3NextConfig().to_dict(), "layers of type linear_attention"),
    ({"hidden_size": [8, 16], "num_attention_heads": 2}, "hidden_size .* is not one number"),
]


@pytest.mark.parametrize(("config", "message"), WRONG_CONFIGS)
def test_unsupported_models_are_rejected(config, message):
    with pytest.raises(InputError, match=message):
        decoder_from_config(config)


ENCODERS = ["Albert", "Bert", "Camembert", "Deberta", "DebertaV2", "Electra", "MPNet", "Roberta", "XLMRoberta"]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_texts_have_no_gate(name):
    """A layer has two matrices between the hidden size and the intermediate one."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        weights = transformers.AutoModel.from_config(config).parameters()
    assert sum(sorted(weight.shape) == [16, 24] for weight in weights) == 2
    assert decoder_from_config(config.to_dict()).gated is False
