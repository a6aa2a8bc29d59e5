"""What a training step takes of the memory of each of its processes, as its launch file spreads it over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from align.accounting.formulas import Decoder, Sharding
from align.accounting.memory import DEEPSPEED, PROCESS, MicroBatch, adapter_weights, training_memory
from align.config import read_recipe
from align.errors import InputError
from align.models.loading.pretrained import default_device
from align.models.logprobs import TILE_CPU, TILE_GPU
from align.stages.estimates import Footprint
from align.stages.recipe import Recipe
from align.stages.steps import PreferenceStep, RewardStep, TrainStep

MANY = 8  # processes that every step's memory is told for: the GPUs of one machine
NUMBERS = {  # of Sharding, by DeepSpeed's names
    "stage": "stage",
    "bucket": "reduce_bucket_size",
    "prefetch": "stage3_prefetch_bucket_size",
    "reuse": "stage3_max_reuse_distance",
}


def sharding_of(launch: str | None, reduce: Literal["once", "each"] = "once") -> Sharding:
    """How an `accelerate launch` of the file would spread a step; FSDP2 does as ZeRO-3 does, a layer at a time."""
    if launch is None:
        return Sharding(reduce=reduce, cpu=default_device() == "cpu")
    if not Path(launch).is_file():
        raise InputError(f"launch: {launch}: no such file for accelerate launch")
    asked = read_recipe(Path(launch))
    processes = int(asked.get("num_processes") or 1)
    way, kind = (
        Sharding(processes=processes, reduce=reduce, cpu=bool(asked.get("use_cpu"))),
        asked.get("distributed_type"),
    )
    if kind == "FSDP":
        return replace(way, stage=3, bucket=0, prefetch=0, reuse=0, copies=False)
    if kind != "DEEPSPEED":
        return way
    zero = _zero(asked.get("deepspeed_config") or {})
    found = {name: int(zero[key]) for name, key in NUMBERS.items() if isinstance(zero.get(key), int | float)}
    return replace(way, **found)


def _zero(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSpeed's own settings of ZeRO, whether they stand in accelerate's file or in one that it names."""
    file = settings.get("deepspeed_config_file")
    if file is None:
        return {"stage": settings.get("zero_stage")}
    if not Path(file).is_file():
        raise InputError(f"launch: deepspeed_config_file: {file}: no such file")
    return read_recipe(Path(file)).get("zero_optimization") or {}


def footprint(
    recipe: Recipe, step: TrainStep | PreferenceStep | RewardStep, model: Decoder, sizes: Sequence[int]
) -> Footprint:
    """The memory of a step whose groups have these sizes in tokens."""
    settings, ways = step.train, sharding_of(step.launch, step.train.reduce)
    largest, budget = sum(sorted(sizes)[-settings.prompts_per_step :]), settings.tokens_per_micro_batch
    if isinstance(step, RewardStep):  # which has no LM head, but a vector an attribute
        model = replace(model, tied=True)
    micro = MicroBatch(
        tokens=max(min(budget, largest), max(sizes)),
        targets=0 if isinstance(step, RewardStep) else None,
        tree=recipe.policy.forward != "plain",
        half=settings.precision == "bf16",
        checkpointing=recipe.policy.gradient_checkpointing,
        alone=largest <= budget,
    )

    lora, quantized = recipe.policy.lora, recipe.policy.quantize is not None
    trained = None if lora is None else adapter_weights(model, lora.rank)

    def peak(ways: Sharding) -> int:
        tile = TILE_CPU if ways.cpu else TILE_GPU
        parts = training_memory(model, micro, tile=tile, trained=trained, quantized=quantized, ways=ways)
        itself = PROCESS + (DEEPSPEED if ways.stage and ways.copies else 0)
        return sum(parts) + (itself if ways.cpu else 0)

    many = replace(ways, processes=max(MANY, ways.processes))
    return Footprint(
        sharding=ways,
        peak=peak(ways),
        many=many.processes,
        by_stage=[peak(replace(many, stage=stage)) for stage in range(4)],
    )
