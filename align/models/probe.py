"""Choice of the forward pass: static checks of the architecture, then a measurement on a few short sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from transformers import PretrainedConfig

from align.data.token_groups import TokenSequence
from align.distributed.launch_files import SEQUENCE_PARALLEL
from align.errors import InputError, RunError
from align.models.backbone import Backbone
from align.models.router_loss import router_loss
from align.models.tree import attention
from align.models.tree.batch import plain_batch, tree_batch
from align.models.tree.sequence_group import SequenceGroup

# Layer types in transformers' configurations that tree attention supports
_TREE_LAYERS = {"full_attention", "sliding_attention"}
_ATTENTION_LAYERS = _TREE_LAYERS | {"attention"}  # of hybrid models
# Configuration fields of recurrent, chunked or otherwise stateful models
_STATEFUL = ("attention_chunk_size", "layers_block_type", "hybrid_override_pattern", "conv_L_cache", "mamba_d_state")

# Rotary embeddings whose frequencies depend on the longest sequence of a forward pass
_CHANGING_ROPE = {"dynamic", "longrope"}

PROBE_LENGTH = 48  # tokens of a probed sequence; the logits of all its positions are in memory at once
ROUNDED_TOLERANCE = 0.1  # root mean square, of forward passes that can only be run in bf16: see saving.comparison
TOLERANCE = 5e-4  # in fp32, in the model's output unit; a wrong mask or missing soft-cap causes errors above 1e-2

Comparison = Callable[[Backbone, torch.Tensor, torch.Tensor, str], None]  # raises where outputs differ too much


@dataclass(frozen=True, slots=True)
class Forward:
    """The forward pass that a step uses, and for the padded one why it is not the tree."""

    name: Literal["tree", "plain"]
    reason: str = ""


def tree_unsupported_reason(model: Backbone, max_length: int) -> str | None:
    """Return why the architecture has no tree forward for sequences of up to `max_length` tokens; None if it has."""
    hf = model.base
    config = hf.config.get_text_config()
    kind = type(hf).__name__
    settable = hf._can_set_attn_implementation()  # pyright: ignore[reportPrivateUsage] - no public equivalent
    # transformers does not set the flag of hybrid models, whose attention layers do use the interface
    if not (settable and (model.is_recurrent or getattr(hf, "_supports_attention_backend", False))):
        return f"{kind} does not support custom attention implementations"
    if model.recurrence_error:
        return f"{kind}: {model.recurrence_error}"
    unsupported = _unsupported_layers(config)
    if not model.is_recurrent and (unsupported or getattr(hf, "_is_stateful", False)):
        return f"{kind} has {unsupported or 'recurrent state'}, which tree attention does not support"
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and window < max_length and windowed and getattr(config, "use_sliding_window", True):
        return f"{kind} has a sliding window of {window} tokens, shorter than the longest sequence ({max_length})"
    return None


def _unsupported_layers(config: PretrainedConfig) -> str:
    """Return the types of layers, or else the fields, of a configuration that tree attention does not support."""
    types = set(getattr(config, "layer_types", None) or ()) - _TREE_LAYERS
    return ", ".join(sorted(types) or [name for name in _STATEFUL if getattr(config, name, None) is not None])


@torch.no_grad()
def choose_forward(
    model: Backbone,
    groups: Sequence[Sequence[TokenSequence]],
    requested: str,
    *,
    precision: str = "fp32",
    is_rounded: bool = False,
) -> Forward:
    """Choose the forward pass for this model and data by comparing it with transformers' own, and set the model to it.

    `auto` chooses the tree if it is exact, otherwise the padded forward with the reason; `tree` raises `InputError`
    with that reason; `plain` is the padded forward. A forward that disagrees with transformers raises `RunError`.
    `is_rounded` says that the model's weights are in bf16, so that the comparison allows for rounding.
    """
    max_length = max(len(sequence.ids) for group in groups for sequence in group)
    sample = [short for group in groups[:2] for sequence in group[:2] for short in _branching_pair(sequence)]
    model.use_forward("plain")
    expected = _sequence_outputs(model, sample)
    compare = _compare_rounded if is_rounded else _compare
    compare(model, _batch_outputs(model, sample), expected, "plain")
    if requested == "plain":
        return Forward("plain", "as set")
    reason = tree_unsupported_reason(model, max_length) or _measure_tree(model, sample, expected, compare)
    if reason is None and precision == "bf16" and not is_rounded:
        _measure_rounding(model, sample, expected)
    if reason is None:
        return Forward("tree")
    model.use_forward("plain")
    if requested == "tree":
        raise InputError(
            f"'tree' is not supported: {reason}; use 'auto' or 'plain' to pad sequences", attention.FORWARD
        )
    return Forward("plain", reason)


@torch.no_grad()
def parts_unsupported_reason(model: Backbone, groups: Sequence[Sequence[TokenSequence]]) -> str | None:
    """Return why a tree forward cannot run in parts; None if it can. Parts that differ from the tree raise `RunError`.

    The model must be set to the tree forward, with weights in fp32.
    """
    if router_loss(model) is not None:
        return "the router auxiliary loss counts whole micro-batches"
    if reason := _changing_rope(model.base.config.get_text_config()):
        return reason
    if model.is_recurrent:
        return "the states of recurrent layers are not handed from one part to another"
    if model.dropout is not None and getattr(model.base, "is_gradient_checkpointing", False):
        return "gradient checkpointing would recompute dropout with the masks of another part"
    batch = tree_batch([short for sequence in groups[0] for short in _branching_pair(sequence)]).to(model.device)
    expected = model(batch)
    model.max_rows = 1
    try:
        found = model(batch)
    except InputError as error:
        return error.message
    finally:
        model.max_rows = None
    _compare(model, found, expected, "tree in parts")
    return None


def split_unsupported_reason(config: PretrainedConfig, size: int) -> str | None:
    """Return why `size` processes cannot split the trees of a model, as far as its configuration says so."""
    config = config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None)
    unsupported = _unsupported_layers(config)
    if unsupported or not num_heads:
        feature = unsupported or "no attention heads"
        return f"{config.model_type} has {feature}; only full and sliding attention can be split over processes"
    heads = {"query": num_heads, "key/value": getattr(config, "num_key_value_heads", None) or num_heads}
    for kind, number in heads.items():
        if isinstance(number, int) and number % size:
            return f"the model's {number} {kind} heads cannot be split over {size} processes; use a divisor"
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", None):
        return "the router auxiliary loss counts whole micro-batches; set output_router_logits to false in the model"
    return _changing_rope(config)


@torch.no_grad()
def split_rows(
    model: Backbone, groups: Sequence[Sequence[TokenSequence]], group: SequenceGroup, *, is_rounded: bool = False
) -> None:
    """Let the processes of a group split the rows of the model's trees, and compare that with whole trees.

    The model must be set to the tree forward. Raises `InputError` if it cannot be split, `RunError` if results differ.
    All processes call it together.
    """
    reason = "a recurrent layer cannot be split over processes" if model.is_recurrent else None
    if reason := reason or split_unsupported_reason(model.base.config, group.size):
        raise InputError(reason, SEQUENCE_PARALLEL)
    sample = [short for sequence in groups[0] for short in _branching_pair(sequence)]
    expected = _batch_outputs(model, sample)
    model.sequence_group = group
    (_compare_rounded if is_rounded else _compare)(model, _batch_outputs(model, sample), expected, "split tree")


def _changing_rope(config: PretrainedConfig) -> str | None:
    """Return which rotary embeddings depend on the tokens of a forward pass, None without such."""
    changing = _CHANGING_ROPE & _rope_types(getattr(config, "rope_parameters", None))
    return f"{min(changing)} rotary embeddings depend on the longest sequence of a pass" if changing else None


def _rope_types(parameters: object) -> set[str]:
    """Return the types of rotary embeddings in a configuration, where each type of layer may have its own."""
    if not isinstance(parameters, dict):
        return set()
    values = cast("dict[str, object]", parameters)
    return {str(values.get("rope_type"))}.union(*map(_rope_types, values.values()))


def _measure_tree(
    model: Backbone, sample: list[TokenSequence], expected: torch.Tensor, compare: Comparison
) -> str | None:
    """Run the sample as a tree and return the reason if that is not supported; wrong values raise `RunError`."""
    model.use_forward("tree")
    before = attention.call_count()
    try:
        outputs = _batch_outputs(model, sample)
    except InputError as error:
        return error.message
    config = model.base.config.get_text_config()
    layers = config.num_hidden_layers
    if model.is_recurrent:
        layers = sum(kind in _ATTENTION_LAYERS for kind in config.layer_types)
    if attention.call_count() - before != layers:
        return f"its {layers} layers called tree attention {attention.call_count() - before} times"
    compare(model, outputs, expected, "tree")
    return None


def _measure_rounding(model: Backbone, sample: list[TokenSequence], expected: torch.Tensor) -> None:
    """Raise `RunError` if the tree's error in bf16 exceeds the padded forward's; on a GPU bf16 has its own kernel."""
    errors: list[float] = []
    for name in ("plain", "tree"):
        model.use_forward(name)
        with torch.autocast(model.device.type, torch.bfloat16):
            errors.append((_batch_outputs(model, sample) - expected).square().mean().sqrt().item())
    if not errors[1] <= 2 * errors[0] + TOLERANCE:
        raise RunError(
            f"in bf16 the RMS error of the tree forward is {errors[1]:.2g} {model.output_unit}, that of the padded "
            f"forward {errors[0]:.2g}"
        )


def _batch_outputs(model: Backbone, sample: list[TokenSequence]) -> torch.Tensor:
    make = tree_batch if model.is_tree else plain_batch
    return model(make(sample).to(model.device))


def _sequence_outputs(model: Backbone, sample: list[TokenSequence]) -> torch.Tensor:
    """Return the outputs of transformers' own forward, one sequence at a time."""
    return torch.cat([model(sequence) for sequence in sample])


def _compare(model: Backbone, outputs: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = (outputs.float() - expected).abs().max().item() if len(expected) else 0.0
    _check_error(model, error, TOLERANCE, name)


def _compare_rounded(model: Backbone, outputs: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = (outputs.float() - expected).square().mean().sqrt().item() if len(expected) else 0.0
    _check_error(model, error, ROUNDED_TOLERANCE, name)


def _check_error(model: Backbone, error: float, tolerance: float, name: str) -> None:
    if not error <= tolerance:
        raise RunError(
            f"the {name} forward differs from transformers' by {error:.2g} {model.output_unit}, more than "
            f"{TOLERANCE:g}; set policy.forward: plain, and please report the architecture"
        )


def _branching_pair(sequence: TokenSequence) -> tuple[TokenSequence, TokenSequence]:
    """Return the first tokens of the sequence, and the same with the second half reversed, so that their tree branches.

    The branches of the groups themselves may come after a long prompt.
    """
    ids = sequence.ids[:PROBE_LENGTH]
    half = len(ids) // 2
    mask = np.arange(len(ids)) > 0
    return TokenSequence(ids, mask), TokenSequence(np.concatenate([ids[:half], ids[half:][::-1]]), mask)
