"""Bytes of memory that a training step takes in each of its processes, by formula. No torch.

What is written of DeepSpeed is what version 0.19.8 allocates where, as here, the model's own weights are fp32
(runtime/zero/stage_1_and_2.py, stage3.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from align.accounting.formulas import FP32, Decoder, Sharding

BF16 = 2  # bytes
MOMENTS = 2  # that AdamW keeps of a weight
# Bytes of a weight in 4 bits; 64 share a scale in 8 bits, and 256 scales one in fp32: Dettmers et al. 2023, sec. 3.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# The interpreter with torch 2.13, transformers 5.24 and all that `align train` imports, before any model (570 MB), and
# what these set aside when they are first used (35 MB): measured with glibc 2.36 on x86-64.
PROCESS = 605_000_000
DEEPSPEED = 65_000_000  # what DeepSpeed 0.19.8 and gloo add to it, measured in the same way


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What a process runs forward and backward at once, and how."""

    tokens: int
    targets: int | None = None  # positions through the LM head; every token where left out, 0 without an LM head
    tree: bool = True  # attention over root paths; else PyTorch's own, which keeps no scores either
    half: bool = False  # matrix products in bf16 over fp32 weights, under autocast
    checkpointing: bool = False  # each layer keeps its input, and is run again for its backward pass
    alone: bool = False  # the only one of its optimizer step: no gradient is there before it

    @property
    def through_head(self) -> int:
        """Positions through the LM head."""
        return self.tokens if self.targets is None else self.targets

    @property
    def active(self) -> int:
        """Bytes of a number that goes into or comes out of a matrix product."""
        return BF16 if self.half else FP32


class Memory(NamedTuple):
    """What lies in one process's memory when a step takes most, in bytes; `sum()` is the peak."""

    weights: int  # with DeepSpeed's own copy of a share, and with those that are gathered for use
    moments: int
    gradients: int
    activations: int = 0
    head: int = 0  # of the LM head's weight the gradient in the making, and a tile of logits
    buffers: int = 0  # in which gradients are sent


def layer_bytes(model: Decoder, micro: MicroBatch, *, frozen: bool = False) -> int:
    """Bytes that autograd keeps of a layer for each token from the forward to the backward pass.

    Of Llama's kind: of either norm the input and, if the norm is trained, the normed value, in fp32; the inputs of the
    matrix products behind the norms, one for all in fp32, and under autocast a copy in bf16 for each of them; queries,
    keys, values, what was attended, and over a tree that once more in the order of tokens; gate, its activation, up
    and their product, or of an ungated MLP the input and GELU's steps. Norms of queries and keys, a second pair of
    norms, and adapters' inner values add up to half.
    """
    norms = 2 * model.hidden * FP32 * (1 if frozen else 2)
    inputs = model.hidden * ((5 if model.gated else 4) * BF16 if micro.half else 2 * FP32)
    attention = (3 if micro.tree else 2) * model.query_width + 2 * model.kv_width
    return norms + inputs + (attention + 4 * model.intermediate) * micro.active


def activation_bytes(model: Decoder, micro: MicroBatch, *, frozen: bool = False) -> int:
    """Bytes that autograd keeps of a micro-batch when its backward pass begins, or with checkpoints when it is deepest.

    Under autocast the graph holds each layer's matrices in bf16 as well: the gradient of an input needs them.
    """
    layer = layer_bytes(model, micro, frozen=frozen) * micro.tokens
    cast = BF16 * model.num_linear if micro.half else 0
    last_norm = model.hidden * FP32 * (1 if frozen else 2) * micro.tokens
    into_head = model.hidden * micro.active * micro.through_head
    if micro.checkpointing:
        inputs = model.layers * model.hidden * FP32 * micro.tokens
        layers = inputs + layer + cast // model.layers
        if not frozen:  # until the forward pass is over autocast remembers the weights that it has cast
            layers = max(layers, inputs + cast)
    else:
        layers = model.layers * layer + cast
    return layers + last_norm + into_head


