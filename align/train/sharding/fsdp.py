"""PyTorch FSDP2."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

from align.errors import InputError
from align.models.loading.shards import LoadedShard
from align.models.weights import full_tensor
from align.train.sharding.bf16.gathers import Bf16ReduceScatter, Bf16Shard, autocast_weights
from align.train.sharding.replicated import ParameterShard, Replicated, local


class Fsdp2(Replicated):
    """PyTorch FSDP2: every parameter is sharded along its first dimension, and gathered while a layer runs."""

    is_sharded = gathers_per_layer = True
    stage = 3

    def _prepare(self) -> None:
        base: Any = self.policy.base
        plugin: Any = self.accelerator.state.fsdp_plugin
        offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)  # from copies without the methods of `Bf16Shard`
        rounded = autocast_weights(self.policy) if self.rounds_gathers and not offloads else []
        if self.in_bf16:  # the fp32 shards are the master weights
            if self.policy.has_fp32_head:
                raise InputError("FSDP2 would run the head in bf16; launch with DDP, or use fp32", ("train", "weights"))
            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        # The layers that accelerate shards; it raises for one that the model lacks, such as vision blocks of Qwen3.5
        present = {type(module).__name__ for module in base.modules()}
        cast(Any, self.policy)._no_split_modules = sorted(present & set(base._no_split_modules or ()))
        shards = {name: value.shard for name, value in self.policy.named_parameters() if isinstance(value, LoadedShard)}
        self.model, self.prepared = self.accelerator.prepare(self.policy, self.optimizer)
        self.trainable = [value for value in self.policy.parameters() if value.requires_grad]
        self.optimizer = self.prepared.optimizer
        for name, shard in shards.items():
            local(self.policy.get_parameter(name).detach()).copy_(shard)
        for name, value in self.policy.named_parameters():
            if name in rounded:
                Bf16Shard.install(value)
            if name in rounded or self.in_bf16:
                self.num_rounded += value.numel()
        self.always_rounds = self.num_rounded > 0
        if self.settings.reduce_dtype == "bf16":
            for module in self._sharded_modules():
                module.set_custom_reduce_scatter(cast(Any, Bf16ReduceScatter()))  # whose base class is not public

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context for one forward and backward pass; gradients are reduced in the last one of a step."""
        cast(Any, self.model).set_requires_gradient_sync(is_last or self.settings.reduce == "each")
        return nullcontext()

    def _clip(self) -> float:
        norm = self.accelerator.clip_grad_norm_(self.trainable, self.settings.max_grad_norm or math.inf)
        return float(full_tensor(torch.as_tensor(norm)))

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """Return the sharded parameters."""
        self.reshard()
        return super()._optimized(names)

    def shards(self, *, moments: bool) -> Iterator[ParameterShard]:
        """Yield the rows of each parameter that this process holds."""
        self.reshard()
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                rows_here = local(value.detach())
                rows = -(-len(value) // self.accelerator.num_processes)  # of every process but the last ones
                start = min(rows * self.accelerator.process_index, len(value)) * (value.numel() // len(value))
                if rows_here.numel():
                    yield self._shard(name, start, rows_here, value, slice(None), moments=moments)

    def reshard(self) -> None:
        """Reshard the parameters of the root module, which stay gathered after a forward pass."""
        for module in self._sharded_modules():
            module.reshard()

    def _sharded_modules(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    @contextmanager
    def complete(self, values: Sequence[Tensor]) -> Generator[Sequence[Tensor]]:
        """Yield the complete values of parameters and buffers, trained ones rounded as in forward passes."""
        is_rounded = [self.in_bf16 and value.requires_grad for value in values]
        full = [full_tensor(value.detach()) for value in values]
        yield [value.bfloat16() if rounds else value for value, rounds in zip(full, is_rounded, strict=True)]
