"""Floating-point operations of a forward and backward pass, by formula. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from align.errors import InputError

# Model types whose MLP has no gate: decoders, and encoders of texts
UNGATED = frozenset({"gpt2", "gpt_neox", "nemotron", "opt", "phi", "starcoder2"}) | frozenset(
    {"albert", "bert", "camembert", "deberta", "deberta-v2", "electra", "mpnet", "roberta", "xlm-roberta"}
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Mixtures of experts with standard attention -> key of an expert's width; the cost of other mixtures is unknown
EXPERT_WIDTH = {
    "mixtral": "intermediate_size",
    "olmoe": "intermediate_size",
    "phimoe": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}
LAYERS = {"full_attention", "sliding_attention"}  # types of layers that the formulas cover

BACKWARD = 2  # FLOPs of a backward pass relative to its forward pass: Kaplan et al. 2020, sec. 2.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The layers of a decoder whose MLP is a mixture of experts."""

    layers: int
    experts: int
    active: int  # experts of each token
    intermediate: int  # of each expert
    shared: int = 0  # intermediate size of the expert that every token passes through, besides the active ones

    def num_weights(self, hidden: int, matrices: int, experts: int) -> int:
        """Return the number of weights of the layers with this number of experts, router and gate included."""
        shared = matrices * hidden * self.shared + (hidden if self.shared else 0)
        return self.layers * (hidden * self.experts + matrices * hidden * self.intermediate * experts + shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The dimensions of a decoder that determine its cost."""

    hidden: int
    layers: int
    query_width: int  # heads x head size
    kv_width: int  # key-value heads x head size
    intermediate: int  # of the dense layers
    vocab: int
    gated: bool = True  # the MLP has a gate projection besides the up projection
    tied: bool = True  # the LM head shares the embedding's weight
    mixture: Mixture | None = None

    @property
    def matrices(self) -> int:
        """Return the number of matrices of an MLP."""
        return 3 if self.gated else 2

    @property
    def num_dense(self) -> int:
        """Return the number of weights of the layers' matrices outside mixtures of experts, without biases."""
        dense = self.layers - (self.mixture.layers if self.mixture else 0)
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return self.layers * attention + dense * self.matrices * self.hidden * self.intermediate

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
    hidden, heads = _read(config, "hidden_size", "n_embd"), _read(config, "num_attention_heads", "n_head")
    head_size = _read(config, "head_dim") if config.get("head_dim") else hidden // heads
    key_heads = _read(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    default_inner = "n_inner" in config and config["n_inner"] is None  # in GPT-2 this means 4 x hidden
    layers = _read(config, "num_hidden_layers", "n_layer")
    return Decoder(
        hidden=hidden,
        layers=layers,
        query_width=heads * head_size,
        kv_width=key_heads * head_size,
        intermediate=4 * hidden if default_inner else _read(config, "intermediate_size", "n_inner", "ffn_dim"),
        vocab=_read(config, "vocab_size"),
        gated=config.get("model_type") not in UNGATED,
        tied=bool(config.get("tie_word_embeddings", True)),
        mixture=_mixture(config, layers),
    )


def _check_covered(config: Mapping[str, Any]) -> None:
    """Raise `InputError` for attention that the formulas do not cover."""
    other = sorted(set(map(str, config.get("layer_types") or ())) - LAYERS)
    if other or config.get("kv_lora_rank"):
        kind = f"layers of type {other[0]}" if other else f"kv_lora_rank {config['kv_lora_rank']}"
        raise InputError(f"cost formulas do not cover {kind}")


def _mixture(config: Mapping[str, Any], layers: int) -> Mixture | None:
    """Return the mixture of experts of the configuration; None if it is dense."""
    names = [name for name in EXPERTS if isinstance(config.get(name), int) and config[name] > 1]
    if not names:
        return None
    kind = str(config.get("model_type"))
    if kind not in EXPERT_WIDTH:
        known = ", ".join(EXPERT_WIDTH)
        raise InputError(f"cost formulas cover the mixtures of experts {known}, not {kind}")
    dense: list[int] = config.get("mlp_only_layers") or []
    step: int = config.get("decoder_sparse_step") or 1
    sparse = sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    return Mixture(
        layers=sparse,
        experts=config[names[0]],
        active=_read(config, "num_experts_per_tok"),
        intermediate=_read(config, EXPERT_WIDTH[kind]),
        shared=config.get("shared_expert_intermediate_size") or 0,
    )


def _read(config: Mapping[str, Any], *names: str) -> int:
    """Return the value of the first name that has one."""
    name = next((name for name in names if config.get(name)), names[0])
    value = config.get(name)
    if not value:
        raise InputError(f"the model's configuration has no {names[0]}, so its cost is unknown")
    if not isinstance(value, int):  # such as one width for each layer
        raise InputError(f"{name} of the model's configuration is not one number, so its cost is unknown")
    return value


def forward_flops(model: Decoder, work: Work) -> int:
    """Compute the floating-point operations of a forward pass; a multiply-add counts as two.

    - Linear layers: 2 FLOPs per weight and token (Kaplan et al. 2020, table 1); of experts, the active ones only.
    - Attention: 4 FLOPs per layer, attended (query, key) pair and unit of query width: 2 for the scores and 2 for the
      weighted values (Chowdhery et al. 2022, app. B, but counting only the pairs that the mask allows).
    - LM head: 2 FLOPs per weight and target position.

    Norms, activations and softmax are not counted.
    """
    layers = 2 * model.num_active * work.tokens + 4 * model.query_width * work.attended_pairs * model.layers
    return layers + 2 * model.hidden * model.vocab * work.targets


def training_flops(model: Decoder, work: Work) -> int:
    """Compute the floating-point operations of a forward and a backward pass without recomputation."""
    return (1 + BACKWARD) * forward_flops(model, work)


def total_flops(model: Decoder, *, trained: Work, observed: Work, frozen: bool) -> int:
    """Compute the floating-point operations of a training: `observed` are its passes without a backward pass.

    With `frozen` only adapters are trained, and the gradients of the other weights are not computed.
    """
    unneeded = forward_flops(model, trained) if frozen else 0
    return training_flops(model, trained) - unneeded + forward_flops(model, observed)
