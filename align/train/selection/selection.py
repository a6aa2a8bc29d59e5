"""What a training run is given for online selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from align.accounting.flops import BACKWARD, Decoder, Work, forward_flops, sum_work
from align.data.batching import Indices, order
from align.data.mixing import Mixture
from align.data.token_groups import TokenGroup
from align.models.tree.batch import count_work
from align.train.selection.cut_groups import CutGroups
from align.train.selection.settings import UNIFORM, SelectionSettings
from align.train.settings import TrainSettings

if TYPE_CHECKING:
    from align.models.backbone import Backbone

NOT_GIVEN = "the dimensions were not given"
# Groups from which costs are estimated: if lengths vary by as much as their mean, with a standard error of 1.6 %
SAMPLED_GROUPS = 4096


class SelectionCost(NamedTuple):
    """What selection costs; tokens take the place of FLOPs where the dimensions of a model are unknown."""

    scoring: float = 1.0  # rho: FLOPs of scoring a row over those of its forward pass
    once: float = 0.0  # FLOPs of the passes of fixed models over all rows, which are run once
    row: float = 1.0  # FLOPs of training on a row, on average
    training: float = 1 + BACKWARD  # FLOPs of training on a row over those of its forward pass


class CostRange(NamedTuple):
    """The least and the most that a run can cost, over uniform training of as many rows."""

    low: float
    high: float


class ChosenCost(NamedTuple):
    """What the chosen rows of a step cost, compared with all rows that it chose from."""

    mean_tokens: float  # of all rows
    mean_tokens_chosen: float
    row_cost: float  # mean FLOPs of a chosen row over those of any row


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedModel:
    """A model whose losses of the rows are computed once: the reference, or the scorer in place of the policy."""

    loads: Sequence[Callable[[], Backbone]] = ()  # load it; two models for a cross-fitted reference
    size: Decoder | str = NOT_GIVEN  # or why they are unknown
    trained_rows: int = 0  # on which cross-fitted references were trained, over all their steps; 0 for other models
    trained: Work = Work(0, 0, 0)  # of that training; not known before it has run


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How the rows of each step are chosen, and from which sources they come."""

    settings: SelectionSettings
    fixed: Mapping[str, FixedModel] = field(default_factory=dict[str, FixedModel])  # reference and scorer, by key
    sources: Mapping[str, int] = field(default_factory=dict[str, int])  # rows of each, as they follow each other
    cost: SelectionCost = SelectionCost()
    size: Decoder | str = NOT_GIVEN  # dimensions of the policy, or why they are unknown

    @property
    def cost_factor(self) -> float:
        """Return the training FLOPs over those of uniform training of as many rows, without passes of fixed models.

        The chosen rows are assumed to cost as much as those of the pool on average.
        """
        return self.settings.cost_factor(self.cost.scoring, self.cost.training)

    def cost_range(self, works: Sequence[Work], epoch: Indices, train: TrainSettings) -> CostRange:
        """Return the cost factor if each step of an epoch chose its cheapest rows, and its most expensive ones.

        `works` are those of all rows, and `epoch` the rows of an epoch in their order.
        """
        costs, number = np.array([work_flops(self.size, work) for work in works]), self.rows_per_step(train)
        batches = [np.sort(costs[list(epoch[start : start + number])]) for start in range(0, len(epoch), number)]
        sizes = [chosen_rows(len(each), train.prompts_per_step, number) for each in batches]
        pairs = list(zip(batches, sizes, strict=True))
        mean = sum(each.mean() * size for each, size in pairs)
        ends = (sum(each[:size].sum() for each, size in pairs), sum(each[-size:].sum() for each, size in pairs))
        return CostRange(*(self.cost_factor + self.settings.until * float(end / mean - 1) for end in ends))

    def chosen_cost(self, groups: Iterable[TokenGroup], chosen: Indices) -> ChosenCost:
        """Return what the groups at the places `chosen` cost, compared with all groups."""
        works = [count_work(group.sequences) for group in groups]
        tokens, flops = np.array([[work.tokens, work_flops(self.size, work)] for work in works]).T
        places = list(chosen)
        return ChosenCost(
            float(tokens.mean()), float(tokens[places].mean()), float(flops[places].mean() / flops.mean())
        )

    def rows_per_step(self, train: TrainSettings) -> int:
        """Return the number of rows that a step takes from the epoch."""
        size = train.prompts_per_step
        return size if self.settings.score == UNIFORM else self.settings.super_batch(size)

    def selected_steps(self, train: TrainSettings, num_rows: int) -> int:
        """Return the optimizer steps of a run that selects with this filter."""
        return train.num_steps(num_rows, self.settings.super_batch(train.prompts_per_step))

    def num_steps(self, train: TrainSettings, num_rows: int) -> int:
        """Return the optimizer steps: for a uniform run those of the run that it is compared with, or its FLOPs' worth.

        Raises `InputError` for a pool that is too small.
        """
        steps = self.selected_steps(train, num_rows)
        if self.settings.score != UNIFORM and self.settings.tokens is None:
            self.settings.check_pool(num_rows, train.prompts_per_step, steps)
        if self.settings.equal == "steps":
            return steps
        return math.ceil(steps * self.cost_factor + self._steps_once(train) - 1e-9)

    def compared_steps(self, train: TrainSettings, num_rows: int) -> set[int]:
        """Return the steps after which a uniform run is compared with one that selects.

        They are the steps of that run, and those for the same FLOPs if only fixed models score rows.
        """
        steps = self.selected_steps(train, num_rows)
        return {steps, math.ceil(steps + self._steps_once(train) - 1e-9)}

    def _steps_once(self, train: TrainSettings) -> float:
        """Return the optimizer steps that cost as much as the passes of fixed models and cross-fitting references."""
        trained = sum(each.trained_rows for each in self.fixed.values())
        return (self.cost.once / self.cost.row + trained) / train.prompts_per_step


