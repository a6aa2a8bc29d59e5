"""Settings of a training step: optimizer, schedule, batch, precision, evaluation and checkpoints; no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from align.config import Settings
from align.data.batching import steps_per_epoch
from align.errors import InputError, within
from align.registry import DOTTED_PATH, suggest
from align.train.passes.early_stopping import EarlyStopping
from align.train.sharding.optimizer_names import OPTIMIZERS, UNSHARDED
from align.train.sharding.snapshots import CONFLICT, CONFLICTING, SnapshotSettings

Decay = Annotated[float, Field(ge=0, lt=1)]  # decay rate of a moving average
RewardLoss = Literal["regression", "bt", "bt_margin", "bt_scaled"]

CPU_BUDGET = 2048  # tokens of a micro-batch on a CPU, by default
# Settings that determine only how or when something is computed or stored, not the trained weights
CHECKPOINTS = {"checkpoint_steps", "checkpoint_minutes"}
WITHOUT_EFFECT = {"tokens_per_micro_batch", "sequence_parallel", "reduce", "trackers", *CHECKPOINTS}
# Settings that determine only where a training ends; one with other values can resume its checkpoints
ENDS = {"until_step", "on_divergence"}

PRODUCTS = "bf16-products"
# Settings added since 0.2; with their defaults they are left out, so that steps finished before stay finished
ADDED = (
    "compile",
    "optimizer",
    "optimizer_settings",
    "early_stopping",
    "callbacks",
    "weights",
    "average",
    "reduce_dtype",
    *ENDS,
)


class TrainSettings(Settings):
    """Settings of the training loop."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Learning rate after warm-up: constant, or a cosine or linear decay."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps of linear warm-up.")
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Final learning rate of cosine and linear, as a ratio of learning_rate."
    )
    epochs: float = Field(default=1.0, gt=0, description="Passes over the training rows; may be a fraction.")
    max_steps: int | None = Field(default=None, ge=1, description="Upper limit of optimizer steps; none by default.")
    until_step: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this optimizer step, with a checkpoint that a later step can `resume`.",
    )
    prompts_per_step: int = Field(
        default=64,
        ge=1,
        description="Global batch size: prompts per optimizer step. A pair or a group of K responses is one prompt.",
    )
    tokens_per_micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Token budget of one forward and backward pass of a process; affects memory and speed only. A "
        "larger group of responses runs in parts; its shared prefixes are computed once. Default: 2048 on a CPU; on a "
        "GPU 16384, 8192 or 4096, the most whose activations take a quarter of its memory, else 2048.",
    )
    sequence_parallel: int = Field(
        default=1,
        ge=1,
        description="Neighbouring processes that split the tokens of each micro-batch, for sequences too long for one "
        "device; around attention they split the heads (Ulysses: Jacobs et al. 2023). Must divide the number of "
        "processes and those of query and key/value heads. Affects memory and speed only. For sft and preference.",
    )
    optimizer: str = Field(
        default="adamw",
        description=(
            "adamw (Loshchilov & Hutter 2019), adamw_8bit (of bitsandbytes), adafactor (Shazeer & Stern 2018), or your "
            "own as `module:name`: called with parameter groups, lr and optimizer_settings. All but adamw need whole "
            "parameters: one process or DDP."
        ),
    )
    optimizer_settings: dict[str, float | bool | str | None] = Field(
        default_factory=dict[str, float | bool | str | None],
        description="Further settings of the optimizer, by its own names.",
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="Weight decay of matrices; norms and biases are not decayed."
    )
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.98), description="Decay rates of AdamW's moments; default as published with NeMo-Aligner."
    )
    epsilon: float = Field(default=1e-8, gt=0, description="Epsilon of AdamW.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Gradients are clipped to this norm; 0 only logs the norm."
    )
    precision: Literal["fp32", "bf16", "bf16-products"] = Field(
        default="fp32",
        description="Precision of matrix products. bf16 over fp32 weights: autocast. bf16-products: only the inputs of "
        "products are rounded to bf16, on CPUs with AMX or AVX512-BF16; everything else stays in fp32.",
    )
    compile: Literal["none", "pieces"] = Field(
        default="none",
        description="Compile RMS norms, the product of gated MLPs and rotary embeddings with torch.compile; attention "
        "and matrix products are not changed. Results differ by rounding. Needs a C++ compiler, and on a GPU Triton, "
        "and takes up to a minute at the start. About 10 % faster on a CPU; not measured on a GPU. One process or DDP.",
    )
    weights: Literal["fp32", "bf16_master", "bf16_stochastic"] = Field(
        default="fp32",
        description=(
            "Weights in training: fp32; bf16 with fp32 master weights, which the optimizer updates (bf16_master; "
            "Micikevicius et al. 2018); or bf16 alone with stochastically rounded updates (bf16_stochastic; Zamirai et "
            "al. 2020). Gradients and optimizer state are always fp32. bf16 needs `precision: bf16`, and one process, "
            "DDP or, for bf16_master, FSDP2."
        ),
    )
    reduce: Literal["once", "each"] = Field(
        default="once",
        description="Reduce gradients over processes once per step, or after each micro-batch, which under ZeRO-2 and "
        "ZeRO-3 saves the memory of unsharded gradients.",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Dtype in which gradients are reduced over processes. bf16 sends half the bytes and rounds the "
        "sums, so that results depend on the number of processes; one process reduces nothing. Gradients are "
        "accumulated over micro-batches in fp32 either way.",
    )
    on_divergence: Literal["error", "stop"] = Field(
        default="error",
        description="At a loss or gradient norm that is not finite: fail, or stop with the weights before that step. "
        "Changing it runs the step again.",
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between evaluations on the held-out rows; the last step is always evaluated.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="Stop when the held-out loss no longer improves. Default: train to the last step."
    )
    callbacks: list[str] = Field(
        default_factory=list[str],
        description=(
            "Your own functions as `module:name`, called after every optimizer step and every evaluation with a "
            "TrainingEvent; returning True stops the training after the step."
        ),
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="Weights to keep: the last, or the evaluated ones with the lowest held-out loss."
    )
    average: SnapshotSettings | None = Field(
        default=None,
        description="Save the mean of the weights after several of the last steps; by default, the last weights. "
        "Evaluations use the current weights, and the one after the last step the mean. Not for adapters.",
    )
    checkpoint_steps: int | None = Field(default=None, ge=1, description="Optimizer steps between checkpoints.")
    checkpoint_minutes: float | None = Field(
        default=15.0, gt=0, description="Minutes between checkpoints; null for none by time."
    )
    trackers: list[str] = Field(
        default_factory=list[str],
        description="Experiment trackers of this step, instead of those of the recipe's `tracking`.",
    )

    @field_validator("optimizer")
    @classmethod
    def _check_optimizer(cls, name: str) -> str:
        if DOTTED_PATH.fullmatch(name) is None and name not in OPTIMIZERS:
            raise InputError(f"no optimizer is called {name!r}; {suggest(name, OPTIMIZERS)}, or your own `module:name`")
        return name

    @field_validator("callbacks")
    @classmethod
    def _check_callbacks(cls, names: list[str]) -> list[str]:
        for name in names:
            if DOTTED_PATH.fullmatch(name) is None:
                raise InputError(f"{name!r} is not of the form module:function")
        return names

    @model_validator(mode="after")
    def _check_optimizer_settings(self) -> TrainSettings:
        if "weight_decay" in self.optimizer_settings and ":" not in self.optimizer:
            raise InputError("weight_decay is a key of train itself; set it there", ("optimizer_settings",))
        if not self.optimizer.startswith("adamw"):
            for name in sorted({"betas", "epsilon"} & self.model_fields_set):
                raise InputError(
                    f"applies to AdamW only; give the settings of {self.optimizer} in optimizer_settings", (name,)
                )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> TrainSettings:
        if self.weights != "fp32" and self.precision != "bf16":
            raise InputError(f"{self.weights} needs precision: bf16, in which its matrix products run", ("weights",))
        if self.weights == "bf16_stochastic" and ":" in self.optimizer:
            raise InputError(
                "bf16_stochastic updates one parameter at a time, which your own optimizer may not allow; use "
                "bf16_master",
                ("weights",),
            )
        return self

    @model_validator(mode="after")
    def _check_until(self) -> TrainSettings:
        every = self.evaluate_every
        if self.until_step is not None and self.is_evaluation_decisive and (every is None or self.until_step % every):
            raise InputError("evaluations decide the weights: use a multiple of evaluate_every", ("until_step",))
        return self

    @model_validator(mode="after")
    def _check_average(self) -> TrainSettings:
        if self.average is None:
            return self
        for name in CONFLICTING:
            if getattr(self, name) != TrainSettings.model_fields[name].get_default(call_default_factory=True):
                raise InputError(CONFLICT, (name,))
        if self.max_steps is not None:
            with within("average"):
                self.average.steps(self.max_steps)
        return self

    @field_validator("min_lr_ratio")
    @classmethod
    def _check_min_lr_ratio(cls, ratio: float, info: ValidationInfo) -> float:
        if ratio and info.data.get("schedule") == "constant":
            raise InputError(f"{ratio} has no effect with a constant schedule; use cosine or linear, or leave it out")
        return ratio

    def check_kind(self, kind: str) -> None:
        """Raise `InputError` for settings that a kind of launch, by accelerate's name, does not support."""
        if self.optimizer != "adamw" and kind in ("DEEPSPEED", "FSDP"):
            reason = UNSHARDED.get(self.optimizer, "may need whole parameters")
            message = f"{self.optimizer} {reason}, and {kind} gives each process slices of them"
            raise InputError(f"{message}; launch with DDP, or use adamw", ("train", "optimizer"))
        if self.compile != "none" and kind in ("DEEPSPEED", "FSDP"):
            message = f"{self.compile} is not supported under {kind}; launch with DDP, or leave it out"
            raise InputError(message, ("train", "compile"))
        loc = ("train", "weights")
        if self.weights != "fp32" and kind == "DEEPSPEED":
            raise InputError(f"{self.weights} is not supported under DeepSpeed; launch with FSDP2 or DDP", loc)
        if self.weights == "bf16_stochastic" and kind == "FSDP":
            raise InputError(f"{self.weights} is not supported under FSDP2; use bf16_master, or launch with DDP", loc)
        if self.weights != "fp32" and self.reduce == "each" and kind.startswith("MULTI_"):
            message = f"with {self.weights}, DDP reduces gradients once per step; leave it out"
            raise InputError(message, ("train", "reduce"))

    @property
    def token_budget(self) -> int:
        """The tokens of a pass of all processes that split it; the loop sets those of a GPU before it begins."""
        return (self.tokens_per_micro_batch or CPU_BUDGET) * self.sequence_parallel

    @property
    def forward_precision(self) -> str:
        """What decides how log-probabilities are rounded: the dtype of matrix products or weights, and compiling."""
        dtype = self.precision if self.weights == "fp32" else "bf16-weights"
        return dtype if self.compile == "none" else f"{dtype}, compiled {self.compile}"

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0; warm-up starts at 1/warmup_steps of it."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        decay = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * decay[self.schedule])

    def num_steps(self, num_groups: int, groups_per_step: int | None = None) -> int:
        """Return the optimizer steps of a run over `num_groups` groups, of which each takes `prompts_per_step`.

        `groups_per_step` is the number of groups that a step chooses from, if it chooses.
        """
        steps = self.epochs * steps_per_epoch(num_groups, groups_per_step or self.prompts_per_step)
        # Rounding: 1.1 epochs of 50 steps are 55 steps, although 1.1 * 50 is slightly more in floating point
        num_steps = math.ceil(steps * (1 - 1e-12))
        return min(num_steps, self.max_steps) if self.max_steps is not None else num_steps

    def averaged_steps(self, num_steps: int) -> list[int]:
        """Return the optimizer steps after which weights are averaged, of a training of `num_steps`; none by default.

        Raises `InputError` if these are too few.
        """
        with within("train", "average"):
            return self.average.steps(num_steps) if self.average is not None else []

    @property
    def is_evaluation_decisive(self) -> bool:
        """Whether evaluations during training decide the weights to keep."""
        return self.keep == "best" or self.early_stopping is not None or bool(self.callbacks)

    def cache_key(self) -> dict[str, object]:
        """Return the settings that determine the trained weights."""
        excluded = WITHOUT_EFFECT | (set() if self.is_evaluation_decisive else {"keep", "evaluate_every"})
        found = self.model_dump(mode="json", exclude=excluded)
        defaults = {name: TrainSettings.model_fields[name].get_default(call_default_factory=True) for name in ADDED}
        return {name: value for name, value in found.items() if name not in ADDED or value != defaults[name]}
