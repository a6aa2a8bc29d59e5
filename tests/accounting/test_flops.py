from math import prod

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
    "gpt_bigcode": transformers.GPTBigCodeConfig(**GPT2),
    "gptj": transformers.GPTJConfig(**GPT2, rotary_dim=4, tie_word_embeddings=False),
    "codegen": transformers.CodeGenConfig(**GPT2, rotary_dim=4, tie_word_embeddings=False),
    "arcee": transformers.ArceeConfig(**GROUPED),
    "apertus": transformers.ApertusConfig(**GROUPED),
    "jais2": transformers.Jais2Config(**GROUPED),
    "nanochat": transformers.NanoChatConfig(**GROUPED),
    "persimmon": transformers.PersimmonConfig(**SIZES, num_attention_heads=4),
    "biogpt": transformers.BioGptConfig(**SIZES, num_attention_heads=4),
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=5, num_experts_per_tok=2),
    "olmoe": transformers.OlmoeConfig(**SIZES, num_attention_heads=4, num_experts=6, num_experts_per_tok=3),
    "phimoe": transformers.PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe, one dense layer": transformers.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=24, mlp_only_layers=[1]),
    "qwen2_moe, shared expert, every second layer": transformers.Qwen2MoeConfig(
        **GROUPED, **EXPERTS, shared_expert_intermediate_size=40, decoder_sparse_step=2
    ),
}

DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
SHARED = {"shared_expert_intermediate_size": 40}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 10, "mamba_chunk_size": 32}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"]}
NEMOTRON_H = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 10,
    "chunk_size": 32,
    **SPECIAL,
}
NEMOTRON_EXPERTS = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
}
HYBRIDS = {
    "qwen3_next": transformers.Qwen3NextConfig(**GROUPED, **EXPERTS, **DELTA, **SHARED, mlp_only_layers=[1]),
    "qwen3_5": transformers.Qwen3_5TextConfig(**GROUPED, **DELTA),
    "qwen3_5_moe": transformers.Qwen3_5MoeTextConfig(
        **{name: value for name, value in GROUPED.items() if name != "intermediate_size"}, **EXPERTS, **DELTA, **SHARED
    ),
    "olmo_hybrid": transformers.OlmoHybridConfig(**GROUPED, **DELTA | {"linear_num_key_heads": 4}),
    "bamba": transformers.BambaConfig(**GROUPED, **MAMBA, attn_layer_indices=[1]),
    "granitemoehybrid": transformers.GraniteMoeHybridConfig(
        **GROUPED, **MAMBA, layer_types=DELTA["layer_types"], num_local_experts=4, shared_intermediate_size=40
    ),
    "granitemoehybrid, dense": transformers.GraniteMoeHybridConfig(
        **GROUPED, **MAMBA, layer_types=DELTA["layer_types"], num_local_experts=0, shared_intermediate_size=40
    ),
    "nemotron_h": transformers.NemotronHConfig(**NEMOTRON_H, layers_block_type=["mamba", "mlp", "attention"]),
    "nemotron_h, experts": transformers.NemotronHConfig(**NEMOTRON_H, **NEMOTRON_EXPERTS),
    "lfm2": transformers.Lfm2Config(**GROUPED, **CONVOLUTIONS, block_multiple_of=64),
    "lfm2, intermediate size as it is": transformers.Lfm2Config(
        **GROUPED, **CONVOLUTIONS, block_auto_adjust_ff_dim=False
    ),
    "lfm2_moe, one dense layer": transformers.Lfm2MoeConfig(**GROUPED, **EXPERTS, **CONVOLUTIONS, num_dense_layers=1),
}


def causal_model(config):
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **options)


@pytest.mark.parametrize("name", [*CONFIGS, *HYBRIDS])
def test_num_weights_equals_the_models_matrices(name):
    config = (CONFIGS | HYBRIDS)[name]
    model, counted = causal_model(config), decoder_from_config(config.to_dict())
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


def solving_flops(system, columns, *options, out_shape, **named):
    """A triangular system, which torch does not count: n² for each column."""
    return prod(columns) * columns[-2]


def unneeded_flops(model, config, *, rows, length):
    """What transformers computes besides: outputs of convolutions before and after the rows; and in Mamba-2 the
    product of C and B in each head of a group, and the sum of all earlier chunks' states in each chunk."""
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv1d)]
    found = sum(rows * (each.kernel_size[0] - 1) * 2 * each.weight.numel() for each in convolutions)
    if any("Mamba" in type(module).__name__ for module in model.modules()) or config.model_type == "bamba":
        heads, size, groups, state, chunk = 8, 12, 2, 10, 32
        products = rows * length * 2 * chunk * (heads - groups) * state
        sums = rows * 2 * (length // chunk + 1) ** 2 * heads * size * state
        found += len(convolutions) * (products + sums)
    return found


@pytest.mark.parametrize("name", HYBRIDS)
def test_flops_of_hybrids_equal_torchs_flop_counter(name):
    config, rows, length = HYBRIDS[name], 2, 128
    model, counted = causal_model(config), decoder_from_config(config.to_dict())
    solving = {torch.ops.aten.linalg_solve_triangular: solving_flops}
    with FlopCounterMode(display=False, custom_mapping=solving) as forward, torch.no_grad():
        model(input_ids=torch.randint(131, (rows, length)), use_cache=False)
    unneeded = unneeded_flops(model, config, rows=rows, length=length)
    work = Work(rows * length, rows * length**2, rows * length)
    assert forward.get_total_flops() - unneeded == forward_flops(counted, work)


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
    next_80b = transformers.Qwen3NextConfig()  # Qwen3-Next-80B-A3B
    assert decoder_from_config(next_80b.to_dict()).num_weights == pytest.approx(80e9, rel=0.01)


WRONG_CONFIGS = [
    ({}, "has no hidden_size"),
    ({"hidden_size": 8, "num_attention_heads": 2}, "has no num_hidden_layers"),
    (transformers.DeepseekV3Config().to_dict(), "kv_lora_rank 512"),
    (transformers.GptOssConfig().to_dict(), "lfm2_moe, mixtral, .*, not gpt_oss"),
    (transformers.MiniMaxConfig().to_dict(), "layers of type linear_attention"),
    (transformers.FalconH1Config().to_dict(), "mamba_d_state 256"),
    (transformers.RecurrentGemmaConfig().to_dict(), "lru_width 2560"),
    (transformers.NemotronHConfig(moe_latent_size=8).to_dict(), "moe_latent_size 8"),
    (transformers.Lfm2MoeConfig().to_dict(), "has no layer_types"),
    (transformers.Ernie4_5_MoeConfig().to_dict(), "not ernie4_5_moe"),
    (transformers.Gemma4TextConfig().to_dict(), "do not cover hidden_size_per_layer_input 256"),
    ({"per_layer_config": {"1": {"head_dim": 8}}}, "do not cover per_layer_config$"),
    ({"hidden_size": [8, 16], "num_attention_heads": 2}, "hidden_size .* is not one number"),
]


@pytest.mark.parametrize(("config", "message"), WRONG_CONFIGS)
def test_unsupported_models_are_rejected(config, message):
    with pytest.raises(InputError, match=message):
        decoder_from_config(config)


ENCODERS = ["Albert", "Bert", "Camembert", "Deberta", "DebertaV2", "Electra", "MPNet", "Roberta", "XLMRoberta"]
ENCODERS += ["BigBird", "Data2VecText", "Ernie", "MegatronBert", "Nystromformer", "RobertaPreLayerNorm", "RoFormer"]
ENCODERS += ["XLMRobertaXL"]


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
