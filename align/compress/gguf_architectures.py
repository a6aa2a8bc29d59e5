"""What GGUF files say of each architecture: llama.cpp's name, its form of the weights, and its metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from align.errors import InputError
from align.registry import pick

SWIGLU, GEGLU = "silu", "gelu_pytorch_tanh"
# Layers of Gemma 2 27B and Gemma 3 27B, whose attention llama.cpp scales by hidden size / heads, not by head size
GEMMA_27B_LAYERS = (46, 62)
# Keys of configurations whose effect has no place in a file, and those that name the activation function
NEVER = ("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention")
ACTIVATIONS = ("hidden_act", "hidden_activation")
SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")  # llama.cpp has a default for Gemma 2, 50 and 30
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How llama.cpp stores one of transformers' architectures."""

    name: str  # in GGUF files
    permutes_rotary: bool = False  # whether rotary pairs are neighbors in q and k; halves of a head in transformers
    norm_offset: float = 0.0  # added to the weights of norms: Gemma multiplies by 1 + weight
    activation: str = SWIGLU
    pattern: int = 0  # every n-th layer has full attention, the others a sliding window; 0 where all are full


LLAMA = Architecture(name="llama", permutes_rotary=True)
ARCHITECTURES = {  # by transformers' model_type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "gemma2": Architecture(name="gemma2", norm_offset=1.0, activation=GEGLU, pattern=2),
    "gemma3_text": Architecture(name="gemma3", norm_offset=1.0, activation=GEGLU, pattern=6),
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return how llama.cpp stores a model; raise `InputError` for an architecture or a setting that it cannot hold."""
    try:
        found = pick(ARCHITECTURES, str(config.model_type), "architecture that GGUF export supports")
    except InputError as error:
        error.loc = ("policy",)
        raise
    values = config.to_dict()
    expected = {key: (None, False) for key in NEVER} | {key: (None, found.activation) for key in ACTIVATIONS}
    if found.pattern:
        expected |= _expected_of_gemma(found, config)
    wrong = [key for key, allowed in expected.items() if values.get(key) not in allowed]
    wrong += [key for key in SOFT_CAPS if found.name == "gemma2" and values.get(key) is None]
    if wrong:
        message = f"GGUF files of the architecture {found.name} cannot hold that {wrong[0]} is {values.get(wrong[0])!r}"
        raise InputError(message, ("policy",))
    return found


def _expected_of_gemma(found: Architecture, config: PretrainedConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values that readers of GGUF files take for granted in Gemma, by key of the configuration."""
    text: Any = config
    layers = text.num_hidden_layers
    scale = text.hidden_size // text.num_attention_heads if layers in GEMMA_27B_LAYERS else text.head_dim
    types = ["full_attention" if (layer + 1) % found.pattern == 0 else "sliding_attention" for layer in range(layers)]
    softcap = {"attn_logit_softcapping": (None,)} if found.name == "gemma3" else {}
    return {"query_pre_attn_scalar": (scale,), "layer_types": (types,), **softcap}


def stored_form(found: Architecture, config: PretrainedConfig, name: str, value: Tensor) -> Tensor:
    """Return a tensor of transformers' model in llama.cpp's form. `name` is that of transformers."""
    if found.permutes_rotary and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if name.endswith("q_proj.weight") else config.num_key_value_heads
        # [heads, halves, pairs, width] -> [heads, pairs, halves, width]
        return value.reshape(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
    if found.norm_offset and name.endswith("norm.weight"):
        return value.float() + found.norm_offset
    return value


def add_metadata(writer: gguf.GGUFWriter, found: Architecture, config: PretrainedConfig) -> None:
    """Add the hyperparameters of a model; raise `InputError` for a RoPE scaling that has no key."""
    text: Any = config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    if found.permutes_rotary:
        writer.add_rope_dimension_count(head_size)
    if found.pattern:
        writer.add_sliding_window(text.sliding_window)
    if (softcap := getattr(text, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(softcap)
    if (softcap := getattr(text, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(softcap)
    _add_rope(writer, config)


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Return by what each rotary frequency is divided (Llama 3's scaling), fp32 [head size / 2]; None without it."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    compute: Any = ROPE_INIT_FUNCTIONS["llama3"]
    scaled, _ = compute(config, torch.device("cpu"))
    pairs = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return (1.0 / float(rope["rope_theta"]) ** pairs) / scaled.float()


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the RoPE parameters of the layers with full attention."""
    values: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    return dict(values.get("full_attention") or values)


def _add_rope(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    rope = _rope(config)
    kind = str(rope.get("rope_type") or "default")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    local: Any = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local is not None and config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):  # that of Llama 3 is a tensor of its own
        raise InputError(f"RoPE scaling {kind!r} is not exported to GGUF; default, linear and llama3 are", ("policy",))
