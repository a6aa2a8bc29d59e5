"""Memory of a training step in each process, by formula, in bytes; not of recurrent layers. Imports no torch.

DeepSpeed's allocations are those of version 0.19.8 for a model whose own weights are fp32, as here
(runtime/zero/stage_1_and_2.py, stage3.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from align.accounting.communication import BF16, FP32, Sharding
from align.accounting.flops import Decoder

NUM_MOMENTS = 2  # of AdamW, for each weight
# Bytes of a weight in 4 bits; 64 share a scale in 8 bits, 256 scales share one in fp32: Dettmers et al. 2023, sec. 3
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# The interpreter with torch 2.13, transformers 5.24 and everything `align train` imports, before any model (570 MB),
# and what they allocate on first use (35 MB): measured with glibc 2.36 on x86-64
PROCESS = 605_000_000
DEEPSPEED = 65_000_000  # additional memory of DeepSpeed 0.19.8 and gloo, measured in the same way


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What a process runs forward and backward at once."""

    tokens: int
    targets: int | None = None  # positions through the LM head; None: every token, 0: no LM head
    tree: bool = True  # tree attention; otherwise PyTorch's attention, which stores no scores either
    bf16: bool = False  # bf16 autocast over fp32 weights
    bf16_weights: bool = False  # a forward pass with bf16 weights, which needs `bf16`, too
    checkpointing: bool = False  # gradient checkpointing: store each layer's input and recompute the layer
    in_parts: bool = False  # parts of a group, over which gradients are added up before they are accumulated
    only: bool = False  # the only micro-batch of its optimizer step, so no gradients exist before it

    @property
    def num_targets(self) -> int:
        """Return the number of positions through the LM head."""
        return self.tokens if self.targets is None else self.targets

    @property
    def activation_size(self) -> int:
        """Return the bytes of one input or output element of a matrix product."""
        return BF16 if self.bf16 else FP32

    @property
    def state_size(self) -> int:
        """Return the bytes of one element of a hidden state between layers."""
        return BF16 if self.bf16_weights else FP32


class Memory(NamedTuple):
    """Memory of one process at the peak of a step, in bytes; `sum()` is the peak."""

    weights: int  # including DeepSpeed's copy of a shard and gathered weights
    moments: int
    gradients: int
    activations: int = 0
    head: int = 0  # the LM head's partial weight gradient, a tile of logits, and tiles kept for the backward pass
    buffers: int = 0  # for sending gradients


def layer_bytes(model: Decoder, micro: MicroBatch, *, frozen: bool = False) -> int:
    """Return the bytes that autograd stores for a layer and token between forward and backward.

    For Llama: the input of both norms and, if the norm is trained, the normalized value, in fp32; the inputs of the
    matrix products after the norms, shared in fp32, one bf16 copy each under autocast, shared in bf16 with bf16 weights
    (where the normalized value is in bf16, too); queries, keys, values and the
    attention output, which the tree stores twice; and the MLP's gate, activation, up projection and their product, or
    for an ungated MLP the input and the steps of GELU. Query and key norms, a second pair of norms, and the inner
    values of adapters add up to half of that.
    """
    norms = 2 * norm_bytes(model, micro, frozen=frozen)
    inputs = model.hidden * ((5 if model.gated else 4) * BF16 if micro.bf16 else 2 * FP32)
    if micro.bf16_weights:
        inputs = model.hidden * 2 * BF16
    attention = (3 if micro.tree else 2) * model.query_width + 2 * model.kv_width
    return norms + inputs + (attention + 4 * model.mlp_width) * micro.activation_size


def norm_bytes(model: Decoder, micro: MicroBatch, *, frozen: bool) -> int:
    """Return the bytes that autograd stores for a norm and token: its input in fp32 and its normalized value."""
    return model.hidden * (FP32 + (0 if frozen else micro.state_size))


def activation_bytes(model: Decoder, micro: MicroBatch, *, frozen: bool = False) -> int:
    """Return the bytes of stored activations at the start of a backward pass, or with checkpointing at their peak.

    Under autocast the graph also holds each layer's matrices in bf16, which the gradients of inputs need.
    """
    layer = layer_bytes(model, micro, frozen=frozen) * micro.tokens
    cast = BF16 * model.num_linear if micro.bf16 and not micro.bf16_weights else 0
    last_norm = norm_bytes(model, micro, frozen=frozen) * micro.tokens
    head_input = model.hidden * micro.activation_size * micro.num_targets
    if micro.checkpointing:
        inputs = model.layers * model.hidden * micro.state_size * micro.tokens
        layers = inputs + layer + cast // model.layers
        if not frozen:  # autocast caches the weights that it has cast until the end of the forward pass
            layers = max(layers, inputs + cast)
    else:
        layers = model.layers * layer + cast
    return layers + last_norm + head_input


def activation_gradient_bytes(model: Decoder, micro: MicroBatch) -> int:
    """Return the bytes of the activation gradients that exist at once: of gate, up projection and layer output."""
    return (2 * model.mlp_width * micro.activation_size + 2 * model.hidden * micro.state_size) * micro.tokens


