"""What training costs, by formula: arithmetic operations and bytes on the wire. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from align.errors import InputError

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How a step's training lies over its processes.

    Stages are ZeRO's (Rajbhandari et al. 2020, sec. 5): 1 shares out AdamW's moments, 2 gradients, 3 weights as well.
    The other numbers are DeepSpeed's settings with their defaults.
    """

    stage: int = 0
    processes: int = 1
    reduce: Literal["once", "each"] = "once"  # when gradients are: in an optimizer step, or in each micro-batch
    bucket: int = 500_000_000  # `reduce_bucket_size`: gradients that are sent at once
    prefetch: int = 50_000_000  # `stage3_prefetch_bucket_size`: weights that are gathered ahead
    reuse: int = 1_000_000_000  # `stage3_max_reuse_distance`: weights used in between that one is kept for its next use
    copies: bool = True  # DeepSpeed trains an fp32 copy of each share of the weights; FSDP2 trains the share itself
    cpu: bool = True  # over gloo, and a buffer takes the memory that is written to; a GPU's takes all at once

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise InputError(f"at least 1 process trains, not {self.processes}")
        if self.stage not in range(4):
            raise InputError(f"there are ZeRO's stages 1, 2 and 3, and 0 for none, not {self.stage}")

    def share(self, numbers: int) -> int:
        """What one process has of so many numbers."""
        return -(-numbers // self.processes)

    def bucket_of(self, trained: int) -> int:
        """Numbers in the memory of a buffer for gradients."""
        return min(self.bucket, trained) if self.cpu else self.bucket

    def kept(self, weights: int) -> int:
        """Weights that ZeRO-3 keeps from the forward to the backward pass: of the last layers, used again at once."""
        return min(weights, self.reuse // 2)

    def gathered(self, model: Decoder) -> int:
        """Weights that ZeRO-3 has whole at once: kept, in use, or coming next; of what arrives there is a second copy.

        They arrive share by share in one buffer, and are put together beside it.
        """
        in_use = max(2 * model.num_linear // model.layers, model.vocab * model.hidden)
        arriving = min(model.num_weights, self.prefetch + in_use)
        return min(model.num_weights, self.kept(model.num_weights) + arriving) + arriving


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What there is to be sent in some optimizer steps, as each process counts it."""

    weights: int
    trained: int | None = None  # all where left out
    small: int = 0  # of the weights those that ZeRO-3 does not cut: of tensors of at most 100,000
    steps: int = 1
    micro_batches: int = 1  # in all steps
    unkept: int = 0  # of them those for whose backward pass ZeRO-3 gathers everything anew; see `wire_bytes`
    forwards: int = 0  # micro-batches without a backward pass: references and held-out rows
    weight_bytes: int = FP32


def added(works: Iterable[Work]) -> Work:
    """All of it together."""
    tokens, pairs, targets = 0, 0, 0
    for work in works:
        tokens, pairs, targets = tokens + work.tokens, pairs + work.attended_pairs, targets + work.targets
    return Work(tokens, pairs, targets)


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


def wire_bytes(ways: Sharding, traffic: Traffic) -> int:
    """Bytes that each process sends, as around a ring, which moves the least there is to move (Patarasuk & Yuan 2009).

    To gather, or to reduce and scatter, sends (N - 1) / N of a tensor from each of N, to all-reduce twice that.
    Rajbhandari et al. 2020, sec. 7, has ZeRO-1 and 2 scatter gradients; DeepSpeed 0.19.8 all-reduces them, and gathers
    the updated weights. ZeRO-3 gathers weights in either pass, and after a step those that are not cut. It scatters;
    gloo, which cannot, all-reduces instead. Some weights ZeRO-3 keeps for the second pass once it knows their order.
    But what it lets go at a place in the order it decides once and for ever: where forward passes without a backward
    one were the first to be in a known order, as references and the probe of the tree are, it keeps nothing to the end
    of the run. What was counted on a wire between two nodes, headers of packets and all, was up to 1.03 times this.

    Left out are scalars, the weights that are sent before the first step, and under ZeRO-3, where nothing is kept, the
    second forward pass of checkpointed layers and the second use of an embedding as the head.
    """
    trained = traffic.weights if traffic.trained is None else traffic.trained
    reductions = traffic.micro_batches if ways.reduce == "each" and ways.stage != 1 else traffic.steps
    cut = traffic.weights - traffic.small
    moved = {
        0: 2 * trained * reductions,
        1: (2 + 1) * trained * traffic.steps,
        2: 2 * trained * reductions + trained * traffic.steps,
        3: (2 if ways.cpu else 1) * trained * reductions
        + cut * (2 * traffic.micro_batches + traffic.forwards)
        - ways.kept(cut) * (traffic.micro_batches - traffic.unkept)
        + traffic.small * traffic.steps,
    }[ways.stage]
    return moved * traffic.weight_bytes * (ways.processes - 1) // ways.processes
