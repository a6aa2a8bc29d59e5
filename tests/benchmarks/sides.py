"""Both sides of the comparison, each as the target of a process of its own: TRL's DPOTrainer and align's Loop.

A side reports once when it is ready to train. From then on it computes one optimizer step for each word it receives.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from align.accounting.peak_memory import peak_memory
from align.data.batching import groups_of_step
from align.data.token_groups import TokenGroup, TokenSequence
from align.distributed.progress import SilentProgress
from align.models.policy import load_policy
from align.models.settings import PolicySettings
from align.train.loop import Loop
from align.train.objectives.preference import PreferenceObjective
from align.train.objectives.settings import PreferenceSettings
from align.train.settings import TrainSettings
from align.train.training_run import TrainingRun

BETA = 0.1  # Rafailov et al. 2023, and both sides' default
SEED = 0  # of the order of the groups
# Of the square matrices whose product the FLOP rate is compared with; a smaller one leaves a large GPU half idle.
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
PRODUCTS = 3  # timed before each step


@dataclass(frozen=True, slots=True)
class Row:
    """A group in the form that each side takes, its responses from the best to the worst."""

    tokens: TokenGroup
    prompt: str  # rendered, with the header of the answer
    responses: tuple[str, ...]  # each to its end of turn


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of the peer's data set, and the tokens that it must become."""

    text: dict[str, str]
    chosen: TokenSequence
    rejected: TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What both sides are told."""

    model: str  # a plain folder
    rows: tuple[Row, ...]
    prompts_per_step: int
    num_steps: int
    precision: Literal["fp32", "bf16"]
    token_budget: int  # tokens of one of align's micro-batches
    learning_rate: float
    threads: int
    device: Literal["cpu", "cuda"]

    def indices(self, step: int) -> tuple[int, ...]:
        """The rows of an optimizer step."""
        return groups_of_step(step, len(self.rows), self.prompts_per_step, seed=SEED)

    def pairs(self, step: int) -> list[Pair]:
        """Every pair of every group of an optimizer step."""
        found: list[Pair] = []
        for row in (self.rows[index] for index in self.indices(step)):
            for better, worse in combinations(range(len(row.responses)), 2):
                text = {"prompt": row.prompt, "chosen": row.responses[better], "rejected": row.responses[worse]}
                found.append(Pair(text, row.tokens.sequences[better], row.tokens.sequences[worse]))
        return found

    def settings(self) -> TrainSettings:
        """Settings of the optimizer and the loop."""
        return TrainSettings(
            learning_rate=self.learning_rate,
            epochs=self.num_steps * self.prompts_per_step / len(self.rows),
            prompts_per_step=self.prompts_per_step,
            tokens_per_micro_batch=self.token_budget,
            precision=self.precision,
        )


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a side says of one optimizer step."""

    loss: float
    seconds: float
    tokens: int  # through the model, padding included
    peak_bytes: int  # the most the process has held so far
    products_s: tuple[float, ...] = ()  # times of the large matrix product, just before the step


