"""Loading of a shard of each weight, as FSDP2 shards them: along the first dimension, over all processes.

Transformers reads no more of a weight than the local part of a DTensor. Until FSDP2 takes over, parameters of the
complete shape stand for the weights, all in one buffer, so that adapters and the optimizer are made as without shards.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

_MESH: ContextVar[DeviceMesh | None] = ContextVar("mesh", default=None)  # of the processes that load shards


class LoadedShard(nn.Parameter):
    """A parameter whose values are NaN, except that `shard` has those of this process's rows of the weight."""

    shard: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedShard:
        copied = cast(LoadedShard, super().__deepcopy__(memo))
        copied.shard = self.shard
        return copied


@contextmanager
def load_shards(num_processes: int) -> Generator[None]:
    """Let this process, one of `num_processes`, load only its shard of each weight within the block."""
    token = _MESH.set(init_device_mesh("cpu", (num_processes,)))
    try:
        yield
    finally:
        _MESH.reset(token)


@contextmanager
def reading_shards() -> Generator[None]:
    """Let transformers read shards in this block, as DTensors, if `load_shards` asks for them.

    There is no public way to change a model between its creation on the meta device and the reading of its weights.
    """
    mesh = _MESH.get()
    original = vars(PreTrainedModel)["_load_pretrained_model"]
    if mesh is None:
        yield
        return

    def load(model: PreTrainedModel, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as transformers' own
        _declare_shards(model, mesh)
        return original.__func__(model, *arguments, **named)

    setattr(PreTrainedModel, original.__name__, staticmethod(load))
    try:
        yield
    finally:
        setattr(PreTrainedModel, original.__name__, original)


def hold_shards(model: PreTrainedModel) -> None:
    """Replace the DTensors that `reading_shards` has left by parameters that hold the shards."""
    found = {id(value): value for value in model.parameters() if isinstance(value, DTensor)}
    if not found:
        return
    # Each begins at another number, as accelerate tells parameters by their addresses
    space = torch.full((max(value.numel() for value in found.values()) + len(found),), math.nan, dtype=torch.float32)
    held: dict[int, LoadedShard] = {}
    for start, (key, value) in enumerate(found.items()):
        assert value.dtype == space.dtype, f"weights are loaded in fp32, not {value.dtype}"
        values = space[start : start + value.numel()].view(value.shape)
        held[key] = LoadedShard(values, value.requires_grad)
        held[key].shard = value.to_local().detach()
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) in held:
                setattr(module, name, held[id(value)])


def _declare_shards(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Replace the parameters of a model on the meta device by DTensors of which this process has its rows."""
    declared: dict[int, nn.Parameter] = {}  # by parameter, which several modules may share
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            size, start = Shard.local_shard_size_and_offset(len(value), mesh.size(), mesh.get_local_rank())
            rows = DTensor.from_local(
                value.detach()[start : start + size],
                mesh,
                [Shard(0)],
                run_check=False,
                shape=value.shape,
                stride=value.stride(),
            )
            setattr(module, name, declared.setdefault(id(value), nn.Parameter(rows, value.requires_grad)))
