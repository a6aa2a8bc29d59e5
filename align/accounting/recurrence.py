"""Recurrent layers of hybrid decoders: weights, and FLOPs of a token, by formula. Imports no torch.

Recurrences are counted in their chunked form, as training kernels compute them: the products within a chunk in full,
although half of their results are masked, and those with the state that enters a chunk. Each token is counted once;
without a kernel that takes initial states, the tree forward recomputes the path of each response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from align.errors import InputError

ATTENTION = {"full_attention", "sliding_attention"}
MLPS = {"mlp", "moe"}  # layers of Nemotron-H, in which a mixer and an MLP are two layers
DELTA_CHUNK = 64  # tokens, in transformers and in flash-linear-attention


class Recurrence(NamedTuple):
    """The layers of a decoder with a recurrence or a convolution in place of attention."""

    layers: int
    num_weights: int  # of the matrices and of the convolution of each
    token_flops: int  # of a token in each, besides 2 for each weight


def recurrence_of(config: Mapping[str, Any]) -> Recurrence | None:
    """Return the recurrent layers of a configuration; None if it has none."""
    kind = config.get("model_type")
    layers = sum(each not in ATTENTION | MLPS for each in layer_types(config)) if kind in RECURRENCES else 0
    return Recurrence(layers, *RECURRENCES[str(kind)](config)) if layers else None


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """Return the type of each layer of a hybrid decoder."""
    if config["model_type"] == "bamba":
        attention = config.get("attn_layer_indices") or ()
        layers = range(read_size(config, "num_hidden_layers"))
        return ["full_attention" if layer in attention else "linear_attention" for layer in layers]
    types = config.get("layer_types") or config.get("layers_block_type")
    if not types:
        raise InputError("the model's configuration has no layer_types, so its cost is unknown")
    return types


def read_size(config: Mapping[str, Any], *names: str) -> int:
    """Return the value of the first name that has one."""
    name = next((name for name in names if config.get(name)), names[0])
    value = config.get(name)
    if not value:
        raise InputError(f"the model's configuration has no {names[0]}, so its cost is unknown")
    if not isinstance(value, int):  # such as one width for each layer
        raise InputError(f"{name} of the model's configuration is not one number, so its cost is unknown")
    return value


def _delta_net(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the weights and FLOPs of a gated delta net (Yang et al. 2025, sec. 3.3).

    A chunk of C tokens takes, in each value head, the products of keys and of queries with its keys (2 C² dk each), the
    solution of a triangular system for dv + dk columns (C² for each), the products of keys, queries and the chunk's
    update with the state (2 C dk dv each), and that of the scores with the new values (2 C² dv).
    """
    heads, key, value = (
        read_size(config, f"linear_{name}") for name in ("num_value_heads", "key_head_dim", "value_head_dim")
    )
    keys, values = read_size(config, "linear_num_key_heads") * key, heads * value
    projections = read_size(config, "hidden_size") * (2 * keys + 3 * values + 2 * heads)  # q, k, v, gate, out; a, b
    convolution = read_size(config, "linear_conv_kernel_dim") * (2 * keys + values)
    return projections + convolution, heads * (DELTA_CHUNK * (5 * key + 3 * value) + 6 * key * value)


def _mamba2(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the weights and FLOPs of a Mamba-2 layer (state space duality; Dao & Gu 2024, sec. 6).

    A chunk of C tokens takes the product of C and B in each group (2 C² n), and in each head its product with the
    values (2 C² p), the chunk's state and the output of the state that enters it (2 C n p each).
    """
    heads, size = (
        read_size(config, "mamba_n_heads", "mamba_num_heads"),
        read_size(config, "mamba_d_head", "mamba_head_dim"),
    )
    groups, state = (
        read_size(config, "mamba_n_groups", "n_groups"),
        read_size(config, "mamba_d_state", "ssm_state_size"),
    )
    chunk = read_size(config, "mamba_chunk_size", "chunk_size")
    inner = heads * size
    projections = read_size(config, "hidden_size") * (3 * inner + 2 * groups * state + heads)
    convolution = read_size(config, "mamba_d_conv", "conv_kernel") * (inner + 2 * groups * state)
    return projections + convolution, 2 * chunk * (groups * state + inner) + 4 * state * inner


def _short_convolution(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the weights of a gated short convolution; its FLOPs are 2 for each."""
    hidden = read_size(config, "hidden_size")
    return 4 * hidden**2 + read_size(config, "conv_L_cache") * hidden, 0


# Model type -> weights and FLOPs of a token in one of its recurrent layers
RECURRENCES: dict[str, Callable[[Mapping[str, Any]], tuple[int, int]]] = {
    "bamba": _mamba2,
    "granitemoehybrid": _mamba2,
    "lfm2": _short_convolution,
    "lfm2_moe": _short_convolution,
    "nemotron_h": _mamba2,
    "olmo_hybrid": _delta_net,
    "qwen3_5_moe_text": _delta_net,
    "qwen3_5_text": _delta_net,
    "qwen3_next": _delta_net,
}
