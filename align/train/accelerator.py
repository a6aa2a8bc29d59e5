"""The accelerator of a training step: one process, DDP, DeepSpeed ZeRO or FSDP2."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.distributed.launch import COLLECTIVE_TIMEOUT, check_world_size, launched_with
from align.errors import InputError, RunError
from align.registry import suggest
from align.train.settings import TrainSettings


def make_accelerator(settings: TrainSettings, folder: Path) -> Accelerator:
    """Join accelerate in one process, DDP, DeepSpeed's ZeRO or FSDP2, or stop where it joins anything else.

    On a CPU that is over gloo, which a bare Accelerator would silently not join.
    """
    if launched_with("MEGATRON_LM"):
        raise InputError("the launch file asks for MEGATRON_LM; there are one process, DDP, DeepSpeed and FSDP2")
    for way in ("DEEPSPEED", "FSDP"):
        if launched_with(way) and "RANK" not in os.environ:
            raise InputError(f"the launch file asks for {way}, and this is no process of an accelerate launch: no RANK")
    check_trackers(settings)
    if launched_with("DEEPSPEED"):
        _ready_deepspeed()
    options: dict[str, Any] = {}
    if "RANK" in os.environ:
        backend = None if torch.cuda.is_available() else "gloo"
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT)]
    if not torch.cuda.is_available() and not (launched_with("DEEPSPEED") or launched_with("FSDP")):
        options["cpu"] = True  # with DeepSpeed accelerate would turn into plain DDP and not say so
    # The steps of a recipe share a process, and each has its own precision, which accelerate keeps in a global.
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage] - there is no public way
    accelerator = Accelerator(
        mixed_precision="no",  # `autocast` is ours: the same over every way of lying
        # The loop accumulates by itself; left out, a number in the launch file would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        step_scheduler_with_optimizer=False,
        log_with=list(settings.trackers) or None,
        project_dir=str(folder),
        **options,
    )
    _check_joined(accelerator)
    unset_hf_deepspeed_config()  # by which transformers shares out whatever it makes; `zero3_init` says what
    return accelerator


def check_trackers(settings: TrainSettings) -> None:
    """Raise for a tracker that is not installed here."""
    known = [str(name) for name in get_available_trackers()]
    missing = [name for name in settings.trackers if name not in known]
    if missing:
        raise InputError(
            f"no tracker called {missing[0]!r} is installed; {suggest(missing[0], known)}", ("train", "trackers")
        )


@contextmanager
def zero3_init(accelerator: Accelerator) -> Generator[None]:
    """A block in which a model that is read from a folder is shared out as it is read, where ZeRO-3 is to do so."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    if plugin is None or not plugin.is_zero3_init_enabled():
        yield
        return
    plugin.set_deepspeed_weakref()
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def _ready_deepspeed() -> None:
    """Let DeepSpeed run where there is no compiler: what it would build on a CPU, no training uses."""
    try:
        from deepspeed import ops  # noqa: PLC0415 - optional, and seconds to import
    except ImportError as error:
        raise InputError(
            "the launch file asks for DeepSpeed, which is not installed: pip install align[deepspeed]"
        ) from error
    # DeepSpeed 0.19 calls what torch 2.13 would call otherwise, some forty times a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        getattr(ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _check_joined(accelerator: Accelerator) -> None:
    """Stop unless accelerate has joined what was launched."""
    kind = accelerator.distributed_type
    check_world_size(1 if kind == DistributedType.NO else accelerator.num_processes)
    for way, expected in (("DEEPSPEED", DistributedType.DEEPSPEED), ("FSDP", DistributedType.FSDP)):
        if launched_with(way) and kind != expected:
            raise RunError(
                f"the launch file asks for {way} and accelerate joined {kind.value}: nothing would be sharded"
            )
