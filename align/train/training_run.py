"""The inputs of one training run, and its result."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from align.accounting.flops import Work, sum_work
from align.config import stable_hash
from align.data.batching import order
from align.data.mixing import Mixture
from align.data.token_groups import TokenGroup
from align.models.probe import Forward
from align.train.indexed_groups import GroupView
from align.train.objectives.base import Objective
from align.train.references.cache import ReferenceWork
from align.train.settings import TrainSettings
from align.train.tracking import Tracking

WORK_METRICS = ("tokens_computed", "pairs_attended", "targets")  # names of the fields of `Work` in the metrics
HELD_OUT = "held_out/"  # prefix of the metrics on held-out rows
START = f"start/{HELD_OUT}"  # the same before the first update, in the metrics of step 1
ROUTING = "routing/"  # prefix of the work of counting the choices of a mixture of experts before a step
FORWARD_ONLY = (START, HELD_OUT, ROUTING)


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
    tracking: Tracking | None = None  # where it is tracked, for trackers other than those of the settings

    @property
    def num_rows(self) -> int:
        """Return the number of groups in an epoch."""
        return self.mixture.num_rows if self.mixture is not None else len(self.train)

    def epoch(self, number: int) -> array[int]:
        """Return the groups of an epoch in their order, as indices into `train`."""
        if self.mixture is not None:
            return self.mixture.epoch(number)
        return order(len(self.train), seed=self.seed, epoch=number)

    def settings_hash(self, groups: GroupView, initial_weights: str, dropout: Sequence[float] = ()) -> str:
        """Return a hash of everything that determines the trained weights; a checkpoint resumes only the same run."""
        content = [
            self.settings.cache_key(),
            self.objective.cache_key(),
            self.head_lr_multiplier,
            initial_weights,
            self.seed,
            *dropout,
            *([] if self.mixture is None else [asdict(self.mixture)]),
            *groups.digests(held_out=self.settings.keep == "best"),
        ]
        return stable_hash(content)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """The result of a training run."""

    metrics: Sequence[Mapping[str, float]]  # of each optimizer step; as in metrics.jsonl
    kept_metrics: Mapping[str, float]  # of the step whose weights the policy has now
    forward: Forward
    initial_weights: str  # fingerprint of the policy before the first step
    references: ReferenceWork  # computing reference log-probabilities that were not in the cache

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps."""
        return len(self.metrics)

    @property
    def first_metrics(self) -> Mapping[str, float]:
        """Return the metrics of the first optimizer step."""
        return self.metrics[0]

    @property
    def last_metrics(self) -> Mapping[str, float]:
        """Return the metrics of the last optimizer step, with those of the held-out rows."""
        return self.metrics[-1]

    @property
    def tokens_trained(self) -> int:
        """Return the number of trained tokens over all steps."""
        return int(self._sum("tokens_trained"))

    @property
    def imbalance(self) -> list[float]:
        """Return, for each optimizer step, the tokens of the fullest rank over the mean of all ranks."""
        return [line["imbalance"] for line in self.metrics]

    @property
    def trained(self) -> Work:
        """Return the work of all ranks with a backward pass."""
        return sum_work(work_of(line) for line in self.metrics)

    @property
    def forward_only(self) -> Work:
        """Return the work of all ranks without a backward pass: references, evaluations and the routing of experts."""
        works = [work_of(line, prefix) for line in self.metrics for prefix in FORWARD_ONLY]
        return sum_work([self.references.work, *works])

    @property
    def num_micro_batches(self) -> int:
        """Return the number of forward and backward passes of each rank."""
        return int(self._sum("micro_batches"))

    @property
    def num_forward_passes(self) -> int:
        """Return the number of forward passes of each rank without a backward pass."""
        passes = [int(self._sum(f"{prefix}micro_batches")) for prefix in FORWARD_ONLY]
        return self.references.num_forward_passes + sum(passes)

    def _sum(self, name: str) -> float:
        return sum(line.get(name, 0) for line in self.metrics)


def work_of(metrics: Mapping[str, float], prefix: str = "") -> Work:
    """Return the computed work that the metrics of a step contain."""
    return Work(*(int(metrics.get(prefix + name, 0)) for name in WORK_METRICS))


def best_metrics(lines: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """Return the metrics of the first step with the lowest held-out loss; None if no held-out loss is finite."""
    loss = f"{HELD_OUT}loss"
    evaluated = [line for line in lines if math.isfinite(line.get(loss, math.nan))]
    return min(evaluated, key=lambda line: line[loss], default=None)


def evaluations_without_gain(lines: Sequence[Mapping[str, float]], min_delta: float) -> int:
    """Return the number of evaluations since the held-out loss was last lower than before by more than `min_delta`."""
    loss = f"{HELD_OUT}loss"
    best, waited = math.inf, 0
    for value in (line[loss] for line in lines if loss in line):
        is_better = value < best - min_delta
        best, waited = (value, 0) if is_better else (best, waited + 1)
    return waited