def selection_cost(
    groups: Sequence[TokenGroup],
    settings: SelectionSettings,
    model: Decoder | str,
    fixed: Iterable[Decoder | str] = (),
    *,
    mixture: Mixture | None = None,
    has_lm_head: bool = True,
    frozen: bool = False,
) -> SelectionCost:
    """Return what selection from the groups costs, estimated from some of them.

    `model` and `fixed` are the dimensions of the policy and of fixed models, or why they are unknown. An epoch has the
    rows of the `mixture`, where there is one. With `frozen` only adapters are trained, and the gradients of the other
    weights are not computed.
    """
    all_groups = order(len(groups), seed=0, epoch=0)
    epoch = list(islice(all_groups if mixture is None else mixture.epoch(0), SAMPLED_GROUPS))
    sample = list(islice(all_groups, SAMPLED_GROUPS))
    cut = groups if settings.score_tokens is None else CutGroups(groups, settings.score_tokens)

    def work(part: Sequence[TokenGroup], indices: Sequence[int]) -> Work:
        return sum_work(count_work(part[index].sequences) for index in indices)

    whole, scored = work(groups, epoch), work(cut, epoch)
    sizes = [model, *fixed]
    if unknown := [size for size in sizes if isinstance(size, str)]:  # tokens and FLOPs must not be added up
        sizes = [unknown[0]] * len(sizes)
    own, *others = sizes
    num_heads = 2 if settings.coupling == "gradient" and has_lm_head else 1  # products with the LM head
    scoring = scored._replace(targets=num_heads * scored.targets)
    training = float(BACKWARD if frozen else 1 + BACKWARD)
    return SelectionCost(
        scoring=work_flops(own, scoring) / work_flops(own, whole),
        once=sum(work_flops(size, work(cut, sample)) for size in others) * len(groups) / len(sample),
        row=training * work_flops(own, whole) / len(epoch),
        training=training,
    )


def chosen_rows(num_rows: int, prompts_per_step: int, rows_per_step: int) -> int:
    """Return how many of the rows of a step are chosen: the last ones of an epoch may not fill a super-batch."""
    return math.ceil(num_rows * prompts_per_step / rows_per_step)


def work_flops(model: Decoder | str, work: Work) -> float:
    """Return the FLOPs of a forward pass; its tokens where the dimensions of the model are unknown."""
    return float(work.tokens if isinstance(model, str) else forward_flops(model, work))
