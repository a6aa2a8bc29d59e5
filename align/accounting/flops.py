"""Floating-point operations of a forward and backward pass, by formula. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from align.accounting.recurrence import ATTENTION, MLPS, RECURRENCES, Recurrence, layer_types, read_size, recurrence_of
from align.errors import InputError

# Model types whose MLP has no gate: decoders, and encoders of texts
UNGATED_DECODERS = (
    "apertus", "apertus1p5_text", "arcee", "biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "jais2",
    "nanochat", "nemotron", "nemotron_h", "opt", "persimmon", "phi", "starcoder2",
)  # fmt: skip
UNGATED_ENCODERS = (
    "albert", "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2",
    "electra", "ernie", "jina_embeddings_v3", "megatron-bert", "mpnet", "nystromformer", "roberta",
    "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
UNGATED = frozenset(UNGATED_DECODERS) | frozenset(UNGATED_ENCODERS)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Mixtures of experts with standard attention -> key of an expert's width; the cost of other mixtures is unknown
EXPERT_WIDTH = {
    "granitemoehybrid": "intermediate_size",
    "lfm2_moe": "moe_intermediate_size",
    "mixtral": "intermediate_size",
    "nemotron_h": "moe_intermediate_size",
    "olmoe": "intermediate_size",
    "phimoe": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_5_moe_text": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
    "qwen3_next": "moe_intermediate_size",
}
GATED_SHARED = "shared_expert_intermediate_size"  # of a shared expert whose output has a gate
SHARED_WIDTH = (GATED_SHARED, "shared_intermediate_size", "moe_shared_expert_intermediate_size")
# Keys of layers that the formulas do not cover: latent attention, recurrences of other architectures, layers that are
# computed several times, and layers of several sizes
OTHER_LAYERS = (
    "kv_lora_rank", "mamba_d_state", "lru_width", "H_cycles", "hidden_size_per_layer_input", "per_layer_config",
)  # fmt: skip
GATED_ATTENTION = {"qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}  # model types

BACKWARD = 2  # FLOPs of a backward pass relative to its forward pass: Kaplan et al. 2020, sec. 2.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The layers of a decoder whose MLP is a mixture of experts."""

    layers: int
    experts: int
    active: int  # experts of each token
    intermediate: int  # of each expert
    shared: int = 0  # intermediate size of the expert that every token passes through, besides the active ones
    shared_gate: bool = True  # the output of that expert has a gate

    def num_weights(self, hidden: int, matrices: int, experts: int) -> int:
        """Return the number of weights of the layers with this number of experts, router and gate included."""
        shared = matrices * hidden * self.shared + (hidden if self.shared and self.shared_gate else 0)
        return self.layers * (hidden * self.experts + matrices * hidden * self.intermediate * experts + shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The dimensions of a decoder that determine its cost."""

    hidden: int
    layers: int  # with attention or a recurrence
    query_width: int  # heads x head size
    kv_width: int  # key-value heads x head size
    intermediate: int  # of the dense layers
    vocab: int
    gated: bool = True  # the MLP has a gate projection besides the up projection
    tied: bool = True  # the LM head shares the embedding's weight
    mixture: Mixture | None = None
    gated_attention: bool = False  # the output of attention has a gate
    recurrence: Recurrence | None = None
    num_mlps: int | None = None  # None: one in each layer

    @property
    def num_attention(self) -> int:
        """Return the number of layers with attention."""
        return self.layers - (self.recurrence.layers if self.recurrence else 0)

    @property
    def matrices(self) -> int:
        """Return the number of matrices of an MLP."""
        return 3 if self.gated else 2

    @property
    def num_dense(self) -> int:
        """Return the number of weights of the layers' matrices outside mixtures of experts, without biases."""
        mlps = self.layers if self.num_mlps is None else self.num_mlps
        dense = mlps - (self.mixture.layers if self.mixture else 0)
        attention = self.hidden * ((3 if self.gated_attention else 2) * self.query_width + 2 * self.kv_width)
        recurrent = self.recurrence.layers * self.recurrence.num_weights if self.recurrence else 0
        mlp = self.matrices * self.hidden * self.intermediate
        return self.num_attention * attention + recurrent + dense * mlp

    @property
    def num_linear(self) -> int:
        """Return the number of weights of the layers' matrices, without biases."""
        mixture = self.mixture
        experts = mixture.num_weights(self.hidden, self.matrices, mixture.experts) if mixture else 0
        return self.num_dense + experts

    @property
    def num_active(self) -> int:
        """Return the number of weights of the layers' matrices that each token is multiplied with."""
        mixture = self.mixture
        return self.num_dense + (mixture.num_weights(self.hidden, self.matrices, mixture.active) if mixture else 0)

    @property
    def mlp_width(self) -> int:
        """Return the intermediate size of a token in a layer; in a mixture, over its active experts."""
        mixture = self.mixture
        return self.intermediate if mixture is None else mixture.active * mixture.intermediate + mixture.shared

    @property
    def num_weights(self) -> int:
        """Return the number of weights without norms, biases and learned positions (under 1% of a real model)."""
        return self.num_linear + (1 if self.tied else 2) * self.hidden * self.vocab


class Work(NamedTuple):
    """The size of one forward pass."""

    tokens: int  # through the layers
    attended_pairs: int  # (query, key) pairs in one layer
    targets: int  # positions through the LM head


def sum_work(works: Iterable[Work]) -> Work:
    """Return the sum of several forward passes.

    >>> sum_work([Work(4, 10, 3), Work(2, 3, 1)])
    Work(tokens=6, attended_pairs=13, targets=4)
    """
    tokens, pairs, targets = 0, 0, 0
    for work in works:
        tokens, pairs, targets = tokens + work.tokens, pairs + work.attended_pairs, targets + work.targets
    return Work(tokens, pairs, targets)


def decoder_from_config(config: Mapping[str, Any]) -> Decoder:
    """Return the dimensions in the `to_dict()` of a Hugging Face configuration; of a composite model, its text part.

    Raises `InputError` for an architecture that the formulas do not cover, and for missing dimensions.
    """
    config = config.get("text_config", config)
    _check_covered(config)
    kind = config.get("model_type")
    hidden, heads = read_size(config, "hidden_size", "n_embd"), read_size(config, "num_attention_heads", "n_head")
    head_size = read_size(config, "head_dim") if config.get("head_dim") else hidden // heads
    key_heads = read_size(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    if kind == "nemotron_h":
        types = layer_types(config)
        mlps = sum(each in MLPS for each in types)
        layers = len(types) - mlps
    else:
        mlps = None
        layers = read_size(config, "num_hidden_layers", "n_layer")
    return Decoder(
        hidden=hidden,
        layers=layers,
        query_width=heads * head_size,
        kv_width=key_heads * head_size,
        intermediate=_intermediate(config, hidden),
        vocab=read_size(config, "vocab_size"),
        gated=kind not in UNGATED,
        tied=bool(config.get("tie_word_embeddings", True)),
        mixture=_mixture(config, layers),
        gated_attention=kind in GATED_ATTENTION,
        recurrence=recurrence_of(config),
        num_mlps=mlps,
    )


def _check_covered(config: Mapping[str, Any]) -> None:
    """Raise `InputError` for layers that the formulas do not cover."""
    if config.get("model_type") in RECURRENCES:
        other = []
        keys = ("moe_latent_size",)
    else:
        other = sorted(set(map(str, config.get("layer_types") or ())) - ATTENTION)
        keys = OTHER_LAYERS
    kinds = [f"layers of type {each}" for each in other] + [
        key if isinstance(config[key], Mapping) else f"{key} {config[key]}" for key in keys if config.get(key)
    ]
    if kinds:
        raise InputError(f"cost formulas do not cover {kinds[0]}")


def _intermediate(config: Mapping[str, Any], hidden: int) -> int:
    """Return the width of an MLP that is no mixture of experts."""
    if "n_inner" in config and config["n_inner"] is None:  # GPT-2
        return 4 * hidden
    if config.get("model_type") == "granitemoehybrid":  # without experts
        return read_size(config, "shared_intermediate_size")
    # The last one where every MLP is a mixture
    width = read_size(config, "intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size")
    if config.get("block_auto_adjust_ff_dim"):  # LFM2
        width = int(2 * width / 3)
        if config.get("block_ffn_dim_multiplier") is not None:
            multiple = read_size(config, "block_multiple_of")
            width = multiple * -(-int(config["block_ffn_dim_multiplier"] * width) // multiple)
    return width


def _mixture(config: Mapping[str, Any], layers: int) -> Mixture | None:
    """Return the mixture of experts of the configuration; None if it is dense."""
    names = [name for name in EXPERTS if isinstance(config.get(name), int) and config[name] > 1]
    if not names:
        return None
    kind = str(config.get("model_type"))
    if kind not in EXPERT_WIDTH:
        known = ", ".join(EXPERT_WIDTH)
        raise InputError(f"cost formulas cover the mixtures of experts {known}, not {kind}")
    dense = config.get("mlp_only_layers") or range(config.get("num_dense_layers") or 0)
    step: int = config.get("decoder_sparse_step") or 1
    sparse = sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    if kind == "nemotron_h":
        sparse = layer_types(config).count("moe")
    shared = next((key for key in SHARED_WIDTH if config.get(key)), None)
    return Mixture(
        layers=sparse,
        experts=config[names[0]],
        active=read_size(config, "num_experts_per_tok"),
        intermediate=read_size(config, EXPERT_WIDTH[kind]),
        shared=read_size(config, shared) if shared else 0,
        shared_gate=shared == GATED_SHARED,
    )


def forward_flops(model: Decoder, work: Work) -> int:
    """Compute the floating-point operations of a forward pass; a multiply-add counts as two.

    - Linear layers: 2 FLOPs per weight and token (Kaplan et al. 2020, table 1); of experts, the active ones only.
    - Attention: 4 FLOPs per layer, attended (query, key) pair and unit of query width: 2 for the scores and 2 for the
      weighted values (Chowdhery et al. 2022, app. B, but counting only the pairs that the mask allows).
    - Recurrent layers: 2 FLOPs per weight, and those of the recurrence in chunks (`align/accounting/recurrence.py`).
    - LM head: 2 FLOPs per weight and target position.

    Norms, activations and softmax are not counted.
    """
    linear = 2 * model.num_active * work.tokens
    attention = 4 * model.query_width * work.attended_pairs * model.num_attention
    recurrent = model.recurrence.layers * model.recurrence.token_flops * work.tokens if model.recurrence else 0
    return linear + attention + recurrent + 2 * model.hidden * model.vocab * work.targets


def training_flops(model: Decoder, work: Work) -> int:
    """Compute the floating-point operations of a forward and a backward pass without recomputation."""
    return (1 + BACKWARD) * forward_flops(model, work)


def total_flops(model: Decoder, *, trained: Work, observed: Work, frozen: bool) -> int:
    """Compute the floating-point operations of a training: `observed` are its passes without a backward pass.

    With `frozen` only adapters are trained, and the gradients of the other weights are not computed.
    """
    unneeded = forward_flops(model, trained) if frozen else 0
    return training_flops(model, trained) - unneeded + forward_flops(model, observed)
