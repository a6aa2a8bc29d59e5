"""How a step trains: optimizer, schedule, batch, precision, evaluation and checkpoints."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from align.config import Settings
from align.data.batching import steps_per_epoch
from align.errors import InputError

Decay = Annotated[float, Field(ge=0, lt=1)]  # of a moving average


class TrainSettings(Settings):
    """Settings of the loop. AdamW (Loshchilov & Hutter 2019) decays matrices, not norms and biases."""

    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)  # of the learning rate, at the end of cosine and linear
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    prompts_per_step: int = Field(default=64, ge=1)
    tokens_per_micro_batch: int = Field(default=2048, ge=1)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.98)  # as in NeMo-Aligner's published settings
    epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0: measured, not clipped
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: matrix products in bf16 over fp32 weights
    # Over processes: once a step, which takes a whole gradient's memory, or after each micro-batch.
    reduce: Literal["once", "each"] = "once"
    evaluate_every: int | None = Field(default=None, ge=1)  # optimizer steps; always after the last one
    keep: Literal["last", "best"] = "last"  # best: the evaluated weights with the lowest loss on the held-out rows
    checkpoint_steps: int | None = Field(default=None, ge=1)
    checkpoint_minutes: float | None = Field(default=15.0, gt=0)
    trackers: list[str] = Field(default_factory=list[str])  # accelerate's names: tensorboard, wandb, trackio

    @field_validator("min_lr_ratio")
    @classmethod
    def _falls(cls, share: float, info: ValidationInfo) -> float:
        if share and info.data.get("schedule") == "constant":
            raise InputError(f"{share} is where cosine and linear end, and a constant schedule ends where it is")
        return share

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of optimizer step `step`, from 0; the first step of a warm-up of n has 1/n of it."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        passed = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        falling = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed}[self.schedule]
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * falling)

    def num_steps(self, num_groups: int) -> int:
        """Optimizer steps of the whole run over `num_groups` groups."""
        steps = self.epochs * steps_per_epoch(num_groups, self.prompts_per_step)
        whole = math.ceil(steps * (1 - 1e-12))  # 1.1 epochs of 50 steps are 55, though 1.1 * 50 is a little more
        return min(whole, self.max_steps) if self.max_steps is not None else whole

    def cache_key(self) -> dict[str, object]:
        """The settings that decide the numbers; those left out decide only how and when they are computed or kept."""
        left_out = {"tokens_per_micro_batch", "reduce", "checkpoint_steps", "checkpoint_minutes", "trackers"}
        if self.keep == "last":
            left_out |= {"keep", "evaluate_every"}
        return self.model_dump(mode="json", exclude=left_out)