def passing_bytes(model: Decoder, micro: MicroBatch) -> int:
    """Bytes of gradients of activations that are there at once: those of gate and up, and of the layer's output."""
    return (2 * model.intermediate * micro.active + 2 * model.hidden * FP32) * micro.tokens


def adapter_weights(model: Decoder, rank: int) -> int:
    """Weights of low-rank adapters on every projection of every layer, two thin matrices for each."""
    matrices = 3 if model.gated else 2
    attention = 4 * model.hidden + 2 * (model.query_width + model.kv_width)
    return model.layers * rank * (attention + matrices * (model.hidden + model.intermediate))


def training_memory(
    model: Decoder,
    micro: MicroBatch,
    *,
    tile: int,
    trained: int | None = None,
    quantized: bool = False,
    ways: Sharding | None = None,
) -> Memory:
    """A step's memory in one process when it takes most: in a backward pass, or while gradients are sent.

    `tile` is the number of logits that the head has at once, `trained` the number of weights that are trained where
    these are adapters, whose base may be quantized. Not told: the process itself (`PROCESS`), and what an allocator
    keeps and cannot use.
    """
    ways, frozen = ways or Sharding(), trained is not None
    number = model.num_weights if trained is None else trained
    gathered = FP32 * ways.gathered(model) if ways.stage == 3 else 0
    held = _held(model, number, ways, round((NF4 if quantized else FP32) * model.num_linear))
    used = held._replace(weights=held.weights + gathered)
    passing, matrix, targets = passing_bytes(model, micro), model.vocab * model.hidden * FP32, micro.through_head
    tiles = 2 * FP32 * tile + targets * model.hidden * FP32 if targets else 0
    trained_head = 0 if frozen or not targets else matrix
    # The gradient of an embedding that is the head as well has two parts, and the head's waits for the other.
    waiting = trained_head if model.tied else 0
    begins = used._replace(
        gradients=0 if micro.alone and ways.processes == 1 else held.gradients,
        activations=activation_bytes(model, micro, frozen=frozen),
        head=max(trained_head + tiles, waiting + passing),
    )
    ends = used._replace(head=0 if frozen else waiting + (0 if micro.alone else matrix))
    meanwhile = ways.reduce == "each" and ways.bucket < number  # a bucket is full before the backward pass is over
    return max(begins, ends, _sending(used if meanwhile else held, number, ways), key=sum)


def _held(model: Decoder, trained: int, ways: Sharding, linear: int) -> Memory:
    """What lies there from one micro-batch to the next; the layers' matrices take `linear` bytes."""
    weights, share = linear + FP32 * (model.num_weights - model.num_linear), FP32 * ways.share(trained)
    bucket, copy = FP32 * ways.bucket_of(trained), share if ways.copies else 0
    moments = MOMENTS * (share if ways.stage else FP32 * trained)
    whole = FP32 * trained
    if ways.stage == 0:
        return Memory(weights, moments, whole * (2 if ways.processes > 1 else 1))  # DDP's buckets are a copy
    if ways.stage < 3:
        each = ways.reduce == "each" and ways.stage == 2
        return Memory(weights + copy, moments, share if each else whole)
    # ZeRO-3 has room for its share of the gradient from the start, and keeps its buffer. It has its own copy of fp32
    # weights too, for it compares a torch.device with a text to find that it needs none.
    gradients = share if ways.reduce == "each" else share + whole
    return Memory(ways.share(weights) + copy, moments, gradients, buffers=bucket)


def _sending(held: Memory, trained: int, ways: Sharding) -> Memory:
    """What lies there when a full bucket of gradients is sent, which is copied into one piece before."""
    bucket = FP32 * ways.bucket_of(trained)
    if ways.stage == 0:
        return held
    if ways.stage == 3:
        moved = 0 if ways.reduce == "each" else min(bucket, FP32 * trained)  # into the buffer, and out of where it was
        copies = 3 if ways.cpu else 2  # gloo all-reduces another
        return held._replace(gradients=held.gradients - moved, buffers=copies * bucket)
    if ways.reduce == "each" and ways.stage == 2:
        return held._replace(buffers=2 * bucket)
    return held._replace(buffers=bucket)