class TokenCounter:
    """Counts what goes through a model, where no implementation can leave a token out: at its embeddings."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        model.get_input_embeddings().register_forward_pre_hook(self._add)

    def _add(self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.count += args[0].numel()

    def take(self) -> int:
        """Tokens since the last call."""
        taken, self.count = self.count, 0
        return taken


def train_with_align(task: Task, channel: Connection) -> None:
    """Align's side: its Loop on the task's token groups, through the tree."""
    torch.set_num_threads(task.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[task.precision]
    product_s(dtype, task.device)  # the first one is slower
    with TemporaryDirectory() as name:
        policy, _ = load_policy(PolicySettings(path=task.model))
        tokens = TokenCounter(policy.base)
        preference = PreferenceSettings(name="dpo", settings={"beta": BETA, "pairs": "all"})
        job = TrainingRun(
            objective=PreferenceObjective(preference),
            train=[row.tokens for row in task.rows],
            settings=task.settings(),
            forward="tree",
            seed=SEED,
            folder=Path(name, "run"),
            references=Path(name, "references"),
        )
        loop = Loop(policy, job, SilentProgress())
        tokens.take()
        channel.send("ready")
        for step in range(task.num_steps):
            channel.recv()
            products = tuple(product_s(dtype, task.device) for _ in range(PRODUCTS))
            began = clock(task.device)
            metrics = loop.step(step)
            seconds = clock(task.device) - began
            channel.send(StepReport(metrics["loss"], seconds, tokens.take(), peak(task.device), products))


def train_with_trl(task: Task, channel: Connection) -> None:
    """TRL's side: its DPOTrainer on the same pairs as text, a step's pairs as one batch."""
    from datasets import Dataset  # noqa: PLC0415 - the peer and what it needs is paid for by its own process only
    from trl.trainer.dpo_config import DPOConfig  # noqa: PLC0415
    from trl.trainer.dpo_trainer import DPOTrainer  # noqa: PLC0415

    torch.set_num_threads(task.threads)
    settings = task.settings()
    pairs = [pair for step in range(task.num_steps) for pair in task.pairs(step)]
    with TemporaryDirectory() as name:
        model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
        tokens = TokenCounter(model)
        config = DPOConfig(
            output_dir=name,
            beta=BETA,
            precompute_ref_log_probs=True,
            max_length=None,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(pairs) // task.num_steps,
            train_sampling_strategy="sequential",
            max_steps=task.num_steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_epsilon=settings.epsilon,
            max_grad_norm=settings.max_grad_norm,
            bf16=task.precision == "bf16",
            use_cpu=task.device == "cpu",
            dataloader_pin_memory=False,
            logging_steps=1,  # the loss of every step
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer: Any = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([pair.text for pair in pairs]),
            processing_class=AutoTokenizer.from_pretrained(task.model),
            callbacks=[Turns(task, channel, tokens)],
        )
        trainer.remove_callback(PrinterCallback)
        check_tokens(trainer.train_dataset, pairs)
        tokens.take()
        channel.send("ready")
        trainer.train()


SIDES = {"align": train_with_align, "trl": train_with_trl}


class Turns(TrainerCallback):
    """Holds a trainer at the start of every step until it is told to go on; a step ends when its loss is logged."""

    def __init__(self, task: Task, channel: Connection, tokens: TokenCounter) -> None:
        self.task, self.channel, self.tokens, self.began = task, channel, tokens, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Wait for the first step's turn."""
        self._wait()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Report the step, then wait for the next one's turn."""
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        seconds = clock(self.task.device) - self.began
        self.channel.send(StepReport(logs["loss"], seconds, self.tokens.take(), peak(self.task.device)))
        if state.global_step < state.max_steps:
            self._wait()

    def _wait(self) -> None:
        self.channel.recv()
        self.began = clock(self.task.device)


def check_tokens(dataset: Any, pairs: list[Pair]) -> None:  # noqa: ANN401 - the trainer's own data set
    """Stop unless TRL made of every pair the very tokens that align trains on."""
    for row, pair in zip(dataset, pairs, strict=True):
        for side, sequence in (("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected)):
            trained = [False] * len(row["prompt_ids"]) + [True] * len(row[side])
            assert row["prompt_ids"] + row[side] == sequence.ids.tolist(), pair.text
            assert trained == sequence.loss_mask.tolist(), pair.text


def product_s(dtype: torch.dtype, device: str) -> float:
    """Seconds that one large matrix product takes."""
    side = PRODUCT_SIDE[device]
    left = torch.randn(side, side, dtype=dtype, device=device)
    out = torch.zeros_like(left)
    began = clock(device)
    torch.mm(left, left, out=out)
    return clock(device) - began


def clock(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> int:
    """The most bytes that this process has held so far, of main memory or of the GPU's."""
    return peak_memory(torch.device(device))
