"""The default token budget of a micro-batch: on a GPU it depends on the memory and on the model."""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator

from align.accounting.flops import Decoder
from align.accounting.memory import MicroBatch, activation_bytes
from align.accounting.peak_memory import gpu_memory
from align.distributed.processes import Processes
from align.models.backbone import Backbone
from align.models.loading.config import dimensions
from align.train.settings import CPU_BUDGET, TrainSettings
from align.train.training_run import TrainingRun

# Every micro-batch under autocast casts the weights to bf16 and adds up their gradients: about 24 bytes a weight,
# whatever its tokens. At 1B weights and the 3.3 TB/s of an H100 that is 8 ms, about a sixth of a pass over 2,048 tokens
# and 2 % of one over 16,384. (Estimated, not measured.)
GPU_BUDGETS = (16_384, 8192, 4096)
ACTIVATION_SHARE = 0.25  # of the memory; weights, gradients and moments in fp32 take 16 bytes a weight of the rest


def default_token_budget(
    settings: TrainSettings, model: Decoder | str, *, checkpointing: bool, memory: int | None
) -> int:
    """Return the largest default budget whose activations take at most a quarter of the memory of a GPU, in bytes.

    `memory` is None on a CPU. For a model whose activations are unknown it is the budget of a CPU.
    """
    if memory is None or isinstance(model, str) or model.recurrence is not None:
        return CPU_BUDGET
    bf16, bf16_weights = settings.precision == "bf16", settings.weights != "fp32"
    for tokens in GPU_BUDGETS:
        micro = MicroBatch(tokens=tokens, bf16=bf16, bf16_weights=bf16_weights, checkpointing=checkpointing)
        if activation_bytes(model, micro) <= ACTIVATION_SHARE * memory:
            return tokens
    return CPU_BUDGET


def with_token_budget(run: TrainingRun, policy: Backbone, accelerator: Accelerator) -> TrainingRun:
    """Return the run with a token budget: unless its settings have one, the default for the smallest GPU of all."""
    settings = run.settings
    if settings.tokens_per_micro_batch is not None:
        return run
    memories = Processes(accelerator).all_gather_object(gpu_memory(accelerator.device))
    budget = default_token_budget(
        settings,
        dimensions(policy.base.config),
        checkpointing=any(getattr(module, "gradient_checkpointing", False) for module in policy.modules()),
        memory=min((each for each in memories if each is not None), default=None),
    )
    return replace(run, settings=settings.model_copy(update={"tokens_per_micro_batch": budget}))
