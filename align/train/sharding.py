"""How weights, gradients and moments lie over the processes of a step, and what a step does with them there.

Everything that differs between one process, DDP, DeepSpeed's ZeRO and FSDP2 is in here; the loop and the checkpoints
see a model to call, a step to take, and the parts of the weights that this process holds.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW

from align.config import InputError, RunError
from align.models.backbone import Backbone, full, whole
from align.train.settings import TrainSettings

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of what AdamW keeps of a weight


class Part(NamedTuple):
    """What this process holds of one trained parameter: flat views in fp32, to be read and written."""

    name: str
    start: int  # of the flattened parameter
    values: dict[str, Tensor]  # WEIGHT and, where they are asked for, each of MOMENTS


class Whole:
    """Every process holds everything: one process alone, or DDP."""

    sharded = False  # whether each process holds a part of its own, which it has to store
    regathers = False  # whether weights are whole only while a layer runs

    def __init__(self, accelerator: Accelerator, policy: Backbone, optimizer: AdamW, settings: TrainSettings) -> None:
        self.accelerator, self.policy, self.optimizer, self.settings = accelerator, policy, optimizer, settings
        self.trainable = [value for value in policy.parameters() if value.requires_grad]
        self._prepare()

    def _prepare(self) -> None:
        self.model: nn.Module = self.accelerator.prepare_model(self.policy)
        self.prepared: Any = self.accelerator.prepare_optimizer(self.optimizer)

    def use_precision(self) -> None:
        """From here on let every call of the policy run in the step's precision, and answer in fp32."""
        forward = self.policy.forward

        def precise(*arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401 - whatever the policy's forward takes
            with self.autocast():
                answer = forward(*arguments, **named)
            return answer.float() if answer.dtype != torch.float64 else answer

        if self.settings.precision == "bf16":
            self.policy.forward = precise

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the step's precision."""
        if self.settings.precision == "fp32":
            return nullcontext()
        # The cache would hold every weight in bf16 until the forward is over, which sharding is there to avoid.
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, cache_enabled=not self.regathers)

    def set_rate(self, rate: float) -> None:
        """Give every part of the optimizer its share of the learning rate."""
        for group in self.prepared.param_groups:
            group["lr"] = rate * group["rate"]

    @contextmanager
    def accumulating(self) -> Generator[None]:
        """A block in which the micro-batches of one step add up their gradients."""
        yield

    def micro(self, final: bool) -> AbstractContextManager[Any]:
        """A block of one forward and backward; gradients are reduced in the final one."""
        return nullcontext() if final or self.settings.reduce == "each" else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, which is averaged over processes."""
        self.accelerator.backward(loss)

    def step(self) -> float:
        """Norm of the gradient over all processes; weights have changed, by the clipped one, only if it is finite."""
        norm = self.accelerator.clip_grad_norm_(self.trainable, self.settings.max_grad_norm or math.inf)
        total = float(full(torch.as_tensor(norm)))
        if math.isfinite(total):
            self.prepared.step()
        self.prepared.zero_grad()
        return total

    def parts(self, *, moments: bool) -> Iterator[Part]:
        """What this process holds, in the order of the parameters."""
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                yield self._part(name, 0, value.detach(), value, slice(None), moments=moments)

    def _part(self, name: str, start: int, weight: Tensor, key: Tensor, within: slice, *, moments: bool) -> Part:
        """A part whose moments are the optimizer's of `key`, flattened, at `within`."""
        values = {WEIGHT: weight.view(-1)}
        if moments:
            state = self.optimizer.state[key]
            values |= {each: _local(state[each]).view(-1)[within] for each in MOMENTS}
        return Part(name, start, values)

    def begin_moments(self, steps: int) -> None:
        """Give the optimizer moments of 0 after `steps` steps, for those of a checkpoint to take their place."""
        for value in self._optimized():
            count = torch.tensor(float(steps), dtype=torch.float32, device=value.device if value.is_cuda else "cpu")
            zeros = {each: torch.zeros_like(value, memory_format=torch.preserve_format) for each in MOMENTS}
            self.optimizer.state[value] = {"step": count, **zeros}

    def _optimized(self) -> Sequence[Tensor]:
        return self.trainable

    def show(self) -> None:
        """Let the model see what was written into the parts."""

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter in full, one after the other, on every process."""
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                yield name, value.detach()

    @torch.no_grad()
    def put(self, new: Mapping[str, Tensor]) -> None:
        """Write the values of parameters, by name and in full, the same on every process."""
        for part in self.parts(moments=False):
            if part.name in new:
                weight = part.values[WEIGHT]
                weight.copy_(new[part.name].reshape(-1)[part.start : part.start + len(weight)])
        self.show()


class Zero12(Whole):
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

    def _optimized(self) -> Sequence[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def show(self) -> None:
        """Let the model see what was written into the parts."""
        self.zero.update_lp_params()


class Zero3(Zero12):
    """DeepSpeed's ZeRO 3: weights too are held in shares, and whole only while a layer runs."""

    regathers = True

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

    def _optimized(self) -> Sequence[Tensor]:
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

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter in full, one after the other, on every process."""
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                with whole([value]):
                    yield name, value.detach()


class Fsdp2(Whole):
    """PyTorch's FSDP2: every parameter is cut along its first dimension, and whole only while a layer runs."""

    sharded = regathers = True

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

    def _optimized(self) -> Sequence[Tensor]:
        self._let_go()
        return [value for value in self.policy.parameters() if value.requires_grad]

    def parts(self, *, moments: bool) -> Iterator[Part]:
        """The rows of each parameter that this process holds."""
        self._let_go()
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                local = _local(value.detach())
                rows = -(-len(value) // self.accelerator.num_processes)  # of every process but the last ones
                start = min(rows * self.accelerator.process_index, len(value)) * (value.numel() // len(value))
                if local.numel():
                    yield self._part(name, start, local, value, slice(None), moments=moments)

    def _let_go(self) -> None:
        """Cut again what the last forward has left whole: the root's own parameters."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter in full, one after the other, on every process."""
        self._let_go()
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                yield name, full(value.detach())


def num_values(values: Iterable[Tensor]) -> int:
    """How many numbers the parameters hold in full."""
    return sum(getattr(value, "ds_numel", value.numel()) for value in values)


def _local(value: Tensor) -> Tensor:
    return cast(Any, value).to_local() if hasattr(value, "to_local") else value


def shard(accelerator: Accelerator, policy: Backbone, optimizer: AdamW, settings: TrainSettings) -> Whole:
    """The policy and its optimizer as the launch file wants them to lie."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        stage = cast(Any, accelerator.state.deepspeed_plugin).zero_stage
        if stage not in ZERO:
            raise InputError(f"the launch file asks for ZeRO stage {stage}; there are {', '.join(map(str, ZERO))}")
        return ZERO[stage](accelerator, policy, optimizer, settings)
    return (Fsdp2 if kind == DistributedType.FSDP else Whole)(accelerator, policy, optimizer, settings)


ZERO = {1: Zero12, 2: Zero12, 3: Zero3}
