"""How weights, gradients and moments lie over the processes of a step, and what a step does with them there.

The loop and the checkpoints see a model to call, a step to take, and the parts of the weights that this process holds.
Here every process holds all of them; what is otherwise under ZeRO and FSDP2 is in `align.train.sharded`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from align.models.backbone import Backbone
from align.models.tree.batch import TokenBatch
from align.models.weights import full_tensor
from align.train.settings import TrainSettings

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of what AdamW keeps of a weight


class Part(NamedTuple):
    """What this process holds of one trained parameter: flat views in fp32, to be read and written."""

    name: str
    start: int  # of the flattened parameter
    values: dict[str, Tensor]  # WEIGHT and, where they are asked for, each of MOMENTS


class Replicated:
    """Every process holds everything: one process alone, or DDP."""

    sharded = False  # whether each process holds a part of its own, which it has to store
    gathers_per_layer = False  # whether weights are whole only while a layer runs
    stage = 0  # ZeRO's word for what is shared out

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

    def settle(self, batch: TokenBatch) -> None:
        """Take a backward pass of nothing where DDP, after the first one of a process, lays its buckets anew.

        In a life that goes on from a kill the first one would be another step's, and over three ranks and more the last
        bits of a sum depend on where in a bucket it stands.
        """
        if isinstance(self.model, DistributedDataParallel):
            self.backward((self.model(batch) * 0).sum())
            self.prepared.zero_grad()

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the step's precision."""
        if self.settings.precision == "fp32":
            return nullcontext()
        # The cache would hold every weight in bf16 until the forward is over, which sharding is there to avoid.
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, cache_enabled=not self.gathers_per_layer)

    def set_rate(self, rate: float) -> None:
        """Give every part of the optimizer its share of the learning rate."""
        for group in self.prepared.param_groups:
            group["lr"] = rate * group["lr_multiplier"]

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
        total = float(full_tensor(torch.as_tensor(norm)))
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
        """A part whose moments are the optimizer's of `key`, flattened, at `within`; what had no gradient has none."""
        values = {WEIGHT: weight.view(-1)}
        if moments and (state := self.optimizer.state.get(key)):
            values |= {each: local(state[each]).view(-1)[within] for each in MOMENTS}
        return Part(name, start, values)

    def begin_moments(self, steps: int, names: Collection[str]) -> None:
        """Give what has these names moments of 0 after `steps` steps, for those of a checkpoint to take their place."""
        for value in self._optimized(names):
            count = torch.tensor(float(steps), dtype=torch.float32, device=value.device if value.is_cuda else "cpu")
            zeros = {each: torch.zeros_like(value, memory_format=torch.preserve_format) for each in MOMENTS}
            self.optimizer.state[value] = {"step": count, **zeros}

    def _optimized(self, names: Collection[str]) -> Sequence[Tensor]:
        """What the optimizer knows of the parameters."""
        return [value for name, value in self.policy.named_parameters() if value.requires_grad and name in names]

    def show(self) -> None:
        """Let the model see what was written into the parts."""

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter in full, one after the other, on every process."""
        for name, value in self.policy.named_parameters():
            if value.requires_grad:
                yield name, value.detach()

    @torch.no_grad()
    def load_parameters(self, new: Mapping[str, Tensor]) -> None:
        """Write the values of parameters, by name and in full, the same on every process."""
        for part in self.parts(moments=False):
            if part.name in new:
                weight = part.values[WEIGHT]
                weight.copy_(new[part.name].reshape(-1)[part.start : part.start + len(weight)])
        self.show()


def num_parameters(values: Iterable[Tensor]) -> int:
    """How many numbers the parameters hold in full."""
    packed = [(value, getattr(value, "quant_state", None)) for value in values]  # two weights in 4 bits share a byte
    whole = [
        getattr(value, "ds_numel", value.numel()) if state is None else math.prod(state.shape)
        for value, state in packed
    ]
    return sum(whole)


def local(value: Tensor) -> Tensor:
    """The rows here of a parameter that FSDP2 has cut, or the value itself."""
    return cast(Any, value).to_local() if hasattr(value, "to_local") else value
