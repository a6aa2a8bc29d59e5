"""Micro-batches: the groups of one optimizer step or evaluation, split over ranks and cut by a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor

from align.data.balance import imbalance
from align.data.batching import StepPlan, plan_step
from align.data.token_groups import TokenSequence
from align.models.tree.batch import EarlyExit, TokenBatch, plain_batch, tree_batch
from align.train.distillation.cache import TeacherTargets
from align.train.indexed_groups import GroupView
from align.train.objectives.batch import GroupBatch, group_batch
from align.train.passes.data_ranks import DataRanks
from align.train.references.cache import References

# Forward -> function of sequences that returns its model input
COLLATE: dict[str, Callable[[Sequence[TokenSequence]], TokenBatch]] = {"tree": tree_batch, "plain": plain_batch}


class MicroBatch(NamedTuple):
    """One forward pass of this rank."""

    batch: GroupBatch
    weight: int  # 1; 0 for a batch that only keeps this rank in step with the others and does not count
    is_last: bool


class MicroBatcher:
    """Cuts groups into micro-batches for this rank; all ranks get equally many."""

    def __init__(
        self,
        groups: GroupView,
        *,
        forward: Literal["tree", "plain"],
        token_budget: int,
        references: References | None,
        ranks: DataRanks,
        teacher: TeacherTargets | None = None,
        exit: EarlyExit | None = None,
    ) -> None:
        self.ranks = ranks
        self.accelerator = ranks.accelerator
        self._groups = groups
        self._references = references
        self._collate = COLLATE[forward]
        self._teacher, self.exit = teacher, exit
        self._sizes = groups.column(forward)
        self._token_budget = token_budget

    def plan(self, indices: Sequence[int], exits: Sequence[int] = ()) -> StepPlan:
        """Split the groups over ranks and micro-batches; those of `exits` take the early exit, before the others."""
        options = {"token_budget": self._token_budget, "num_ranks": self.ranks.number}
        if not exits:
            return plan_step(indices, self._sizes, **options)
        first = plan_step(exits, self._sizes, **options)
        taken = set(exits)
        rest = [index for index in indices if index not in taken]
        then = plan_step(rest, self._sizes, **options).ranks if rest else ((),) * len(first.ranks)
        ranks = tuple(mine + others for mine, others in zip(first.ranks, then, strict=True))
        return StepPlan(tuple(indices), ranks, num_exits=len(first.ranks[0]))

    def imbalance(self, plan: StepPlan) -> float:
        """Return the tokens of the fullest rank over the mean of all ranks."""
        return imbalance(plan, self._sizes)

    def micro_batches(self, plan: StepPlan, *, kl: Tensor | None = None) -> Iterator[MicroBatch]:
        """Yield the micro-batches of this rank on its device, with the estimate `kl` of the whole step, if given."""
        micros = plan.ranks[self.ranks.own]
        for number, micro in enumerate(micros, start=1):
            members = micro or plan.groups[:1]
            references = None if self._references is None else [self._references.of(index) for index in members]
            batch = group_batch(self._groups.select(members), references, self._collate)
            if self._teacher is not None:
                batch = self._teacher.added_to(batch, members)
            if number <= plan.num_exits:
                batch = replace(batch, tokens=replace(batch.tokens, exit=self.exit))
            batch = batch.to(self.accelerator.device)
            batch = batch if kl is None else replace(batch, kl=kl)
            yield MicroBatch(batch, int(bool(micro)), number == len(micros))