def adapter_weights(model: Decoder, rank: int) -> int:
    """Return the number of weights of adapters on every projection of every layer; routed experts have none."""
    attention = 4 * model.hidden + 2 * (model.query_width + model.kv_width)
    mixture = model.mixture
    pairs = model.layers * (model.hidden + model.intermediate)
    if mixture is not None:
        pairs -= mixture.layers * (model.hidden + model.intermediate)
        pairs += mixture.layers * (model.hidden + mixture.shared) if mixture.shared else 0
    return rank * (model.layers * attention + model.matrices * pairs)


def training_memory(
    model: Decoder,
    micro: MicroBatch,
    *,
    tile: int,
    kept: int = 0,
    trained: int | None = None,
    quantized: bool = False,
    master: bool = False,
    sharding: Sharding | None = None,
) -> Memory:
    """Return the memory of one process at the peak of a step: in a backward pass, or while gradients are sent.

    `tile` is the number of logits in memory at once, `kept` the largest number that is kept for the backward pass.
    `trained` is the number of trained weights if they are adapters, whose base may be quantized; None trains all
    weights. With `master` the trained weights have fp32 master weights beside those in bf16; under FSDP2 the shards are
    the master weights. Not included: the process itself (`PROCESS`), and memory that the allocator reserves but cannot
    use.
    """
    sharding = sharding or Sharding()
    frozen = trained is not None
    num_trained = model.num_weights if trained is None else trained
    gathered = micro.state_size * sharding.gathered(model) if sharding.stage == 3 else 0
    size = micro.state_size if sharding.stage == 0 else FP32
    weights = round((NF4 if quantized else size) * model.num_linear) + size * (model.num_weights - model.num_linear)
    if master and sharding.stage == 0:
        weights += FP32 * num_trained
    held = _held(num_trained, sharding, weights, ddp=not micro.bf16_weights)
    summed = FP32 * num_trained if micro.in_parts else 0
    used = held._replace(weights=held.weights + gathered, gradients=held.gradients + summed)
    matrix = model.vocab * model.hidden * FP32
    targets = micro.num_targets
    logits = 2 * tile + min(kept, targets * model.vocab)
    tiles = FP32 * (logits + targets * model.hidden) if targets else 0
    trained_head = 0 if frozen or not targets else matrix
    # The gradient of a tied embedding has two parts, and the LM head's part waits for the other one
    waiting = trained_head if model.tied else 0
    backward_starts = used._replace(
        gradients=summed if micro.only and sharding.processes == 1 else used.gradients,
        activations=activation_bytes(model, micro, frozen=frozen),
        head=max(trained_head + tiles, waiting + activation_gradient_bytes(model, micro)),
    )
    backward_ends = used._replace(head=0 if frozen else waiting + (0 if micro.only else matrix))
    # With gathered weights, if a bucket is full before the backward pass ends
    overlaps = sharding.reduce == "each" and sharding.bucket < num_trained
    return max(backward_starts, backward_ends, _sending(used if overlaps else held, num_trained, sharding), key=sum)


def average_memory(model: Decoder, sharding: Sharding) -> int:
    """Return the bytes of the running mean of all weights, in fp32 and sharded like a moment."""
    return FP32 * (sharding.shard(model.num_weights) if sharding.stage else model.num_weights)


def _held(trained: int, sharding: Sharding, weights: int, *, ddp: bool) -> Memory:
    """Return what remains in memory between micro-batches; `ddp` says whether DDP reduces gradients in its buckets."""
    shard = FP32 * sharding.shard(trained)
    bucket = FP32 * sharding.buffer(trained)
    copy = shard if sharding.fp32_copy else 0
    moments = NUM_MOMENTS * (shard if sharding.stage else FP32 * trained)
    full = FP32 * trained
    if sharding.stage == 0:
        return Memory(weights, moments, full * (2 if sharding.processes > 1 and ddp else 1))  # DDP's buckets are a copy
    if sharding.stage < 3:
        partitions_gradients = sharding.reduce == "each" and sharding.stage == 2
        return Memory(weights + copy, moments, shard if partitions_gradients else full)
    # ZeRO-3 allocates its shard of the gradient at the start and keeps its buffer. It also copies fp32 weights, because
    # its check whether it needs to compares a torch.device with a string.
    gradients = shard if sharding.reduce == "each" else shard + full
    return Memory(sharding.shard(weights) + copy, moments, gradients, buffers=bucket)


def _sending(held: Memory, trained: int, sharding: Sharding) -> Memory:
    """Return the memory while a full bucket of gradients, copied into one buffer, is sent."""
    bucket = FP32 * sharding.buffer(trained)
    if sharding.stage == 0:
        return held
    if sharding.stage == 3:
        # Gradients move into the buffer and are freed
        moved = 0 if sharding.reduce == "each" else min(bucket, FP32 * trained)
        copies = 3 if sharding.cpu else 2  # gloo all-reduces another copy
        return held._replace(gradients=held.gradients - moved, buffers=copies * bucket)
    if sharding.reduce == "each" and sharding.stage == 2:
        return held._replace(buffers=2 * bucket)
    return held._replace(buffers=bucket)
