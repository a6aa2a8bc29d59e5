"""The sharding that the launch file asks for."""

from __future__ import annotations

from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.optim import Optimizer

from align.errors import InputError
from align.models.backbone import Backbone
from align.train.settings import TrainSettings
from align.train.sharding.fsdp import Fsdp2
from align.train.sharding.optimizer import check_sharded
from align.train.sharding.replicated import Replicated
from align.train.sharding.zero import Zero3, Zero12

ZERO = {1: Zero12, 2: Zero12, 3: Zero3}


def prepare_sharding(
    accelerator: Accelerator, policy: Backbone, optimizer: Optimizer, settings: TrainSettings
) -> Replicated:
    """Prepare the policy and its optimizer as the launch file asks: replicated, ZeRO or FSDP2."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        check_sharded(optimizer, kind.value)
    if kind == DistributedType.DEEPSPEED:
        stage = cast(Any, accelerator.state.deepspeed_plugin).zero_stage
        if stage not in ZERO:
            raise InputError(f"the launch file enables ZeRO stage {stage}; supported: {', '.join(map(str, ZERO))}")
        return ZERO[stage](accelerator, policy, optimizer, settings)
    return (Fsdp2 if kind == DistributedType.FSDP else Replicated)(accelerator, policy, optimizer, settings)
