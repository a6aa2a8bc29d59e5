"""Floating-point operations of a forward and backward pass, by formula. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from align.errors import InputError

UNGATED = frozenset({"gpt2", "gpt_neox", "nemotron", "opt", "phi", "starcoder2"})  # model types whose MLP has no gate
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

BACKWARD = 2  # FLOPs of a backward pass relative to its forward pass: Kaplan et al. 2020, sec. 2.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The dimensions of a dense decoder that determine its cost."""

    hidden: int
    layers: int
    query_width: int  # heads x head size
    kv_width: int  # key-value heads x head size
    intermediate: int
    vocab: int
    gated: bool = True  # the MLP has a gate projection besides the up projection
    tied: bool = True  # the LM head shares the embedding's weight

    @property
    def num_linear(self) -> int:
        """Return the number of weights of the layers' matrices, without biases."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

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

    Raises `InputError` for mixtures of experts, whose cost is not modelled, and for missing dimensions.
    """
    config = config.get("text_config", config)
    experts = next((name for name in EXPERTS if (config.get(name) or 0) > 1), None)
    if experts is not None:
        raise InputError(f"cost formulas cover dense decoders only, and {experts} is {config[experts]}")
    hidden, heads = _read(config, "hidden_size", "n_embd"), _read(config, "num_attention_heads", "n_head")
    head_size = config.get("head_dim") or hidden // heads
    default_inner = "n_inner" in config and config["n_inner"] is None  # in GPT-2 this means 4 x hidden
    return Decoder(
        hidden=hidden,
        layers=_read(config, "num_hidden_layers", "n_layer"),
        query_width=heads * head_size,
        kv_width=(config.get("num_key_value_heads") or heads) * head_size,
        intermediate=4 * hidden if default_inner else _read(config, "intermediate_size", "n_inner", "ffn_dim"),
        vocab=_read(config, "vocab_size"),
        gated=config.get("model_type") not in UNGATED,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def _read(config: Mapping[str, Any], *names: str) -> int:
    """Return the value of the first name that has one."""
    value = next((config[name] for name in names if config.get(name)), None)
    if value is None:
        raise InputError(f"the model's configuration has no {names[0]}, so its cost is unknown")
    return value


def forward_flops(model: Decoder, work: Work) -> int:
    """Compute the floating-point operations of a forward pass; a multiply-add counts as two.

    - Linear layers: 2 FLOPs per weight and token (Kaplan et al. 2020, table 1).
    - Attention: 4 FLOPs per layer, attended (query, key) pair and unit of query width: 2 for the scores and 2 for the
      weighted values (Chowdhery et al. 2022, app. B, but counting only the pairs that the mask allows).
    - LM head: 2 FLOPs per weight and target position.

    Norms, activations and softmax are not counted.
    """
    layers = 2 * model.num_linear * work.tokens + 4 * model.query_width * work.attended_pairs * model.layers
    return layers + 2 * model.hidden * model.vocab * work.targets


def training_flops(model: Decoder, work: Work) -> int:
    """Compute the floating-point operations of a forward and a backward pass without recomputation."""
    return (1 + BACKWARD) * forward_flops(model, work)
