"""The sharding that the launch file asks for."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from align.errors import InputError
from align.models.backbone import Backbone
from align.train.settings import TrainSettings
from align.train.sharding.bf16.weights import MasterWeights, StochasticRounding
from align.train.sharding.fsdp import Fsdp2
from align.train.sharding.optimizer import make_optimizer
from align.train.sharding.replicated import Replicated
from align.train.sharding.zero import Zero3, Zero12

ZERO = {1: Zero12, 2: Zero12, 3: Zero3}
REPLICATED = {"fp32": Replicated, "bf16_master": MasterWeights, "bf16_stochastic": StochasticRounding}


def prepare_sharding(
    accelerator: Accelerator, policy: Backbone, settings: TrainSettings, head_lr_multiplier: float = 1.0
) -> Replicated:
    """Prepare the policy and its optimizer as the launch file asks: replicated, ZeRO or FSDP2."""
    way = _way(accelerator, settings)
    copies = way.make_copies(policy)
    optimizer = make_optimizer(policy, settings, head_lr_multiplier, copies)
    return way(accelerator, policy, optimizer, settings, copies)


def _way(accelerator: Accelerator, settings: TrainSettings) -> type[Replicated]:
    kind = accelerator.distributed_type
    settings.check_kind(kind.value)
    if kind == DistributedType.DEEPSPEED:
        stage = cast(Any, accelerator.state.deepspeed_plugin).zero_stage
        if stage not in ZERO:
            raise InputError(f"the launch file enables ZeRO stage {stage}; supported: {', '.join(map(str, ZERO))}")
        return ZERO[stage]
    return Fsdp2 if kind == DistributedType.FSDP else REPLICATED[settings.weights]


def describe(sharding: Replicated, settings: TrainSettings) -> str:
    """Return the device, processes, threads, precision, micro-batches and compiled modules of a training."""
    accelerator, way = sharding.accelerator, type(sharding).__name__
    if way != "Fsdp2":
        way = f"ZeRO-{sharding.stage}" if sharding.stage else "DDP"
    number = accelerator.num_processes
    threads = torch.get_num_threads()
    processes = f"{number} processes ({way})" if number > 1 else "1 process"
    numbers = settings.precision if settings.weights == "fp32" else f"weights {settings.weights}"
    budget = f"micro-batches of up to {settings.token_budget} tokens"
    pieces = "" if sharding.pieces is None else f"; {sharding.pieces.describe()}"
    return f"training on {accelerator.device}: {processes}, {threads} thread(s) each, {numbers}, {budget}{pieces}"
