"""Which forward a model can take: static refusals, then a measurement on a few short sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from align.data.token_groups import TokenSequence
from align.errors import InputError, RunError
from align.models import tree_attention
from align.models.backbone import Backbone
from align.models.tree import plain_batch, tree_batch

# Layer types of transformers' configurations whose attention a layout can describe (facts of each: tests/models).
_TREE_LAYERS = {"full_attention", "sliding_attention"}
# Configuration fields that announce a recurrent, chunked or otherwise stateful model.
_STATEFUL = ("attention_chunk_size", "layers_block_type", "hybrid_override_pattern", "conv_L_cache", "mamba_d_state")

PROBE_LENGTH = 48  # tokens of a probed sequence; logits of all its positions are held at once
TOLERANCE = 5e-4  # in fp32, in the unit of the model; a wrong mask or a missed soft-cap is off by 1e-2 and more


@dataclass(frozen=True, slots=True)
class Forward:
    """The forward that a step uses, and why not the tree where it is the plain twin."""

    name: Literal["tree", "plain"]
    reason: str = ""


def refusal(model: Backbone, longest: int) -> str | None:
    """What about the architecture the tree forward cannot do for sequences of up to `longest` tokens, if anything."""
    hf, config = model.base, model.base.config.get_text_config()
    kind = type(hf).__name__
    can_set = hf._can_set_attn_implementation()  # pyright: ignore[reportPrivateUsage] - there is no public way to ask
    if not (can_set and getattr(hf, "_supports_attention_backend", False)):
        return f"{kind} computes attention by itself and cannot take another"
    odd = set(getattr(config, "layer_types", None) or ()) - _TREE_LAYERS
    stateful = [name for name in _STATEFUL if getattr(config, name, None) is not None]
    if odd or stateful or getattr(hf, "_is_stateful", False):
        return f"{kind} has {', '.join(sorted(odd) or stateful or ['state'])}, which is not attention over a path"
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and window < longest and windowed and getattr(config, "use_sliding_window", True):
        return f"{kind} has a sliding window of {window} tokens and the longest sequence has {longest}"
    return None


@torch.no_grad()
def choose_forward(
    model: Backbone, groups: Sequence[Sequence[TokenSequence]], wish: str, *, precision: str = "fp32"
) -> Forward:
    """The forward for this model and data, after a measurement; the model is left set to it.

    `auto` takes the tree where it is exact and else the plain twin with the reason; `tree` raises the reason instead.
    A forward that disagrees with that of transformers stops the run.
    """
    longest = max(len(sequence.ids) for group in groups for sequence in group)
    sample = [short for group in groups[:2] for sequence in group[:2] for short in _branching(sequence)]
    model.use_forward("plain")
    expected = _stock(model, sample)
    _compare(model, _answers(model, sample), expected, "plain")
    if wish == "plain":
        return Forward("plain", "as set")
    reason = refusal(model, longest) or _measure_tree(model, sample, expected)
    if reason is None and precision == "bf16":
        _measure_rounding(model, sample, expected)
    if reason is None:
        return Forward("tree")
    model.use_forward("plain")
    if wish == "tree":
        raise InputError(f"policy.forward is 'tree', and {reason}; 'auto' or 'plain' runs it padded")
    return Forward("plain", reason)


def _measure_tree(model: Backbone, sample: list[TokenSequence], expected: torch.Tensor) -> str | None:
    """Run the sample as a tree; a refusal becomes the reason, a wrong number stops the run."""
    model.use_forward("tree")
    before = tree_attention.calls()
    try:
        answers = _answers(model, sample)
    except InputError as error:
        return str(error)
    layers = model.base.config.get_text_config().num_hidden_layers
    if tree_attention.calls() - before != layers:
        return f"its {layers} layers called the tree's attention {tree_attention.calls() - before} times"
    _compare(model, answers, expected, "tree")
    return None


def _measure_rounding(model: Backbone, sample: list[TokenSequence], expected: torch.Tensor) -> None:
    """Stop if bf16 costs the tree more than its plain twin: on a GPU its kernel is another one than in fp32."""
    gaps: list[float] = []
    for name in ("plain", "tree"):
        model.use_forward(name)
        with torch.autocast(model.device.type, torch.bfloat16):
            gaps.append((_answers(model, sample) - expected).square().mean().sqrt().item())
    if not gaps[1] <= 2 * gaps[0] + TOLERANCE:
        raise RunError(f"in bf16 the tree forward is off by {gaps[1]:.2g} {model.unit}, and its twin by {gaps[0]:.2g}")


def _answers(model: Backbone, sample: list[TokenSequence]) -> torch.Tensor:
    make = tree_batch if model.is_tree else plain_batch
    return model(make(sample).to(model.device))


def _stock(model: Backbone, sample: list[TokenSequence]) -> torch.Tensor:
    """What the model says by the forward of transformers itself, one sequence at a time."""
    return torch.cat([model(sequence) for sequence in sample])


def _compare(model: Backbone, answers: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    gap = (answers.float() - expected).abs().max().item() if len(expected) else 0.0
    if not gap <= TOLERANCE:
        raise RunError(
            f"the {name} forward is off by {gap:.2g} {model.unit} from the model's own logits: it is not safe to train"
        )


def _branching(sequence: TokenSequence) -> tuple[TokenSequence, TokenSequence]:
    """The sequence's first tokens as they are, and with the second half turned round, so that a tree has a branch.

    The groups' own branches may lie far behind a long prompt.
    """
    ids = sequence.ids[:PROBE_LENGTH]
    half = len(ids) // 2
    trained = np.arange(len(ids)) > 0
    return TokenSequence(ids, trained), TokenSequence(np.concatenate([ids[:half], ids[half:][::-1]]), trained)
