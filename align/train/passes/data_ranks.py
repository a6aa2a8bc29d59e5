"""Data-parallel ranks: the processes of a launch, or groups of them that split each micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from align.distributed.launch import COLLECTIVE_TIMEOUT
from align.distributed.launch_files import SEQUENCE_PARALLEL, check_process_groups
from align.errors import InputError
from align.models.policy import Policy
from align.models.probe import Forward, split_rows
from align.models.tree.sequence_group import SequenceGroup
from align.train.indexed_groups import GroupView
from align.train.sharding.replicated import Replicated
from align.train.training_run import TrainingRun


@dataclass(frozen=True, slots=True)
class DataRanks:
    """The data-parallel ranks of a launch: each is `size` neighbouring processes, which run the same micro-batches."""

    accelerator: Accelerator
    size: int = 1

    @property
    def number(self) -> int:
        """Return the number of ranks."""
        return self.accelerator.num_processes // self.size

    @property
    def own(self) -> int:
        """Return the rank of this process."""
        return self.accelerator.process_index // self.size

    @property
    def is_first_process(self) -> bool:
        """Return whether this is the first process of its rank."""
        return self.accelerator.process_index % self.size == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks of values that all processes of a rank have alike; all call it together."""
        return cast(Tensor, self.accelerator.reduce(values, reduction="sum")) / self.size


def split_sequences(run: TrainingRun, sharding: Replicated, groups: GroupView, forward: Forward) -> str | None:
    """Let groups of processes split the rows of the policy's trees as the settings say; return a note, None if not.

    Raises `InputError` if that is not supported.
    """
    size, policy, accelerator = run.settings.sequence_parallel, sharding.policy, sharding.accelerator
    if size == 1:
        return None
    check_process_groups(size, accelerator.num_processes)
    if forward.name == "plain":
        raise InputError(f"a padded forward cannot be split ({forward.reason}); leave it out", SEQUENCE_PARALLEL)
    if not isinstance(policy, Policy) or run.teacher is not None or run.selection is not None:
        raise InputError("is for sft and preference training without selection; leave it out", SEQUENCE_PARALLEL)
    group, _ = dist.new_subgroups(size, timeout=COLLECTIVE_TIMEOUT)
    own = SequenceGroup(cast(dist.ProcessGroup, group), accelerator.process_index % size, size)
    is_rounded = sharding.gathers_per_layer and sharding.in_bf16
    split_rows(policy, groups.probe_sequences(), own, is_rounded=is_rounded)
    return f"groups of {size} neighbouring processes split the tokens of each micro-batch"
