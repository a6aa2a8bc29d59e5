"""DeepSpeed ZeRO stages 1 to 3.

Attributes of DeepSpeed's optimizer without a public name are used only in this module; its version is bound below 0.20.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from align.errors import RunError
from align.models.weights import gathered_parameters
from align.train.sharding.bf16.gathers import autocast_weights
from align.train.sharding.replicated import ParameterShard, Place, Replicated, num_parameters

PARAM_COMM_DTYPE = "comm_dtype"  # attribute of a parameter: the dtype that DeepSpeed gathers it in


class Zero12(Replicated):
    """DeepSpeed ZeRO stages 1 and 2: optimizer state, and gradients, are sharded as slices of one flat buffer."""

    is_sharded = True

    def _prepare(self) -> None:
        config = cast(Any, self.accelerator.state.deepspeed_plugin).deepspeed_config
        sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # the loop accumulates itself
        autocast = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}  # instead, the loop casts
        config |= {**sizes, **autocast, "gradient_clipping": self.settings.max_grad_norm}
        config["communication_data_type"] = self.settings.reduce_dtype  # of gradients
        self.engine: Any = self.accelerator.prepare(self.policy, self.optimizer)[0]
        if type(self.engine).__name__ != "DeepSpeedEngine":
            raise RunError(f"expected a DeepSpeedEngine around the model, not a {type(self.engine).__name__}")
        self.model, self.zero, self.prepared = self.engine, self.engine.optimizer, self.engine.optimizer
        self.stage = int(config["zero_optimization"]["stage"])

    @contextmanager
    def accumulate_gradients(self) -> Generator[None]:
        """Add up the gradients of the micro-batches within the block and reduce them once at its end.

        On an error the inner context is left open: closing it would wait for processes that may have died.
        """
        if self.settings.reduce == "each":
            yield
            return
        self._reduction = cast(AbstractContextManager[Any], self.engine.coalesce_grad_reduction())  # kept open on error
        self._reduction.__enter__()
        yield
        self._reduction.__exit__(None, None, None)

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context for one forward and backward pass."""
        self.engine.set_gradient_accumulation_boundary(is_last and self.settings.reduce == "each")
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, place: Place) -> float:
        """Take an optimizer step and return the gradient norm; DeepSpeed skips the step if it is not finite."""
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def shards(self, *, moments: bool) -> Iterator[ParameterShard]:
        """Yield what this process holds of the flat buffers."""
        for name, value in self.policy.named_parameters():
            mapping = getattr(value, "_hp_mapping", None)
            if value.requires_grad and mapping is not None:
                flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
                first = mapping.hp_fragment_address.start
                within = slice(first, first + mapping.hp_fragment_address.numel)
                start = mapping.lp_fragment_address.start
                yield self._shard(name, start, flat.detach()[within], flat, within, moments=moments)

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """Return all flat buffers; they have moments even for parameters without a gradient."""
        return list(self.zero.single_partition_of_fp32_groups)

    def sync_model(self) -> None:
        """Copy the fp32 shards to the model's parameters."""
        self.zero.update_lp_params()


class Zero3(Zero12):
    """DeepSpeed ZeRO stage 3: weights are sharded too, and gathered while a layer runs."""

    gathers_per_layer = True
    _rounded: Sequence[Any] = ()  # parameters that are gathered in bf16

    def use_precision(self) -> None:
        """Gather weights in bf16 that autocast rounds, in forward and backward passes and nowhere else."""
        super().use_precision()
        names = autocast_weights(self.policy) if self.rounds_gathers else []
        # Small parameters are complete in every process, also in fp32 passes
        found = [value for name, value in self.policy.named_parameters() if name in names]
        self._rounded = [value for value in found if not cast(Any, value).ds_persist]
        self.num_rounded = num_parameters(self._rounded)
        if self._rounded:  # before DeepSpeed's own hooks, which gather weights
            self.policy.register_forward_pre_hook(self._before_forward, prepend=True)
            self.policy.register_forward_hook(self._after_forward, always_call=True)

    def _before_forward(self, *_: object) -> None:
        self._round(not self._in_fp32)

    def _after_forward(self, *_: object) -> None:
        self._round(False)

    def _round(self, rounds: bool) -> None:
        """Gather weights in bf16, or as they are, from here on; an attribute that DeepSpeed reads."""
        for value in self._rounded:
            if rounds:
                setattr(value, PARAM_COMM_DTYPE, torch.bfloat16)
            elif hasattr(value, PARAM_COMM_DTYPE):
                delattr(value, PARAM_COMM_DTYPE)

    def _backward(self, loss: Tensor) -> None:
        self._round(True)
        super()._backward(loss)
        self._round(False)

    def shards(self, *, moments: bool) -> Iterator[ParameterShard]:
        """Yield what this process holds of each parameter, without the padding of the last shard."""
        rank = self.accelerator.process_index
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                parameter: Any = value
                group, first, size = self.zero.grad_position[self.zero.get_param_id(value)]
                start = rank * size
                within = slice(first, first + max(0, min(size, parameter.ds_numel - start)))
                flat = self.zero.fp32_partitioned_groups_flat[group]
                if within.start < within.stop:
                    yield self._shard(name, start, flat.detach()[within], flat, within, moments=moments)

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """Return all flat buffers."""
        return list(self.zero.fp32_partitioned_groups_flat)

    def sync_model(self) -> None:
        """Copy the fp32 shards to the model, including small parameters that every process holds completely."""
        for group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            self.zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            self.zero._unflatten_partitioned_parameters(group)  # there is no public way
        persistent: list[Any] = self.zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @contextmanager
    def complete(self, values: Sequence[Tensor]) -> Generator[Sequence[Tensor]]:
        """Gather parameters for the length of the block."""
        with gathered_parameters(values):
            yield [value.detach() for value in values]
