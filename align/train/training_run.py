"""The inputs of one training run, and its result."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align.accounting.flops import Decoder, Work, sum_work
from align.config import stable_hash
from align.data.batching import order
from align.data.mixing import Mixture
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.models.probe import Forward
from align.train.distillation.cache import TeacherTargets
from align.train.indexed_groups import GroupView
from align.train.objectives.base import Objective
from align.train.objectives.chosen_tokens import ChosenTokensObjective
from align.train.references.cache import ReferenceWork
from align.train.selection.selection import Selection, exits
from align.train.selection.settings import SELECTION
from align.train.settings import ENDS, TrainSettings
from align.train.tracking import Tracking

if TYPE_CHECKING:
    from align.models.policy import Policy

WORK_METRICS = ("tokens_computed", "pairs_attended", "targets")  # names of the fields of `Work` in the metrics
HELD_OUT = "held_out/"  # prefix of the metrics on held-out rows
START = f"start/{HELD_OUT}"  # the same before the first update, in the metrics of step 1
STOPPED = "stopped"  # in the metrics of the step after which a callback stopped the training
ROUTING = "routing/"  # prefix of the work of counting the choices of a mixture of experts before a step
KL = "kl/"  # prefix of the work of estimating the KL divergence before a step or an evaluation
EXIT = "exit/"  # prefix of the metrics of rows that are trained through an early exit
FORWARD_ONLY = (START, HELD_OUT, ROUTING, KL, START + KL, HELD_OUT + KL, SELECTION)


@dataclass(frozen=True, slots=True)
class Teacher:
    """The policy whose distributions a run learns."""

    load: Callable[[], Policy]
    top_k: int  # tokens of each of its distributions that are kept
    size: Decoder | str = "the dimensions were not given"  # or why they are unknown


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
    selection: Selection | None = None  # of the rows of each step; None to train on all
    teacher: Teacher | None = None  # of an objective that needs one
    tracking: Tracking | None = None  # where it is tracked, for trackers other than those of the settings
    num_resumed: int = 0  # optimizer steps of another step, whose checkpoint the folder begins with

    def check_held_out(self) -> None:
        """Raise `InputError` for settings that need held-out rows if there are none."""
        wanted = {"keep": self.settings.keep == "best", "early_stopping": self.settings.early_stopping}
        for name, is_set in wanted.items():
            if is_set and not self.held_out:
                raise InputError("requires held-out rows: set held_out of the source", ("train", name))

    @property
    def held_out_objective(self) -> Objective:
        """The objective on held-out rows: of all tokens, also if training chooses some of them."""
        return self.objective.on_held_out if isinstance(self.objective, ChosenTokensObjective) else self.objective

    @property
    def num_rows(self) -> int:
        """Return the number of groups in an epoch."""
        return self.mixture.num_rows if self.mixture is not None else len(self.train)

    @property
    def rows_per_step(self) -> int:
        """Return the number of groups that a step takes from the epoch, which may be more than it trains on."""
        return self.settings.prompts_per_step if self.selection is None else self.selection.rows_per_step(self.settings)

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps; raise `InputError` for a pool that is too small to select from."""
        if self.selection is None:
            return self.settings.num_steps(self.num_rows)
        return self.selection.num_steps(self.settings, self.num_rows)

    @property
    def last_step(self) -> int:
        """Return the last optimizer step that is taken; later ones are left to a step that resumes this one."""
        return min(self.num_steps, self.settings.until_step or self.num_steps)

    @property
    def where_tracked(self) -> Tracking:
        """Return where the run is tracked, by default in its folder."""
        config = self.settings.model_dump(mode="json")
        folder = self.folder / "tracking"
        return self.tracking or Tracking(run=self.folder.name, step="train", folder=folder, config=config)

    def is_evaluated(self, step: int) -> bool:
        """Return whether the held-out rows are evaluated after a step: the last one, and those that settings name."""
        every = self.settings.evaluate_every
        found = {self.last_step}
        if self.selection is not None:  # a uniform run, where the run that it is compared with ends
            found |= self.selection.compared_steps(self.settings, self.num_rows)
        return step in found or (every is not None and step % every == 0)

    def epoch(self, number: int) -> array[int]:
        """Return the groups of an epoch in their order, as indices into `train`."""
        if self.mixture is not None:
            return self.mixture.epoch(number)
        return order(len(self.train), seed=self.seed, epoch=number)

    def exits(self, number: int, groups: Sequence[int]) -> Sequence[int]:
        """Return which groups of optimizer step `number`, from 0, are trained through the early exit of a selection."""
        if self.selection is None or not self.selection.settings.trains_exit:
            return ()
        return exits(groups) if number < self.selection.num_selected(self.num_steps) else ()

    def settings_hash(
        self,
        groups: GroupView,
        initial_weights: str,
        dropout: Sequence[float] = (),
        teacher: TeacherTargets | None = None,
    ) -> str:
        """Return a hash of everything that determines the trained weights; a checkpoint resumes only the same run."""
        content = [
            {name: value for name, value in self.settings.cache_key().items() if name not in ENDS},
            self.objective.cache_key(),
            self.head_lr_multiplier,
            initial_weights,
            self.seed,
            *dropout,
            *([] if self.mixture is None else [asdict(self.mixture)]),
            *([] if self.selection is None else [self.selection.settings.cache_key()]),
            *([] if teacher is None else [teacher.weights]),
            *groups.digests(held_out=self.settings.is_evaluation_decisive),
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
    num_resumed: int = 0  # optimizer steps that were taken in the step that this one resumes
    diverged: str | None = None  # why the training ended early, where a loss or gradient norm was not finite

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps."""
        return len(self.metrics)

    @property
    def first_metrics(self) -> Mapping[str, float]:
        """Return the metrics of the first optimizer step; none if the training diverged in it."""
        return self.metrics[0] if self.metrics else {}

    @property
    def last_metrics(self) -> Mapping[str, float]:
        """Return the metrics of the last optimizer step, with those of the held-out rows."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def tokens_trained(self) -> int:
        """Return the number of trained tokens over all steps, without those of a step that this one resumes."""
        return int(self._sum("tokens_trained"))

    @property
    def imbalance(self) -> list[float]:
        """Return, for each optimizer step, the tokens of the fullest rank over the mean of all ranks."""
        return [line["imbalance"] for line in self.metrics]

    @property
    def trained(self) -> Work:
        """Return the work of all ranks with a backward pass."""
        return sum_work(work_of(line) for line in self._own)

    @property
    def forward_only(self) -> Work:
        """Return the work of all ranks without a backward pass.

        References, evaluations, estimates of the KL divergence and the routing of experts.
        """
        works = [work_of(line, prefix) for line in self._own for prefix in FORWARD_ONLY]
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

    @property
    def _own(self) -> Sequence[Mapping[str, float]]:
        """The metrics of the optimizer steps that this step has computed itself."""
        return self.metrics[self.num_resumed :]

    def _sum(self, name: str) -> float:
        return sum(line.get(name, 0) for line in self._own)


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
    best = math.inf
    waited = 0
    for value in (line[loss] for line in lines if loss in line):
        is_better = value < best - min_delta
        best, waited = (value, 0) if is_better else (best, waited + 1)
    return waited
