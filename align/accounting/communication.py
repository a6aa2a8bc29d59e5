"""Bytes that training sends, by formula: DDP, ZeRO, FSDP2, and sequence parallelism. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.accounting.flops import Decoder
from align.errors import InputError

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How training is distributed over processes.

    Stages are those of ZeRO (Rajbhandari et al. 2020, sec. 5): 1 partitions AdamW's moments, 2 also gradients, 3 also
    weights; 0 is plain data parallelism. The sizes are DeepSpeed's settings with their defaults.
    """

    stage: int = 0
    processes: int = 1
    reduce: Literal["once", "each"] = "once"  # reduce gradients once per optimizer step, or in each micro-batch
    bucket: int = 500_000_000  # `reduce_bucket_size`: gradients sent at once
    prefetch: int = 50_000_000  # `stage3_prefetch_bucket_size`: weights gathered ahead
    reuse: int = 1_000_000_000  # `stage3_max_reuse_distance`: a weight stays gathered if its next use is nearer
    fp32_copy: bool = True  # DeepSpeed trains an fp32 copy of each shard of the weights; FSDP2 trains the shard itself
    cpu: bool = True  # communicate over gloo; a CPU buffer takes only the memory that is written to

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise InputError(f"the number of processes must be at least 1, not {self.processes}")
        if self.stage not in range(4):
            raise InputError(f"the ZeRO stage must be 0 (none), 1, 2 or 3, not {self.stage}")

    def shard(self, size: int) -> int:
        """Return how many of `size` numbers each process holds."""
        return -(-size // self.processes)

    def buffer(self, trained: int) -> int:
        """Return how many numbers the buffer for gradients holds."""
        return min(self.bucket, trained) if self.cpu else self.bucket

    def kept(self, weights: int) -> int:
        """Return how many weights ZeRO-3 keeps gathered between forward and backward: those of the last layers."""
        return min(weights, self.reuse // 2)

    def gathered(self, model: Decoder) -> int:
        """Return the maximum number of gathered weights under ZeRO-3: kept, in use, and prefetched.

        Weights in flight count twice: shards arrive in one buffer and are assembled next to it.
        """
        in_use = max(2 * model.num_linear // model.layers, model.vocab * model.hidden)
        in_flight = min(model.num_weights, self.prefetch + in_use)
        return min(model.num_weights, self.kept(model.num_weights) + in_flight) + in_flight


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What optimizer steps communicate, as each process counts it."""

    weights: int
    trained: int | None = None  # None: all weights
    unpartitioned: int = 0  # weights that ZeRO-3 does not partition: those of tensors of at most 100,000
    steps: int = 1
    micro_batches: int = 1  # in all steps
    regathered: int = 0  # micro-batches for whose backward pass ZeRO-3 gathers all weights again; see below
    forward_only: int = 0  # micro-batches without a backward pass: references and held-out rows
    weight_bytes: int = FP32
    reduced_bytes: int | None = None  # of a gradient; None: weight_bytes
    gathered_in_bf16: int = 0  # weights that ZeRO-3 or FSDP2 gathers in bf16, of those that it partitions


def communication_bytes(sharding: Sharding, traffic: Traffic) -> int:
    """Compute the bytes that each process sends with ring collectives, the least possible (Patarasuk & Yuan 2009).

    Each of N processes sends (N - 1) / N of a tensor for an all-gather or a reduce-scatter, and twice that for an
    all-reduce. In Rajbhandari et al. 2020, sec. 7, ZeRO-1 and ZeRO-2 reduce-scatter gradients; DeepSpeed 0.19.8
    all-reduces them and all-gathers the updated weights. ZeRO-3 all-gathers weights in the forward and in the backward
    pass, and the unpartitioned ones after each step. It reduce-scatters gradients; on gloo, which cannot, it
    all-reduces them.

    ZeRO-3 keeps some weights gathered for the backward pass once it knows their order of use. It fixes the places where
    it releases weights when it first records a complete order. If that was a forward pass without a backward pass, such
    as for references or the probe of the tree forward, nothing is kept for the rest of the run (`regathered`).

    Traffic measured between two nodes, packet headers included, was at most 1.03 times this value. Not counted:
    scalars, the broadcast of the initial weights, and, under ZeRO-3 where nothing is kept, the second forward pass of
    checkpointed layers and the second use of an embedding as the LM head.
    """
    trained = traffic.weights if traffic.trained is None else traffic.trained
    reductions = traffic.micro_batches if sharding.reduce == "each" and sharding.stage != 1 else traffic.steps
    partitioned = traffic.weights - traffic.unpartitioned
    reduced = (1 if sharding.stage == 3 and not sharding.cpu else 2) * trained * reductions
    gathered = trained * traffic.steps if sharding.stage in (1, 2) else 0
    saved = 0  # bytes, by bf16
    if sharding.stage == 3:
        gathered = partitioned * (2 * traffic.micro_batches + traffic.forward_only)
        gathered -= sharding.kept(partitioned) * (traffic.micro_batches - traffic.regathered)
        # As if the same share of the weights that are kept were gathered in bf16
        saved = gathered * (traffic.weight_bytes - BF16) * traffic.gathered_in_bf16 // max(1, partitioned)
        gathered += traffic.unpartitioned * traffic.steps
    sent = reduced * (traffic.reduced_bytes or traffic.weight_bytes) + gathered * traffic.weight_bytes - saved
    return sent * (sharding.processes - 1) // sharding.processes


def exchange_bytes(model: Decoder, *, tokens: int, split: int, processes: int, size: int = FP32) -> int:
    """Compute the bytes that each process sends around attention if groups of `split` processes split the rows.

    `tokens` are those of all forward and all backward passes of all processes. For each of its own, in each layer, a
    process sends (P - 1) / P of query, key, value and attention output, or of their gradients, of `size` bytes each.
    Not counted: rows of padding, and log-probabilities, which are one number for each target.
    """
    width = 2 * (model.query_width + model.kv_width)
    return tokens * model.layers * width * size * (split - 1) // (split * processes)
