"""The pass that computes missing reference log-probabilities on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray

from align.accounting.flops import Work, sum_work
from align.artifacts import read_json, write_json
from align.data.batching import plan_step
from align.data.group_columns import sequence_key
from align.data.token_groups import TokenSequence
from align.errors import RunError
from align.models.tree.batch import TokenBatch
from align.train.indexed_groups import GroupView
from align.train.passes.data_ranks import DataRanks
from align.train.passes.micro_batches import COLLATE
from align.train.references.cache import Pass, ReferenceCache, References, ReferenceWork, first_occurrences

FLUSH_S = 60.0  # seconds between writes to the cache: how much computation a kill may lose
GROUPS_PER_PLAN = 1 << 14  # groups that are cut into micro-batches together
# Files in the working folder of a step with the work of its passes: over its groups, over mismatched pairs, and over
# groups cut for scoring; of another model over the groups that it scores; and of a teacher
REFERENCE_WORK, KL_REFERENCE_WORK, CUT_REFERENCE_WORK = (f"{name}references.computed" for name in ("", "kl-", "cut-"))
# Of the models besides the policy that score rows for selection; a cross-fitted reference is two models
SCORE_WORK = {"reference": ("scores.computed", "scores-2.computed"), "scorer": ("scorer-scores.computed",)}
TEACHER_WORK = "teacher.computed"
OWN_WORK = (REFERENCE_WORK, KL_REFERENCE_WORK, CUT_REFERENCE_WORK)  # of the step's own policy
WORK_FILES = (*OWN_WORK, *SCORE_WORK["reference"], *SCORE_WORK["scorer"], TEACHER_WORK)

Outputs = Callable[[TokenBatch], Sequence[Any]]  # -> what the cache stores for each sequence


@torch.no_grad()
def fill_cache(
    cache: ReferenceCache,
    outputs: Outputs,
    groups: GroupView,
    *,
    column: Path,
    work_file: Path,
    forward: Literal["tree", "plain"],
    token_budget: int,
    ranks: DataRanks,
) -> Iterator[int]:
    """Compute missing values on all ranks, store them in the cache and write the column of all groups.

    Yields the number of missing groups first, then the number of groups that all ranks have finished, after each
    micro-batch. The computed work is stored in `work_file`.
    """
    # The main process decides what is missing: another run may be adding to the folder at the same time
    accelerator = ranks.accelerator
    nothing = Pass(np.empty(0, np.int64), 0)
    (plan,) = broadcast_object_list([cache.begin_pass(groups, column) if accelerator.is_main_process else nothing])
    yield plan.num_missing
    to_store = first_occurrences(groups, plan.groups)
    to_compute = to_store & References(groups, column, cache.shape).missing()
    writer = _Writer(cache)
    work = Work(0, 0, 0)
    num_forward_passes = 0
    sizes = groups.column(forward)
    for micros, filler in _micro_batches(plan, sizes, token_budget=token_budget, num_ranks=ranks.number):
        spans = [groups.sequence_span(index) for micro in micros for index in micro]
        if not any(to_store[span].any() for span in spans):
            continue
        # A rank without groups runs one anyway: sharded weights are gathered by all ranks together
        own = micros[ranks.own]
        sequences = [sequence for index in own or (filler,) for sequence in groups[index].sequences]
        batch = replace(COLLATE[forward](sequences), exit=cache.exit)
        # Counted in every attempt, although an earlier one may have stored the values
        work = sum_work([work, batch.work()])
        num_forward_passes += 1
        if not any(to_compute[span].any() for span in spans):
            continue
        batch = batch.to(accelerator.device)
        totals = outputs(batch)
        if own and ranks.is_first_process:
            is_new = np.concatenate([to_compute[groups.sequence_span(index)] for index in own])
            for sequence, total, keep in zip(sequences, totals, is_new, strict=True):
                if keep:
                    writer.add(sequence, total)
        writer.flush_if_due()
        yield sum(map(len, micros))
    writer.flush()
    _write_column(cache, groups, column, accelerator)
    if num_forward_passes:
        _store_work(work_file, work, num_forward_passes, ranks)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cache.finish_pass()


def _write_column(cache: ReferenceCache, groups: GroupView, column: Path, accelerator: Accelerator) -> None:
    """Write the column of all groups on the main process, once all processes have stored their values."""
    accelerator.wait_for_everyone()
    num_missing = len(cache.write_column(groups, column)) if accelerator.is_main_process else 0
    (num_missing,) = broadcast_object_list([num_missing])
    if num_missing:
        raise RunError(
            f"{cache.folder}: {num_missing} reference log-probabilities are missing after all processes wrote "
            "theirs; do all nodes share the folder?"
        )


def _micro_batches(
    plan: Pass, sizes: NDArray[Any], *, token_budget: int, num_ranks: int
) -> Iterator[tuple[tuple[tuple[int, ...], ...], int]]:
    """Yield one micro-batch of each rank at a time, with the first group of their plan."""
    for start in range(0, len(plan.groups), GROUPS_PER_PLAN):
        window = plan.groups[start : start + GROUPS_PER_PLAN].tolist()
        ranks = plan_step(window, sizes, token_budget=token_budget, num_ranks=num_ranks).ranks
        yield from ((micros, window[0]) for micros in zip(*ranks, strict=True))


@dataclass(slots=True)
class _Writer:
    """Collects values and stores them in the cache from time to time."""

    cache: ReferenceCache
    values: dict[str, tuple[Any, int]] = field(default_factory=dict[str, tuple[Any, int]])
    flushed_at: float = field(default_factory=time.monotonic)
    num_pending: int = 0  # trained tokens

    def add(self, sequence: TokenSequence, value: Any) -> None:  # noqa: ANN401 - what the cache stores
        """Add the value of a sequence."""
        length = int(sequence.loss_mask.sum())
        self.values[sequence_key(sequence)] = (value, length)
        self.num_pending += length

    def flush_if_due(self) -> None:
        """Store the values if there are many, or if the last flush was long ago."""
        if self.num_pending > self.cache.max_pending or time.monotonic() - self.flushed_at > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Store the values."""
        if self.values:
            self.cache.store(self.values)
        self.values = {}
        self.flushed_at = time.monotonic()
        self.num_pending = 0


def _store_work(path: Path, work: Work, num_forward_passes: int, ranks: DataRanks) -> None:
    """Store the work of all ranks for later attempts, which find nothing missing."""
    own = torch.tensor(list(work), dtype=torch.float64, device=ranks.accelerator.device)
    total = ranks.sum(own).tolist()
    if ranks.accelerator.is_main_process:
        write_json(path, [*map(int, total), num_forward_passes])


def read_work(folder: Path, names: Sequence[str] = OWN_WORK) -> ReferenceWork:
    """Return the work of the passes of a step's own policy, which `fill_cache` stored in its folder."""
    files = (folder / name for name in names)
    stored: list[list[int]] = [read_json(file) for file in files if file.is_file()]
    return ReferenceWork(sum_work(Work(*work) for *work, _ in stored), sum(number for *_, number in stored))
