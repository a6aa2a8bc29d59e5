"""Estimates of a step before it runs: rows, tokens, FLOPs, time, disk and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from align.accounting.communication import FP32
from align.accounting.flops import Decoder, Work, forward_flops
from align.data.balance import Balance
from align.stages.inputs.context import ModelSpec, StepInputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from align.evaluation.task import TaskSize
    from align.records import Prompt
    from align.stages.training.footprint import Footprint
    from align.train.settings import TrainSettings

# Share of a large matrix product's rate that sampling reaches: it reads all weights for each token of a batch. Timed on
# a CPU only.
SAMPLING_EFFICIENCY = 0.05
CHECKPOINTS = 6  # model sizes on disk at once: weights and two moments, of a checkpoint and of the one before it
BEST = 2  # and the best weights so far, beside those that the latest checkpoint knows as the best
AVERAGED = 2  # and the average of the last weights, in each of the two checkpoints
TEXT_BYTES = 8  # bytes of a token in a file of responses, and in its journal


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEstimate:
    """Further estimates of a training step whose rows exist."""

    counts: dict[str, int]
    format: str
    optimizer_steps: int
    longest: int  # tokens of the longest sequence
    unshared: int  # tokens of an epoch if responses did not share their prompt
    memory: Footprint | None  # None if the model's dimensions are unknown or layers are recurrent
    balance: Balance | None  # of the first optimizer steps over the ranks of the launch; None for one rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a step will take; an upper bound where an earlier step makes its rows."""

    name: str
    stage: str
    rows: int  # that it trains on, answers or judges
    tokens: int = 0  # computed (in one epoch, where it trains), each distinct (prefix, token) of a group once
    flops: float | None = 0.0  # of the whole step, reference pass included; None if they are unknown
    seconds: float | None = 0.0
    peak_flops: float | None = None  # per second, of a matrix product in the step's precision; None without a model
    weights: int | None = None  # of the model that it trains or asks; None if there is none or it is unknown
    unknown: str = ""  # why FLOPs, time and memory are unknown
    disk: int = 0  # bytes that it leaves behind
    spare: int = 0  # bytes of its checkpoints, while it runs
    bound: bool = False  # whether rows and tokens are upper bounds
    until_step: int | None = None  # of its training, which a later step may resume
    training: TrainingEstimate | None = None
    parts: Mapping[str, str] = field(default_factory=dict[str, str])  # of the step, by name, as text


class PlannedModel(NamedTuple):
    """The model that a step makes, trains or asks, before any step has run."""

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    decoder: Decoder | str  # its dimensions, or why they are unknown
    num_weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """What an estimate is made from."""

    name: str
    inputs: StepInputs
    spec: ModelSpec  # the model that the step starts from or asks
    load: Callable[[], PlannedModel]  # called on first use: a step that asks a server needs no model of the recipe
    dimensions_of: Callable[[str], Decoder | str]  # of the model that a step makes, or why they are unknown
    made: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])  # estimates of the steps before
    task_sizes: dict[str, TaskSize] = field(default_factory=dict[str, "TaskSize"])  # of their tasks, by what decides it

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        return self.load().tokenizer

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the model."""
        return self.load().config

    @property
    def decoder(self) -> Decoder | str:
        """The model's dimensions, or why they are unknown."""
        return self.load().decoder

    @property
    def num_weights(self) -> int:
        """Number of the model's weights."""
        return self.load().num_weights

    @property
    def model_bytes(self) -> int:
        """Bytes of the model's weights in fp32."""
        return self.num_weights * FP32


def model_disk(model_bytes: int, train: TrainSettings | None = None) -> tuple[int, int]:
    """Return the bytes of a model, and of its checkpoints while it trains."""
    if train is None:
        return model_bytes, CHECKPOINTS * model_bytes
    more = BEST * (train.keep == "best") + AVERAGED * (train.average is not None)
    return model_bytes, (CHECKPOINTS + more) * model_bytes


def estimate_answers(
    stage: str, planning: Planning, rows: int, tokens: int, drawn: int, *, precision: str, unknown: str = ""
) -> Estimate:
    """Return the estimate of a step that answers or judges `rows` prompts of `tokens`, with `drawn` tokens at most.

    `unknown` says why the dimensions of the model are not known; those of the recipe's if empty.
    """
    from align.models.loading.pretrained import default_device  # noqa: PLC0415 - imports torch
    from align.stages.costs.measured import matrix_rate  # noqa: PLC0415

    total = tokens + drawn
    model = unknown or planning.decoder
    flops = None if isinstance(model, str) else float(forward_flops(model, equal_rows(total, rows)))
    peak = matrix_rate(default_device(), precision)
    return Estimate(
        name=planning.name,
        stage=stage,
        rows=rows,
        tokens=total,
        flops=flops,
        seconds=None if flops is None else flops / (peak * (SAMPLING_EFFICIENCY if drawn else 1)),
        peak_flops=peak,
        weights=None if isinstance(model, str) else model.num_weights,
        unknown=model if isinstance(model, str) else "",
        disk=total * TEXT_BYTES,
        bound=drawn > 0,
    )


def equal_rows(tokens: int, rows: int) -> Work:
    """Return the work of `rows` rows of equal length whose tokens all reach the head."""
    return Work(tokens, tokens * max(1, tokens // max(1, rows)) // 2, tokens)


def prompt_tokens(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of all prompts."""
    from align.data.chat_encoder import ChatEncoder  # noqa: PLC0415 - imports transformers

    encoder = ChatEncoder(tokenizer)
    return sum(len(encoder.prompt_ids(prompt.messages, row, prompt.tools)) for row, prompt in enumerate(prompts))
