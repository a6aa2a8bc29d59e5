"""Memory estimate of a training step in each of its processes, for its launch file and for other launches."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from align.accounting.communication import Sharding
from align.accounting.flops import Decoder
from align.accounting.memory import DEEPSPEED, PROCESS, MicroBatch, adapter_weights, average_memory, training_memory
from align.config import read_recipe
from align.errors import InputError
from align.models.lm_head.logprobs import KEPT_CPU, TILE_CPU, TILE_GPU
from align.models.loading.pretrained import default_device
from align.models.settings import PolicySettings
from align.stages.training.contract import TrainingSettings

MANY = 8  # processes of the other launches in an estimate: the GPUs of one machine
DEEPSPEED_KEYS = {  # field of Sharding -> DeepSpeed's key
    "stage": "stage",
    "bucket": "reduce_bucket_size",
    "prefetch": "stage3_prefetch_bucket_size",
    "reuse": "stage3_max_reuse_distance",
}


# glibc before 2.38 cannot reuse aligned free blocks under 32 MiB (its bug 14581) unless large blocks are mapped one by
# one: training on a CPU was seen to hold up to this multiple of the memory in use.
ALLOCATOR_OVERHEAD, FIXED_IN, THRESHOLD = 1.6, (2, 38), "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Peak memory in bytes of each process of a training step; on a CPU, the Python process itself is included."""

    sharding: Sharding  # as in the step's launch file
    peak: int
    many: int  # processes of a larger launch
    by_stage: list[int]  # the peak in each of those: under DDP, ZeRO-1, 2 and 3; with bf16 weights, under DDP

    def describe(self) -> str:
        """Return one line: for the step's launch, and unless it is one process on a CPU, for larger launches."""
        sharding = self.sharding
        gib = 2**30
        name = f"under ZeRO-{sharding.stage}" if sharding.stage else "under DDP"
        where = f"in each of {sharding.processes} processes {name}" if sharding.processes > 1 else "in one process"
        base = ", including the Python process" if sharding.cpu else ""
        line = f"about {self.peak / gib:.1f} GiB at the peak {where}{base}"
        if sharding.cpu and sharding.processes == 1:
            return line
        names = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
        shared = ", ".join(f"{name} {peak / gib:.1f}" for name, peak in zip(names, self.by_stage, strict=False))
        return f"{line}; with {self.many} processes, GiB in each: {shared}"


def allocator_note() -> str:
    """Return what the memory allocator adds to the memory in use, where it is known to."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split("."))) >= FIXED_IN or THRESHOLD in os.environ:
        return ""
    return (
        f"glibc {version} may need up to {ALLOCATOR_OVERHEAD:g} times as much memory, as its heap fragments; "
        f"set {THRESHOLD}=1048576 to avoid this"
    )


def sharding_of(launch: str | None, reduce: Literal["once", "each"] = "once") -> Sharding:
    """Return the sharding of an accelerate launch file; FSDP2 counts as ZeRO-3 with one layer gathered at a time."""
    if launch is None:
        return Sharding(reduce=reduce, cpu=default_device() == "cpu")
    if not Path(launch).is_file():
        raise InputError(f"{launch}: no such launch file", ("launch",))
    asked = read_recipe(Path(launch))
    processes = int(asked.get("num_processes") or 1)
    replicated = Sharding(processes=processes, reduce=reduce, cpu=bool(asked.get("use_cpu")))
    kind = asked.get("distributed_type")
    if kind == "FSDP":
        return replace(replicated, stage=3, bucket=0, prefetch=0, reuse=0, fp32_copy=False)
    if kind != "DEEPSPEED":
        return replicated
    zero = _zero(asked.get("deepspeed_config") or {})
    found = {name: int(zero[key]) for name, key in DEEPSPEED_KEYS.items() if isinstance(zero.get(key), int | float)}
    return replace(replicated, **found)


def _zero(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return DeepSpeed's ZeRO settings, from accelerate's file or from the JSON file that it names."""
    file = settings.get("deepspeed_config_file")
    if file is None:
        return {"stage": settings.get("zero_stage")}
    if not Path(file).is_file():
        raise InputError(f"deepspeed_config_file {file}: no such file", ("launch",))
    return read_recipe(Path(file)).get("zero_optimization") or {}


def footprint(
    step: TrainingSettings, policy: PolicySettings, model: Decoder, sizes: Sequence[int], *, held: int
) -> Footprint:
    """Return the memory of a step whose groups have these sizes in tokens.

    `held` is the largest number of tokens that a group has in memory at once if it may run in parts.
    """
    settings = step.train
    sharding = sharding_of(step.launch, settings.reduce)
    split = settings.sequence_parallel
    largest = sum(sorted(sizes)[-settings.prompts_per_step :])
    budget = settings.token_budget
    if not step.has_lm_head:  # but one vector for each attribute
        model = replace(model, tied=True)
    micro = MicroBatch(
        tokens=-(-max(min(budget, largest), max(sizes)) // split),  # at once
        targets=None if step.has_lm_head else 0,
        tree=policy.forward != "plain",
        bf16=settings.precision == "bf16",
        bf16_weights=settings.weights != "fp32",
        checkpointing=policy.gradient_checkpointing,
        only=largest <= budget or settings.prompts_per_step == 1,
    )
    in_parts = micro
    if micro.tree and held < max(sizes):
        in_parts = replace(micro, tokens=-(-max(min(budget, largest), held) // split), in_parts=True)
    lora = policy.lora
    quantized = policy.quantize is not None
    trained = None if lora is None else adapter_weights(model, lora.rank)

    def peak(sharding: Sharding) -> int:
        parts = training_memory(
            model,
            micro if sharding.stage == 3 else in_parts,
            tile=TILE_CPU if sharding.cpu else TILE_GPU,
            kept=KEPT_CPU if sharding.cpu else 0,
            trained=trained,
            quantized=quantized,
            master=settings.weights == "bf16_master",
            sharding=sharding,
        )
        itself = PROCESS + (DEEPSPEED if sharding.stage and sharding.fp32_copy else 0)
        averages = 0 if settings.average is None else average_memory(model, sharding)
        return sum(parts) + averages + (itself if sharding.cpu else 0)

    many = replace(sharding, processes=max(MANY, sharding.processes))
    return Footprint(
        sharding=sharding,
        peak=peak(sharding),
        many=many.processes,
        by_stage=[peak(replace(many, stage=stage)) for stage in range(4 if settings.weights == "fp32" else 1)],
    )
