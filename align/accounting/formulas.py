"""What training costs, by formula: arithmetic operations, bytes of memory and bytes on the wire. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from align.config import InputError, pick

UNGATED = frozenset({"gpt2", "gpt_neox", "nemotron", "opt", "phi", "starcoder2"})  # model types with one matrix up
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

BACKWARD = 2  # a backward pass multiplies twice for each product of the forward pass: Kaplan et al. 2020, sec. 2.1
FP32 = 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A dense decoder's dimensions, as far as its cost depends on them."""

    hidden: int
    layers: int
    query_width: int  # heads x size of a head
    kv_width: int  # key-value heads x size of a head
    intermediate: int
    vocab: int
    gated: bool = True  # two matrices up instead of one
    tied: bool = True  # the head is the embedding

    @property
    def num_linear(self) -> int:
        """Weights of the layers' matrices, without biases."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def num_weights(self) -> int:
        """All weights but norms, biases and learnt positions, which are under 1% of a real model."""
        return self.num_linear + (1 if self.tied else 2) * self.hidden * self.vocab


class Work(NamedTuple):
    """What one forward pass has to do."""

    tokens: int  # through the layers
    attended_pairs: int  # (query, key) pairs in one layer
    targets: int  # positions through the head


class Passes(NamedTuple):
    """How often (N - 1) / N of a tensor leaves each of N devices: gather and reduce-scatter are one, all-reduce two."""

    trained_per_step: int = 0  # of the trained weights, or their gradient, in an optimizer step
    trained_per_micro_batch: int = 0
    weights_per_micro_batch: int = 0  # of all weights


# Rajbhandari et al. 2020 (ZeRO), sec. 7, has stages 1 and 2 scatter the gradient and gather the new weights. Counted in
# DeepSpeed 0.19.8, both all-reduce it, stage 2 after each micro-batch; stage 3 gathers in either pass, and scatters.
WIRE = {
    "ddp": Passes(trained_per_step=2),
    "zero1": Passes(trained_per_step=2 + 1),
    "zero2": Passes(trained_per_step=1, trained_per_micro_batch=2),
    "zero3": Passes(trained_per_micro_batch=1, weights_per_micro_batch=2),
}


def added(works: Iterable[Work]) -> Work:
    """All of it together."""
    tokens, pairs, targets = 0, 0, 0
    for work in works:
        tokens, pairs, targets = tokens + work.tokens, pairs + work.attended_pairs, targets + work.targets
    return Work(tokens, pairs, targets)


class Memory(NamedTuple):
    """Bytes at the peak of a training step."""

    weights: int
    gradients: int
    moments: int
    activations: int
    head: int


def decoder(config: Mapping[str, Any]) -> Decoder:
    """The dimensions in a Hugging Face config's `to_dict()`; a model of several parts counts by its text part."""
    config = config.get("text_config", config)
    experts = next((name for name in EXPERTS if (config.get(name) or 0) > 1), None)
    if experts is not None:
        raise InputError(f"cost is known for dense decoders only, and {experts} is {config[experts]}")
    hidden, heads = _read(config, "hidden_size", "n_embd"), _read(config, "num_attention_heads", "n_head")
    head_size = config.get("head_dim") or hidden // heads
    inner_by_default = "n_inner" in config and config["n_inner"] is None  # GPT-2's word for 4 x hidden
    return Decoder(
        hidden=hidden,
        layers=_read(config, "num_hidden_layers", "n_layer"),
        query_width=heads * head_size,
        kv_width=(config.get("num_key_value_heads") or heads) * head_size,
        intermediate=4 * hidden if inner_by_default else _read(config, "intermediate_size", "n_inner", "ffn_dim"),
        vocab=_read(config, "vocab_size"),
        gated=config.get("model_type") not in UNGATED,
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def _read(config: Mapping[str, Any], *names: str) -> int:
    """The value of the first name that the config gives one."""
    value = next((config[name] for name in names if config.get(name)), None)
    if value is None:
        raise InputError(f"the model's config gives no {names[0]}, and without it the cost is not known")
    return value


def forward_flops(model: Decoder, work: Work) -> int:
    """Floating-point operations of a forward pass; a multiplication with its addition is two.

    2 for each matrix weight and token (Kaplan et al. 2020, table 1), 4 for each attended pair and unit of query width
    (scores, then values: Chowdhery et al. 2022, app. B, here with the pairs that are really attended), 2 for each
    weight of the head and position that reaches it. Norms, activations and softmax are left out.
    """
    layers = 2 * model.num_linear * work.tokens + 4 * model.query_width * work.attended_pairs * model.layers
    return layers + 2 * model.hidden * model.vocab * work.targets


def training_flops(model: Decoder, work: Work) -> int:
    """Floating-point operations of a forward and a backward pass over the same work, nothing computed twice."""
    return (1 + BACKWARD) * forward_flops(model, work)


def padded(lengths: Sequence[int]) -> Work:
    """The work of a plain batch of sequences: each as long as the longest, every pair and every position computed."""
    longest = max(lengths)
    return Work(len(lengths) * longest, len(lengths) * longest**2, len(lengths) * longest)


def saved_per_token(model: Decoder, *, checkpointing: bool = False) -> int:
    """Numbers that autograd keeps for each token from the forward to the backward pass.

    Where attention keeps no scores, a layer of Llama's kind keeps 6 x hidden (of both norms the input, the normed
    value and the output), 2 x query and 2 x key-value width (queries, keys, values and what was attended) and
    4 x intermediate (gate, its activation, up, their product; of an ungated MLP the input and GELU's steps); the last
    norm 3 x hidden. Norms of queries and keys, or a second pair of norms, add up to half.
    With checkpointing each layer keeps its input, and one at a time all.
    """
    layer = 6 * model.hidden + 2 * (model.query_width + model.kv_width) + 4 * model.intermediate
    kept = model.layers * model.hidden + layer if checkpointing else model.layers * layer
    return kept + 3 * model.hidden


def training_memory(
    model: Decoder,
    micro_batch_tokens: int,
    *,
    head_chunk: int,
    trainable: int | None = None,
    weight_bytes: int = FP32,
    activation_bytes: int = FP32,
    checkpointing: bool = False,
) -> Memory:
    """An estimate of a training step's peak, `sum()` of which is the whole.

    Weights, and for each that is trained (all by default) a gradient and AdamW's two moments, in one dtype; what
    autograd keeps for each token of a micro-batch; a head chunk's logits and their gradient in fp32.
    """
    trained = model.num_weights if trainable is None else trainable
    return Memory(
        weights=weight_bytes * model.num_weights,
        gradients=weight_bytes * trained,
        moments=2 * weight_bytes * trained,
        activations=activation_bytes * saved_per_token(model, checkpointing=checkpointing) * micro_batch_tokens,
        head=2 * FP32 * head_chunk * model.vocab,
    )


def wire_bytes(
    strategy: str,
    processes: int,
    *,
    weights: int,
    trained: int | None = None,
    steps: int = 1,
    micro_batches: int = 1,
    weight_bytes: int = FP32,
) -> int:
    """Bytes that each device sends in `steps` optimizer steps with `micro_batches` micro-batches of its own in all.

    Around a ring, which moves the least there is to move (Patarasuk & Yuan 2009). Left out are the scalars of a norm,
    and under ZeRO-3 the gathers of evaluation, of saving and of a second forward pass for checkpointed activations.
    """
    if processes < 1:
        raise InputError(f"at least 1 process trains, not {processes}")
    passes = pick(WIRE, strategy, "way to spread training over devices")
    trained = weights if trained is None else trained
    moved = trained * (steps * passes.trained_per_step + micro_batches * passes.trained_per_micro_batch)
    moved += weights * micro_batches * passes.weights_per_micro_batch
    return moved * weight_bytes * (processes - 1) // processes
