"""Interface of a sharding strategy: model wrapper, gradient reduction, optimizer step and parameter shards.

The loop and the checkpoints see only this interface. In the base class every process holds the complete model; ZeRO
and FSDP2 are in the other modules of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from align.models.backbone import Backbone
from align.models.pieces import CompiledPieces
from align.models.tree.batch import TokenBatch
from align.train.settings import PRODUCTS, TrainSettings
from align.train.sharding.optimizer import OptimizerState
from align.train.sharding.products import bf16_products, check_products

Place = tuple[int, ...]  # the address of a step's random numbers: seed and optimizer step
WEIGHT = "weight"
AVERAGE = "weight_average"  # no name that an optimizer gives to its state
CLIP_EPSILON = 1e-6  # that PyTorch adds to the norm when it clips
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of AdamW's moments
LARGEST = "max_exp_avg_sq"  # and, with amsgrad, of the largest second moments so far


class ParameterShard(NamedTuple):
    """What this process holds of one trained parameter: flat views that may be read and written.

    They are in fp32, except weights in bf16 that have no master weights.
    """

    name: str
    start: int  # position in the flattened parameter
    values: dict[str, Tensor]  # WEIGHT and, if asked for, each of the moments and, once it has begun, AVERAGE


class Replicated:
    """Every process holds the complete model: a single process, or DDP."""

    is_sharded = False  # whether each process holds, and must save, a different part
    gathers_per_layer = False  # whether complete weights exist only while a layer runs
    stage = 0  # ZeRO stage
    num_rounded = 0  # weights that are gathered in bf16
    always_rounds = False  # whether they are in fp32 forward passes, too
    pieces: CompiledPieces | None = None  # of the policy, set by `use_precision`
    _in_fp32 = False  # set by `full_precision`

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Backbone,
        optimizer: Optimizer,
        settings: TrainSettings,
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.accelerator, self.policy, self.optimizer, self.settings = accelerator, policy, optimizer, settings
        self.copies = copies or {}  # what the optimizer updates in place of the parameters of these names
        self.state = None if type(optimizer) is AdamW else OptimizerState(optimizer)
        self.averages: dict[str, Tensor] = {}  # of this process's shards, by name of the parameter
        self.is_averaging = False  # whether they hold weights yet
        self.trainable = [value for value in policy.parameters() if value.requires_grad]
        self._prepare()

    @classmethod
    def make_copies(cls, policy: Backbone) -> dict[str, Tensor]:
        """Return what the optimizer updates in place of the parameters of these names."""
        return {}

    def _prepare(self) -> None:
        """Wrap the model and the optimizer with accelerate."""
        self.model: nn.Module = self.accelerator.prepare_model(self.policy)
        if self.settings.reduce_dtype == "bf16" and isinstance(self.model, DistributedDataParallel):
            # DDP refuses the hook itself without NCCL, which it does not need
            hook: Callable[[Any, Any], Any] = lambda group, bucket: bf16_compress_hook(group, bucket)  # noqa: E731
            self.model.register_comm_hook(None, hook)
        self.prepared: Any = self.accelerator.prepare_optimizer(self.optimizer)

    def use_precision(self) -> None:
        """Run every later forward pass of the policy in the precision of the settings, with fp32 output."""
        forward = self.policy.forward

        def autocast_forward(*arguments: Any, **named: Any) -> Tensor:  # noqa: ANN401 - the arguments of `forward`
            with self.autocast():
                output = forward(*arguments, **named)
            return output.float() if output.dtype != torch.float64 else output

        if self.settings.precision == PRODUCTS:
            check_products(self.accelerator.device)
        if self.settings.precision != "fp32":
            self.policy.forward = autocast_forward
        if self.settings.compile == "pieces":
            self.pieces = CompiledPieces(self.policy)

    def warm_up(self, batch: TokenBatch) -> None:
        """Run a backward pass with zero gradients if DDP is used, which rearranges its buckets after the first one.

        Otherwise this would happen in a different step after a resume, and with three or more ranks the last bits of
        a sum depend on its position in a bucket. Pieces are compiled here, too, for the sizes of the same batch after a
        resume, on which their last bits may depend.
        """
        if self.pieces is not None:
            torch.autograd.grad(self.policy(batch).sum(), self.trainable, allow_unused=True)
            with torch.no_grad():
                self.policy(batch)
        if isinstance(self.model, DistributedDataParallel):
            self.backward((self.model(batch) * 0).sum())
            self.prepared.zero_grad()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which matrix products use the precision of the settings."""
        if self.settings.precision == "fp32" or self._in_fp32:
            return nullcontext()
        if self.settings.precision == PRODUCTS:
            return bf16_products()
        # With sharding, autocast's cache would keep a bf16 copy of every gathered weight until the forward pass ends
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, cache_enabled=not self.gathers_per_layer)

    @contextmanager
    def full_precision(self) -> Generator[None]:
        """Run forward passes in this block in fp32, whatever the precision of the settings."""
        self._in_fp32 = True
        try:
            yield
        finally:
            self._in_fp32 = False

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of each parameter group, times its `lr_multiplier`."""
        for group in self.prepared.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]

    @contextmanager
    def accumulate_gradients(self) -> Generator[None]:
        """Add up the gradients of the micro-batches within the block."""
        yield

    def micro_batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context for one forward and backward pass; gradients are reduced in the last one of a step."""
        return nullcontext() if is_last or self.settings.reduce == "each" else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss; gradients are averaged over processes."""
        with bf16_products() if self.settings.precision == PRODUCTS else nullcontext():
            self._backward(loss)

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, place: Place) -> float:
        """Clip gradients, take an optimizer step and return the gradient norm over all processes before clipping.

        If the norm is not finite, the weights are left unchanged.
        """
        total = self._clip()
        if math.isfinite(total):
            self._update(place)
        self.prepared.zero_grad()
        return total

    def _clip(self) -> float:
        """Clip gradients and return their norm before that."""
        norm = get_total_norm([value.grad for value in self.trainable if value.grad is not None])
        limit = self.settings.max_grad_norm
        # PyTorch's own function also multiplies by 1, which on a CPU takes a third as long as AdamW
        if limit and limit / (norm + CLIP_EPSILON) < 1:
            clip_grads_with_norm_(self.trainable, limit, norm)
        return float(norm)

    def _update(self, place: Place) -> None:
        """Update the weights."""
        self.prepared.step()

    def shards(self, *, moments: bool) -> Iterator[ParameterShard]:
        """Yield what this process holds of each trained parameter, in the order of the parameters."""
        if self.state is not None:
            self.state.begin()
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                yield self._shard(name, 0, value.detach(), value, slice(None), moments=moments)

    def _shard(
        self, name: str, start: int, weight: Tensor, key: Tensor, within: slice, *, moments: bool
    ) -> ParameterShard:
        """Return a shard; its moments are `within` the flattened optimizer state of `key`, if that has any."""
        values = {WEIGHT: weight.view(-1)}
        if moments and self.state is not None:
            values |= self.state.tensors(key)
        elif moments and (state := self.optimizer.state.get(key)):
            values |= {name: local(state[name]).view(-1)[within] for name in self._moments}
        if moments and self.is_averaging:
            values[AVERAGE] = self.averages[name]
        return ParameterShard(name, start, values)

    @property
    def _moments(self) -> tuple[str, ...]:
        """Return the names of the moments that AdamW keeps."""
        return (*MOMENTS, LARGEST) if any(group["amsgrad"] for group in self.optimizer.param_groups) else MOMENTS

    def init_moments(self, steps: int, names: Collection[str]) -> None:
        """Create zero moments after `steps` steps for the named parameters, to be overwritten from a checkpoint."""
        if self.state is not None:
            self.state.create(self._optimized(names))
            return
        for value in self._optimized(names):
            count = torch.tensor(float(steps), dtype=torch.float32, device=value.device if value.is_cuda else "cpu")
            zeros = {name: torch.zeros_like(value, memory_format=torch.preserve_format) for name in self._moments}
            self.optimizer.state[value] = {"step": count, **zeros}

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """Return the tensors that the optimizer updates for the named parameters."""
        return [value for name, value in self.policy.named_parameters() if value.requires_grad and name in names]

    @property
    def rounds_gathers(self) -> bool:
        """Whether weights that autocast rounds to bf16 are gathered in bf16 where weights are sharded."""
        return self.settings.precision == "bf16" and self.settings.weights == "fp32"

    @property
    def in_bf16(self) -> bool:
        """Whether the forward pass runs with bf16 weights."""
        return self.settings.weights != "fp32"

    def finish(self) -> None:
        """Return to fp32 weights and the policy's own forward pass after the training, to compare, merge and save."""
        if self.pieces is not None:
            self.pieces.remove()
        vars(self.policy).pop("forward", None)  # that of `use_precision`
        self.policy.max_rows = self.policy.sequence_group = None

    def sync_model(self) -> None:
        """Copy values that were written into shards to the model and the optimizer, where they hold copies."""
        if self.state is not None:
            self.state.write_numbers()

    def reshard(self) -> None:
        """Release complete weights that a forward pass has left behind."""

    @contextmanager
    def complete(self, values: Sequence[Tensor]) -> Generator[Sequence[Tensor]]:
        """Yield the complete values of parameters and buffers for the length of the block; every process enters it."""
        yield [value.detach() for value in values]

    @torch.no_grad()
    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters by name to complete values, which are the same on every process."""
        for shard in self.shards(moments=False):
            if shard.name in values:
                weight = shard.values[WEIGHT]
                weight.copy_(values[shard.name].reshape(-1)[shard.start : shard.start + len(weight)])
        self.sync_model()


def num_parameters(values: Iterable[Tensor]) -> int:
    """Return the number of values in the parameters, counted before sharding and 4-bit packing."""
    sizes = [
        getattr(value, "ds_numel", value.numel()) if state is None else math.prod(state.shape)
        for value in values
        for state in [getattr(value, "quant_state", None)]
    ]
    return sum(sizes)


def local(value: Tensor) -> Tensor:
    """Return this process's rows of a parameter that FSDP2 shards; any other value is returned unchanged."""
    return cast(Any, value).to_local() if hasattr(value, "to_local") else value
