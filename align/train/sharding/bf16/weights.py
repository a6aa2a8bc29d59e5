"""Weights in bf16 that are updated in fp32: by master weights, or by stochastic rounding.

A bf16 number has 8 significant bits, so an update below 1/512 of a weight would be rounded away. Gradients are
accumulated over micro-batches, and reduced over processes, in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor, nn

from align.models.backbone import Backbone
from align.models.weights import castable_parameters
from align.train.sharding.bf16.stochastic_rounding import round_stochastically
from align.train.sharding.replicated import WEIGHT, ParameterShard, Place, Replicated


def bf16_parameters(policy: Backbone) -> dict[str, Tensor]:
    """Return the parameters that are in bf16 in training, by name."""
    kept = {id(value) for value in policy.head.parameters()} if policy.has_fp32_head else set[int]()
    return {name: value for name, value in castable_parameters(policy, policy.base) if id(value) not in kept}


@torch.no_grad()
def round_weights(policy: Backbone) -> None:
    """Round the weights to bf16 numbers, with which the training starts; their dtype is unchanged."""
    for value in bf16_parameters(policy).values():
        value.copy_(value.bfloat16())


class MasterWeights(Replicated):
    """bf16 weights; the optimizer updates fp32 master weights, which are rounded to the nearest bf16 numbers."""

    @classmethod
    def make_copies(cls, policy: Backbone) -> dict[str, Tensor]:
        """Return the tensors that the optimizer updates in place of the trained bf16 parameters."""
        return {
            name: nn.Parameter(torch.empty(0)) for name, value in bf16_parameters(policy).items() if value.requires_grad
        }

    def _prepare(self) -> None:
        """Move the model to the device; without DDP, which would reduce the gradients of bf16 weights in bf16."""
        self.model = self.accelerator.prepare_model(self.policy, evaluation_mode=True)
        self.prepared: Any = self.accelerator.prepare_optimizer(self.optimizer)
        self.bf16 = bf16_parameters(self.policy)

    def use_precision(self) -> None:
        """Cast the weights, which up to here are bf16 numbers in fp32, so that the forward can be checked exactly."""
        super().use_precision()
        for name, value in self.bf16.items():
            self._keep(name, value.data)
            value.data = value.data.bfloat16()
            if value.requires_grad:
                cast(Any, value).grad_dtype = torch.float32

    def _keep(self, name: str, weight: Tensor) -> None:
        """Keep an fp32 weight before it is cast."""
        if name in self.copies:
            self.copies[name].data = weight

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context for one forward and backward pass."""
        return nullcontext()

    def step(self, place: Place) -> float:
        """Average gradients over processes, clip them, take an optimizer step and return the norm before clipping."""
        if self.accelerator.num_processes > 1:
            self._reduce_gradients()
        total = super().step(place)
        for value in self.trainable:
            value.grad = None
        return total

    def _reduce_gradients(self) -> None:
        """Average the gradients over processes; each tensor alone, so that sums do not depend on the others."""
        for value in self.trainable:
            if value.grad is None:  # a process must not leave out a reduction that the others take part in
                value.grad = torch.zeros_like(value, dtype=torch.float32)
        gradients = [cast(Tensor, value.grad) for value in self.trainable]
        dtype = torch.bfloat16 if self.settings.reduce_dtype == "bf16" else torch.float32
        sums = [gradient.to(dtype) for gradient in gradients]
        for work in [torch.distributed.all_reduce(each, async_op=True) for each in sums]:
            cast(Any, work).wait()
        for gradient, each in zip(gradients, sums, strict=True):
            gradient.copy_(each).div_(self.accelerator.num_processes)

    @torch.no_grad()
    def _update(self, place: Place) -> None:
        for name, copy in self.copies.items():
            copy.grad = self.bf16[name].grad
        self.prepared.step()
        for copy in self.copies.values():
            copy.grad = None
        self._round()

    def shards(self, *, moments: bool) -> Iterator[ParameterShard]:
        """Yield the master weight of each trained parameter, or the parameter itself where it is in fp32."""
        if self.state is not None:
            self.state.begin()
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                weight = self.copies.get(name, value)
                yield self._shard(name, 0, weight.detach(), weight, slice(None), moments=moments)

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """Return the tensors that the optimizer updates for the named parameters."""
        found: dict[str, Tensor] = {**dict(self.policy.named_parameters()), **self.copies}
        return [found[name] for name, value in self.policy.named_parameters() if value.requires_grad and name in names]

    def finish(self) -> None:
        """Cast the weights to fp32, of which each is a bf16 number, and the gradients' dtype with them."""
        super().finish()
        for value in self.bf16.values():
            value.data = value.data.float()

    def sync_model(self) -> None:
        """Round master weights that were loaded, and write numbers of the optimizer's state back."""
        super().sync_model()
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """Round the master weights to the nearest bf16 numbers."""
        for name, copy in self.copies.items():
            self.bf16[name].copy_(copy)


class StochasticRounding(MasterWeights):
    """bf16 weights without a copy. Each parameter in turn is updated in fp32 and rounded stochastically."""

    def _keep(self, name: str, weight: Tensor) -> None:
        """Keep no fp32 weight."""

    @torch.no_grad()
    def _update(self, place: Place) -> None:
        groups = self.prepared.param_groups
        named = {id(copy): name for name, copy in self.copies.items()}
        for group in groups:
            for value in group["params"]:
                name = named.get(id(value))
                if name is None:
                    self._update_alone(group, value)
                elif (gradient := self.bf16[name].grad) is not None:
                    self._fill(name)
                    value.grad = gradient
                    self.bf16[name].grad = None
                    self._update_alone(group, value)
                    round_stochastically(value.data, (*place, name), out=self.bf16[name].data)
                    self._empty(value)

    def _update_alone(self, group: dict[str, Any], value: Tensor) -> None:
        """Take an optimizer step of one parameter, which no built-in optimizer updates by means of the others."""
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**group, "params": [value]}]
        self.optimizer.step()
        self.optimizer.param_groups = groups

    def _fill(self, name: str) -> None:
        self.copies[name].data = self.bf16[name].data.float()

    def _empty(self, copy: Tensor) -> None:
        copy.grad = None
        copy.data = copy.data.new_empty(0)

    def init_moments(self, steps: int, names: Collection[str]) -> None:
        """Create zero moments after `steps` steps for the named parameters, to be overwritten from a checkpoint."""
        for name in [name for name, _ in self.policy.named_parameters() if name in names]:
            if name not in self.copies:
                super().init_moments(steps, [name])
                continue
            self._fill(name)  # one at a time, as in training
            super().init_moments(steps, [name])
            self._empty(self.copies[name])

    def shards(self, *, moments: bool) -> Iterator[ParameterShard]:
        """Yield the weights themselves, in bf16, with the moments of their updates."""
        for shard in super().shards(moments=moments):
            weight = self.bf16.get(shard.name)
            yield shard if weight is None else shard._replace(values={**shard.values, WEIGHT: weight.detach().view(-1)})

    def _round(self) -> None:
        """Do nothing: the shards are the model's own weights."""
