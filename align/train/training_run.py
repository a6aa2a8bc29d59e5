"""The inputs of one training run, and its result."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from align.accounting.flops import Work
from align.config import stable_hash
from align.data.batching import order
from align.data.mixing import Mixture
from align.data.token_groups import TokenGroup
from align.models.probe import Forward
from align.train.indexed_groups import GroupView
from align.train.objectives.base import Objective
from align.train.settings import TrainSettings

WORK_METRICS = ("tokens_computed", "pairs_attended", "targets")  # names of the fields of `Work` in the metrics
HELD_OUT = "held_out/"  # prefix of the metrics on held-out rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """The inputs of one training run."""

    objective: Objective
    train: Sequence[TokenGroup]
    held_out: Sequence[TokenGroup] = ()
    mixture: Mixture | None = None  # rows of `train` in each epoch; by default each of them once
    settings: TrainSettings
    forward: str = "auto"  # auto, tree or plain
    seed: int = 0
    head_lr_multiplier: float = 1.0  # learning rate of the head over that of the other weights
    folder: Path  # metrics and checkpoints
    references: Path  # folder of the reference cache

    @property
    def num_rows(self) -> int:
        """Return the number of groups in an epoch."""
        return self.mixture.num_rows if self.mixture is not None else len(self.train)

    def epoch(self, number: int) -> array[int]:
        """Return the groups of an epoch in their order, as indices into `train`."""
        if self.mixture is not None:
            return self.mixture.epoch(number)
        return order(len(self.train), seed=self.seed, epoch=number)

    def settings_hash(self, groups: GroupView, initial_weights: str) -> str:
        """Return a hash of everything that determines the trained weights; a checkpoint resumes only the same run."""
        content = [
            self.settings.cache_key(),
            self.objective.cache_key(),
            self.head_lr_multiplier,
            initial_weights,
            self.seed,
            *([] if self.mixture is None else [asdict(self.mixture)]),
            *groups.digests(held_out=self.settings.keep == "best"),
        ]
        return stable_hash(content)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The result of a training run."""

    num_steps: int
    forward: Forward
    first_metrics: Mapping[str, float]  # of the first optimizer step
    last_metrics: Mapping[str, float]  # of the last one, with those of the held-out rows
    kept_metrics: Mapping[str, float]  # of the step whose weights the policy has now
    initial_weights: str  # fingerprint of the policy before the first step
    trained: Work  # forward and backward passes
    forward_only: Work  # reference log-probabilities that were not in the cache, and evaluations
    tokens_trained: int
    num_micro_batches: int  # of each process, with a backward pass
    num_forward_passes: int  # of each process, without a backward pass
    imbalance: Sequence[float]  # of each optimizer step: tokens of the fullest rank over the mean of all ranks


def work_of(metrics: Mapping[str, float], prefix: str = "") -> Work:
    """Return the computed work that the metrics of a step contain."""
    return Work(*(int(metrics.get(prefix + name, 0)) for name in WORK_METRICS))


def best_metrics(lines: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """Return the metrics of the first step with the lowest held-out loss; None if no held-out loss is finite."""
    loss = f"{HELD_OUT}loss"
    evaluated = [line for line in lines if math.isfinite(line.get(loss, math.nan))]
    return min(evaluated, key=lambda line: line[loss], default=None)
