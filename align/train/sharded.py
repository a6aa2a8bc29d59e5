"""Weights, gradients and moments in shares: DeepSpeed's ZeRO 1 to 3, and PyTorch's FSDP2.

What of DeepSpeed's optimizer has no public name is reached here and nowhere else; the version is bound below 0.20.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW

from align.errors import InputError, RunError
from align.models.backbone import Backbone
from align.models.weights import full_tensor, gathered_parameters
from align.train.settings import TrainSettings
from align.train.sharding import Part, Replicated, local


class Zero12(Replicated):
    """DeepSpeed's ZeRO 1 and 2: moments, and gradients, in shares of one flat buffer."""

    sharded = True

    def _prepare(self) -> None:
        config = cast(Any, self.accelerator.state.deepspeed_plugin).deepspeed_config
        sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # the loop counts by itself
        config |= {**sizes, "gradient_clipping": self.settings.max_grad_norm}
        self.engine: Any = self.accelerator.prepare(self.policy, self.optimizer)[0]
        if type(self.engine).__name__ != "DeepSpeedEngine":
            raise RunError(f"DeepSpeed was to wrap the model, and it is a {type(self.engine).__name__}")
        self.model, self.zero, self.prepared = self.engine, self.engine.optimizer, self.engine.optimizer
        self.stage = int(config["zero_optimization"]["stage"])
        self._open: AbstractContextManager[Any] | None = None

    @contextmanager
    def accumulating(self) -> Generator[None]:
        """A block in which the micro-batches of one step add up their gradients, to be reduced once at its end.

        On a failure it stays open: to leave it would wait for processes that may never come.
        """
        if self.settings.reduce == "each":
            yield
            return
        self._open = cast(AbstractContextManager[Any], self.engine.coalesce_grad_reduction())
        self._open.__enter__()
        yield
        self._open.__exit__(None, None, None)

    def micro(self, final: bool) -> AbstractContextManager[Any]:
        """A block of one forward and backward."""
        self.engine.set_gradient_accumulation_boundary(final and self.settings.reduce == "each")
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, which is averaged over processes."""
        self.engine.backward(loss)

    def step(self) -> float:
        """Norm of the gradient; DeepSpeed leaves the weights as they are where it is not finite."""
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def parts(self, *, moments: bool) -> Iterator[Part]:
        """What this process holds of the flat buffers."""
        for name, value in self.policy.named_parameters():
            place = getattr(value, "_hp_mapping", None)
            if value.requires_grad and place is not None:
                flat = self.zero.single_partition_of_fp32_groups[place.param_group_index]
                first = place.hp_fragment_address.start
                within = slice(first, first + place.hp_fragment_address.numel)
                start = place.lp_fragment_address.start
                yield self._part(name, start, flat.detach()[within], flat, within, moments=moments)

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """All flat buffers: in them what had no gradient has moments too."""
        return list(self.zero.single_partition_of_fp32_groups)

    def show(self) -> None:
        """Let the model see what was written into the parts."""
        self.zero.update_lp_params()


class Zero3(Zero12):
    """DeepSpeed's ZeRO 3: weights too are held in shares, and whole only while a layer runs."""

    gathers_per_layer = True

    def parts(self, *, moments: bool) -> Iterator[Part]:
        """What this process holds of each parameter, without the padding of the last share."""
        rank = self.accelerator.process_index
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                place: Any = value
                group, first, share = self.zero.grad_position[self.zero.get_param_id(value)]
                start = rank * share
                within = slice(first, first + max(0, min(share, place.ds_numel - start)))
                flat = self.zero.fp32_partitioned_groups_flat[group]
                if within.start < within.stop:
                    yield self._part(name, start, flat.detach()[within], flat, within, moments=moments)

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """All flat buffers."""
        return list(self.zero.fp32_partitioned_groups_flat)

    def show(self) -> None:
        """Let the model see what was written into the parts, small parameters that it keeps whole among them."""
        for group, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
            self.zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            self.zero._unflatten_partitioned_parameters(group)  # there is no public way
        kept: list[Any] = self.zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter in full, one after the other, on every process."""
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                with gathered_parameters([value]):
                    yield name, value.detach()


class Fsdp2(Replicated):
    """PyTorch's FSDP2: every parameter is cut along its first dimension, and whole only while a layer runs."""

    sharded = gathers_per_layer = True
    stage = 3

    def _prepare(self) -> None:
        base: Any = self.policy.base
        layers: Any = base._no_split_modules  # by whose names accelerate finds the layers to shard
        cast(Any, self.policy)._no_split_modules = layers
        self.model, self.prepared = self.accelerator.prepare(self.policy, self.optimizer)
        self.trainable = [value for value in self.policy.parameters() if value.requires_grad]
        self.optimizer = self.prepared.optimizer

    def micro(self, final: bool) -> AbstractContextManager[Any]:
        """A block of one forward and backward; gradients are reduced in the final one."""
        cast(Any, self.model).set_requires_gradient_sync(final or self.settings.reduce == "each")
        return nullcontext()

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """The parameters as they are cut."""
        self._let_go()
        return super()._optimized(names)

    def parts(self, *, moments: bool) -> Iterator[Part]:
        """The rows of each parameter that this process holds."""
        self._let_go()
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                rows_here = local(value.detach())
                rows = -(-len(value) // self.accelerator.num_processes)  # of every process but the last ones
                start = min(rows * self.accelerator.process_index, len(value)) * (value.numel() // len(value))
                if rows_here.numel():
                    yield self._part(name, start, rows_here, value, slice(None), moments=moments)

    def _let_go(self) -> None:
        """Cut again what the last forward has left whole: the root's own parameters."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter in full, one after the other, on every process."""
        self._let_go()
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                yield name, full_tensor(value.detach())


def shard(accelerator: Accelerator, policy: Backbone, optimizer: AdamW, settings: TrainSettings) -> Replicated:
    """The policy and its optimizer as the launch file wants them to lie."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        stage = cast(Any, accelerator.state.deepspeed_plugin).zero_stage
        if stage not in ZERO:
            raise InputError(f"the launch file asks for ZeRO stage {stage}; there are {', '.join(map(str, ZERO))}")
        return ZERO[stage](accelerator, policy, optimizer, settings)
    return (Fsdp2 if kind == DistributedType.FSDP else Replicated)(accelerator, policy, optimizer, settings)


ZERO = {1: Zero12, 2: Zero12, 3: Zero3}
