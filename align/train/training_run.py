"""What one training step is made of, and how it ended."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.accounting.flops import Work
from align.data.batching import order
from align.data.mixing import Mixture
from align.data.token_groups import TokenGroup
from align.models.probe import Forward
from align.train.objectives import Objective
from align.train.settings import TrainSettings

WORK = ("tokens_computed", "pairs_attended", "targets")  # names in the metrics of what `accounting` counts


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What one training step is made of."""

    objective: Objective
    train: Sequence[TokenGroup]
    held_out: Sequence[TokenGroup] = ()
    mixture: Mixture | None = None  # which rows of `train` an epoch takes; each of them once where left out
    settings: TrainSettings
    forward: str = "auto"  # auto, tree or plain
    seed: int = 0
    head_lr_multiplier: float = 1.0  # learning rate of the head over that of the other weights
    folder: Path  # where metrics and checkpoints are written
    references: Path  # folder of the reference cache

    @property
    def num_rows(self) -> int:
        """Groups of an epoch."""
        return self.mixture.num_rows if self.mixture is not None else len(self.train)

    def epoch(self, number: int) -> array[int]:
        """The groups of an epoch in their order, by index in `train`."""
        if self.mixture is not None:
            return self.mixture.epoch(number)
        return order(len(self.train), seed=self.seed, epoch=number)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a training step ended."""

    num_steps: int
    forward: Forward
    first_metrics: Mapping[str, float]  # metrics of the first optimizer step
    last_metrics: Mapping[str, float]  # and of the last one, with those of the held-out rows
    kept_metrics: Mapping[str, float]  # and of the one whose weights the policy is left with
    initial_weights: str  # fingerprint of the policy that entered
    trained: Work  # forward and backward
    forward_only: Work  # forward alone: references, as far as this process had to compute them, and held-out rows
    tokens_trained: int
    num_micro_batches: int  # of each process, with a backward pass
    num_forward_passes: int  # and without: references, as far as they had to be computed, and held-out rows
    imbalance: Sequence[float]  # of each optimizer step: largest over mean tokens of a rank


def work_of(line: Mapping[str, float], prefix: str = "") -> Work:
    """Return the work that a line of metrics counts."""
    return Work(*(int(line.get(prefix + name, 0)) for name in WORK))


def best_line(lines: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """Return the metrics of the first step with the lowest held-out loss; None if no held-out loss is finite."""
    evaluated = [line for line in lines if math.isfinite(line.get("held_out/loss", math.nan))]
    return min(evaluated, key=lambda line: line["held_out/loss"], default=None)
