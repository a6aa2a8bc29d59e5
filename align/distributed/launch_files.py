"""Checks of launch files: keys that the recipe decides, and the GPUs that a file asks for; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from align.config import read_recipe
from align.errors import InputError

LOC = ("launch",)
SEQUENCE_PARALLEL = ("train", "sequence_parallel")  # location in a step
# Key of a DeepSpeed file or of accelerate's -> the recipe's setting that decides it
DECIDED = {
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "train_batch_size": "train.prompts_per_step",
    "train_micro_batch_size_per_gpu": "train.tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_micro_batch",
    "gradient_clipping": "train.max_grad_norm",
    "mixed_precision": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
}
UNSET = (None, "auto", "no", "none", False, {})


def check_training_launch(launch: str, *, precision: str, max_grad_norm: float) -> None:
    """Raise `InputError` for a launch file with a key that the recipe decides otherwise.

    A file that does not exist is accepted here and reported when the step starts.
    """
    if not Path(launch).is_file():
        return
    values = read_recipe(Path(launch))
    deepspeed: Mapping[str, Any] = values.get("deepspeed_config") or {}
    own = {"mixed_precision": values.get("mixed_precision"), **deepspeed}
    _check_decided(launch, own, precision=precision, max_grad_norm=max_grad_norm)
    if file := deepspeed.get("deepspeed_config_file"):
        _check_deepspeed_file(str(file), precision=precision, max_grad_norm=max_grad_norm)


def launch_kind(launch: str) -> str:
    """Return accelerate's name of the kind of a launch, such as DEEPSPEED; NO for a file that does not exist."""
    return str(read_recipe(Path(launch)).get("distributed_type") or "NO") if Path(launch).is_file() else "NO"


def num_processes(launch: str | None) -> int:
    """Return the number of processes of a launch file: 1 without one, 0 for a file that does not exist."""
    if launch is None:
        return 1
    return int(read_recipe(Path(launch)).get("num_processes") or 1) if Path(launch).is_file() else 0


def check_process_groups(size: int, number: int) -> None:
    """Raise `InputError` unless this number of processes are groups of `size`, which split sequences."""
    if number % size:
        message = f"{size} needs a launch with a multiple of {size} processes, not {number}"
        raise InputError(message, SEQUENCE_PARALLEL)


def check_launch_environment(*, precision: str, max_grad_norm: float) -> None:
    """Raise `InputError` for what `accelerate launch` has read from its file and the recipe decides otherwise."""
    names = {
        "mixed_precision": "ACCELERATE_MIXED_PRECISION",
        "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    }
    values = {key: os.environ.get(name) for key, name in names.items()}
    _check_decided("accelerate launch", values, precision=precision, max_grad_norm=max_grad_norm)
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        _check_deepspeed_file(file, precision=precision, max_grad_norm=max_grad_norm)


def check_gpus(launch: str, num_gpus: int) -> None:
    """Raise `InputError` for a launch file that needs more GPUs than this machine has."""
    if not Path(launch).is_file() or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        return
    values = read_recipe(Path(launch))
    kind = str(values.get("distributed_type") or "NO")
    use_cpu = values.get("use_cpu")
    if use_cpu or kind == "MULTI_CPU" or (kind in ("NO", "False") and use_cpu is None):
        return
    needed = int(values.get("num_processes") or 1) // int(values.get("num_machines") or 1)
    if needed > num_gpus:
        raise InputError(
            f"{launch} needs {needed} GPUs on each machine, and this one has {num_gpus or 'none'}; use another launch "
            "file, such as launch/zero2-cpu-2.yaml, or leave launch out",
            LOC,
        )


def _check_deepspeed_file(file: str, *, precision: str, max_grad_norm: float) -> None:
    """Raise `InputError` for a DeepSpeed file that does not exist or decides what the recipe decides."""
    if not Path(file).is_file():
        raise InputError(f"deepspeed_config_file {file}: no such file", LOC)
    _check_decided(file, read_recipe(Path(file)), precision=precision, max_grad_norm=max_grad_norm)


def _check_decided(source: str, values: Mapping[str, Any], *, precision: str, max_grad_norm: float) -> None:
    """Raise `InputError` for the first key that the recipe decides, unless its value is that of the recipe."""
    same = {"gradient_accumulation_steps": 1.0, "gradient_clipping": max_grad_norm}
    for key in [key for key in DECIDED if key in values]:
        value = values[key]
        enabled = cast("dict[str, Any]", value).get("enabled", value) if isinstance(value, dict) else value
        is_precision = precision in (key, value)  # the section bf16, or mixed_precision: bf16
        is_same = is_precision or (key in same and _number(value) == same[key])
        if not is_same and enabled not in UNSET:
            raise InputError(f"{source} sets {key}, which the recipe decides by {DECIDED[key]}; leave it out", LOC)


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None
