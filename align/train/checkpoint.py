"""Checkpoints inside a step: all that a bit-identical resume needs, as safetensors and JSON, whole or not at all.

Nothing in the loop draws random numbers and the order of the data is a function of the step, so weights, optimizer
state and the number of steps taken are everything.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from align.artifacts import read_json, whole_folder, write_json
from align.config import RunError

PREFIX = "checkpoint-"
BEST = "best"  # folder of the weights with the lowest held-out loss so far
WEIGHTS = "weights.safetensors"
STATE = "state.json"


def save_checkpoint(folder: Path, step: int, *, model: nn.Module, optimizer: Optimizer, settings_hash: str) -> None:
    """Write `checkpoint-<step>` beside the earlier one, and only then remove that."""
    moments: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        for key, state in optimizer.state.get(value, {}).items():
            moments[f"{key}/{name}"] = state.detach().contiguous()
    for half in folder.glob(f".{PREFIX}*"):  # as large as a whole one, of a life that was killed while it wrote
        shutil.rmtree(half)
    with whole_folder(folder / f"{PREFIX}{step}") as writing:
        save_file(_trained(model), writing / WEIGHTS)
        save_file(moments, writing / "optimizer.safetensors")
        write_json(writing / STATE, {"step": step, "settings": settings_hash})
    for older in _checkpoints(folder)[:-1]:
        _remove(older)


def load_checkpoint(folder: Path, *, model: nn.Module, optimizer: Optimizer, settings_hash: str) -> int:
    """Put the latest checkpoint's weights and optimizer state in place; the number of steps taken, 0 without one."""
    found = _checkpoints(folder)
    if not found:
        return 0
    state: dict[str, Any] = read_json(found[-1] / STATE)
    if state["settings"] != settings_hash:
        raise RunError(f"{found[-1]}: belongs to other settings or data; remove it to start this step anew")
    _put(model, load_file(found[-1] / WEIGHTS))
    moments = load_file(found[-1] / "optimizer.safetensors")
    for name, value in model.named_parameters():
        if value.requires_grad:
            keys = [key for key in moments if key.partition("/")[2] == name]
            optimizer.state[value] = {key.partition("/")[0]: moments[key].to(_state_device(key, value)) for key in keys}
    return int(state["step"])


def save_best(folder: Path, step: int, *, model: nn.Module) -> None:
    """Keep the weights as the best so far, in place of those that were.

    A run that is killed after this and resumed from an earlier step comes by this step again, with the same numbers,
    and keeps the same weights again.
    """
    with whole_folder(folder / BEST) as writing:
        save_file(_trained(model), writing / WEIGHTS)
        write_json(writing / STATE, {"step": step})


def load_best(folder: Path, step: int, *, model: nn.Module) -> None:
    """Put the best weights in place, which must be those of `step`."""
    kept = read_json(folder / BEST / STATE)["step"]
    if kept != step:
        raise RunError(f"{folder / BEST}: holds the weights of step {kept}, and those of step {step} were the best")
    _put(model, load_file(folder / BEST / WEIGHTS))


def is_begun(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return bool(_checkpoints(folder))


def remove_checkpoints(folder: Path) -> None:
    """Remove every checkpoint: the finished step's own weights stand for them."""
    for each in [*folder.glob(f"{PREFIX}*"), *folder.glob(BEST)]:
        _remove(each)


def metrics_until(path: Path, step: int, *, write: bool) -> list[dict[str, float]]:
    """The lines of the steps that the checkpoint holds; what was logged after it is computed again."""
    lines = path.read_bytes().splitlines(keepends=True)[:step] if path.is_file() else []
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(sum(map(len, lines)))  # at once: another rank reads the same lines before and after
    return [json.loads(line) for line in lines]


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().contiguous() for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def _put(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.copy_(weights[name])


def _state_device(key: str, value: torch.Tensor) -> torch.device:
    """The count of steps stays where AdamW keeps it for this parameter, the moments with the weights."""
    return value.device if not key.startswith("step/") or value.is_cuda else torch.device("cpu")


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, `state.json` first: what a kill leaves of it is not taken for a whole one."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints from the earliest to the latest."""
    found = [path.parent for path in folder.glob(f"{PREFIX}*/{STATE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))
