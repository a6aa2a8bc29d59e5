"""The accelerator of a training step: one process, DDP, DeepSpeed ZeRO or FSDP2."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.distributed.launch import COLLECTIVE_TIMEOUT, check_world_size, is_launched, launched_with
from align.distributed.launch_files import check_launch_environment
from align.errors import InputError, RunError
from align.models.loading.shards import load_shards
from align.models.settings import LoraSettings
from align.train.settings import TrainSettings

LOADS_SHARDS = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate's variable for fsdp_cpu_ram_efficient_loading


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Return the accelerator for this launch; raise unless accelerate joined what the launch file asks for.

    Processes on CPUs communicate over gloo, which a bare `Accelerator` would not join.
    """
    _check_launch()
    if is_launched():
        check_launch_environment(precision=settings.precision, max_grad_norm=settings.max_grad_norm)
    if launched_with("DEEPSPEED"):
        _prepare_deepspeed()
    options: dict[str, Any] = {}
    if is_launched():
        backend = None if torch.cuda.is_available() else "gloo"
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT)]
    if not torch.cuda.is_available() and not (launched_with("DEEPSPEED") or launched_with("FSDP")):
        options["cpu"] = True  # with DeepSpeed, accelerate would silently fall back to DDP
    # Steps of a recipe share a process but not their precision, which accelerate keeps in a global
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage] - there is no public way
    accelerator = Accelerator(
        mixed_precision="no",  # the sharding applies autocast, in the same way for every kind
        # The loop accumulates gradients itself; a number from the launch file would divide the loss once more
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        step_scheduler_with_optimizer=False,
        **options,
    )
    _check_joined(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and _fsdp_loads_shards():
        # Else transformers would load every model in the first process of a machine only, and accelerate send it on
        cast(Any, accelerator.state.fsdp_plugin).cpu_ram_efficient_loading = False
        os.environ[LOADS_SHARDS] = "false"
    unset_hf_deepspeed_config()  # else transformers shards every model; `sharded_loading` enables that where wanted
    return accelerator


@contextmanager
def sharded_loading(accelerator: Accelerator, lora: LoraSettings | None) -> Generator[None]:
    """Shard models while they are loaded within the block, if the launch file asks ZeRO-3 or FSDP2 to do so.

    Under FSDP2 not with DoRA, whose magnitudes start as norms of the complete weights.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        is_dora = lora is not None and lora.dora
        with load_shards(accelerator.num_processes) if _fsdp_loads_shards() and not is_dora else nullcontext():
            yield
        return
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    if plugin is None or not plugin.is_zero3_init_enabled():
        yield
        return
    plugin.set_deepspeed_weakref()
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


@cache
def _fsdp_loads_shards() -> bool:
    """Return whether the launch file asks for it; `make_accelerator` then changes the environment."""
    return os.environ.get(LOADS_SHARDS, "false").lower() == "true"


def _check_launch() -> None:
    """Raise for a kind of launch that is not supported, or that accelerate has not launched."""
    if launched_with("MEGATRON_LM"):
        raise InputError("the launch file enables MEGATRON_LM; supported: one process, DDP, DeepSpeed and FSDP2")
    for plugin in ("DEEPSPEED", "FSDP"):
        if launched_with(plugin) and not is_launched():
            raise InputError(f"the launch file enables {plugin}, but accelerate did not launch this process (no RANK)")


def _prepare_deepspeed() -> None:
    """Let DeepSpeed run on CPUs without a compiler: the extension it would build is not used in training."""
    try:
        from deepspeed import ops  # noqa: PLC0415 - optional, and seconds to import
    except ImportError as error:
        raise InputError("the launch file enables DeepSpeed, which is not installed: pip install deepspeed") from error
    # DeepSpeed 0.19 calls functions that torch 2.13 deprecates, about forty times per step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        getattr(ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _check_joined(accelerator: Accelerator) -> None:
    """Raise `RunError` unless accelerate joined what was launched."""
    kind = accelerator.distributed_type
    check_world_size(1 if kind == DistributedType.NO else accelerator.num_processes)
    for plugin, expected in (("DEEPSPEED", DistributedType.DEEPSPEED), ("FSDP", DistributedType.FSDP)):
        if launched_with(plugin) and kind != expected:
            raise RunError(f"the launch file enables {plugin}, but accelerate joined {kind.value}: nothing is sharded")
