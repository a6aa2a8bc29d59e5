"""What all forward passes of a training run have in common: batches, and cached outputs of a model on its groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from torch import nn

from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.models.tree.batch import EarlyExit, TokenBatch
from align.train.distillation.cache import TeacherTargets
from align.train.indexed_groups import ROWS, GroupView
from align.train.objectives.batch import sequence_logps
from align.train.passes.data_ranks import DataRanks
from align.train.passes.micro_batches import MicroBatcher
from align.train.references.cache import ReferenceCache, References
from align.train.references.compute import Outputs, fill_cache
from align.train.training_run import TrainingRun


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPasses:
    """The model of a run and how it runs; all processes call the methods together."""

    run: TrainingRun
    model: nn.Module
    forward: Literal["tree", "plain"]
    cache: ReferenceCache  # of the model's log-probabilities before the first step
    accelerator: Accelerator
    processes: Processes
    progress: Progress
    exit: EarlyExit | None = None  # of a selection that scores rows by the first layers

    @property
    def ranks(self) -> DataRanks:
        """Return the data-parallel ranks of the run."""
        return DataRanks(self.accelerator, self.run.settings.sequence_parallel)

    def batcher(
        self, groups: GroupView, references: References | None, teacher: TeacherTargets | None = None
    ) -> MicroBatcher:
        """Return what cuts groups into micro-batches for this rank."""
        return MicroBatcher(
            groups,
            forward=self.forward,
            token_budget=self.run.settings.token_budget,
            references=references,
            teacher=teacher,
            ranks=self.ranks,
            exit=self.exit,
        )

    def column(self, work_file: str) -> Path:
        """Return the column of the values that a pass computes."""
        return (self.run.folder / ROWS / work_file).with_suffix(".bin")

    def references(self, groups: GroupView, work_file: str, *, of: str = "") -> References:
        """Return the log-probabilities of the model before the first step, from the cache or computed now."""

        def outputs(tokens: TokenBatch) -> list[float]:
            return sequence_logps(self.model, tokens).tolist()

        return self.outputs(self.cache, outputs, groups, forward=self.forward, work_file=work_file, of=of)

    def outputs(
        self,
        cache: ReferenceCache,
        outputs: Outputs,
        groups: GroupView,
        *,
        forward: Literal["tree", "plain"],
        work_file: str,
        of: str,
    ) -> References:
        """Compute the outputs that are not in the cache and return those of all groups; `of` names them in notes."""
        column = self.column(work_file)
        work = fill_cache(
            cache,
            outputs,
            groups,
            column=column,
            work_file=self.run.folder / work_file,
            forward=forward,
            token_budget=self.run.settings.token_budget,
            ranks=self.ranks,
        )
        with self.processes.activity("computing reference log-probabilities"):
            num_missing = next(work)
            num_known = len(groups) - num_missing
            self.progress.note(
                f"reference log-probabilities{of}: {num_missing} groups to compute, {num_known} cached or repeated"
            )
            if num_missing:
                self.progress.phase("reference", num_missing)
            for num_done in work:
                self.progress.advance(num_done)
        return References(groups, column, cache.shape)
