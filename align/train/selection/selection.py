"""What a training run is given for online selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from align.accounting.flops import BACKWARD, Decoder, Work, forward_flops, sum_work
from align.data.batching import Indices, order, steps_per_epoch
from align.data.mixing import Mixture
from align.data.token_groups import TokenGroup
from align.errors import InputError, within
from align.models.tree.batch import EarlyExit, count_work
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
    exit: float = 1.0  # FLOPs of the forward pass of a row through the early exit over those of all layers


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
        return self.settings.cost_factor(self.cost.scoring, self.cost.training, self.cost.exit)

    def cost_range(self, works: Sequence[Work], epoch: Indices, train: TrainSettings) -> CostRange:
        """Return the cost factor if each step of an epoch chose its cheapest rows, and its most expensive ones.

        `works` are those of all rows, and `epoch` the rows of an epoch in their order.
        """
        costs = np.array([work_flops(self.size, work) for work in works])
        number = self.rows_per_step(train)
        batches = [np.sort(costs[list(epoch[start : start + number])]) for start in range(0, len(epoch), number)]
        sizes = [chosen_rows(len(each), train.prompts_per_step, number) for each in batches]
        pairs = list(zip(batches, sizes, strict=True))
        mean = sum(each.mean() * size for each, size in pairs)
        ends = (sum(each[:size].sum() for each, size in pairs), sum(each[-size:].sum() for each, size in pairs))
        share = self.settings.until * self.settings.row_factor(self.cost.exit)
        return CostRange(*(self.cost_factor + share * float(end / mean - 1) for end in ends))

    def chosen_cost(self, groups: Iterable[TokenGroup], chosen: Indices) -> ChosenCost:
        """Return what the groups at the places `chosen` cost, compared with all groups."""
        works = [count_work(group.sequences) for group in groups]
        tokens, flops = np.array([[work.tokens, work_flops(self.size, work)] for work in works]).T
        places = list(chosen)
        trained = float(flops[places].mean())
        if self.settings.trains_exit and not isinstance(self.size, str):
            exited = sum_work(works[place] for place in exits(places))
            saved = work_flops(self.size, exited) - work_flops(self.size, exit_work(self.settings, self.size, exited))
            trained -= saved / len(places)
        return ChosenCost(float(tokens.mean()), float(tokens[places].mean()), trained / float(flops.mean()))

    def num_selected(self, num_steps: int) -> int:
        """Return how many of the optimizer steps of a run select rows by score."""
        return math.ceil(self.settings.until * num_steps - 1e-9)

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
            self._check_pool(num_rows, train.prompts_per_step, steps)
        if self.settings.equal == "steps":
            return steps
        equal = self._equal_steps(steps, self.cost_factor, train)
        return max(steps, equal) if train.schedule == "constant" else equal  # a decayed run is compared at its end

    def _check_pool(self, num_rows: int, prompts_per_step: int, num_steps: int) -> None:
        """Raise `InputError` if the rows do not fill one super-batch, or if a run trains on more rows than it has."""
        size = self.settings.super_batch(prompts_per_step)
        if num_rows < size:
            raise InputError(
                f"the pool has {num_rows:,} rows, and a step chooses {prompts_per_step} of {size}; use a smaller "
                "filter or prompts_per_step, or more rows",
                ("selection", "filter"),
            )
        trained = num_steps / steps_per_epoch(num_rows, size) * num_rows * prompts_per_step / size
        if trained > num_rows:
            most = math.floor(10 * size / prompts_per_step) / 10
            raise InputError(
                f"the pool has {num_rows:,} rows, and the run would train on {trained:,.0f} chosen ones: uniform "
                f"training could take every row once; use at most {most:g} epochs, or more rows",
                ("selection", "filter"),
            )

    def compared_steps(self, train: TrainSettings, num_rows: int) -> set[int]:
        """Return the steps after which a uniform run is compared with one that selects.

        They are the steps of that run, and those for the same FLOPs if only fixed models score rows, or if it costs
        less than uniform training.
        """
        steps = self.selected_steps(train, num_rows)
        least = min(1.0, self.cost_factor) if self.settings.equal == "flops" else 1.0
        return {steps, self._equal_steps(steps, least, train)}

    def _equal_steps(self, steps: int, cost: float, train: TrainSettings) -> int:
        """Return the uniform steps that cost as much as `steps` that each cost `cost` of them, and fixed models."""
        return math.ceil(steps * cost + self._steps_once(train) - 1e-9)

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

    whole = work(groups, epoch)
    sizes = [model, *fixed]
    if unknown := [size for size in sizes if isinstance(size, str)]:  # tokens and FLOPs must not be added up
        sizes = [unknown[0]] * len(sizes)
    own, *others = sizes

    def of_fixed(size: Decoder | str) -> float:
        return work_flops(size, exit_work(settings, model if isinstance(size, str) else size, work(cut, sample)))

    num_heads = 2 if settings.coupling == "gradient" and has_lm_head else 1  # products with the LM head
    scored = exit_work(settings, model, work(cut, epoch))
    scoring = scored._replace(targets=num_heads * scored.targets)
    training = float(BACKWARD if frozen else 1 + BACKWARD)
    return SelectionCost(
        scoring=work_flops(own, scoring) / work_flops(own, whole),
        once=sum(map(of_fixed, others)) * len(groups) / len(sample),
        row=training * work_flops(own, whole) / len(epoch),
        training=training,
        exit=work_flops(own, exit_work(settings, model, whole)) / work_flops(own, whole),
    )


def exits(chosen: Sequence[int]) -> Sequence[int]:
    """Return which of the chosen rows, in the order of choice, are trained through the early exit: every second one."""
    return chosen[1::2]


def exit_work(settings: SelectionSettings, model: Decoder | str, work: Work) -> Work:
    """Return what a pass costs through the layers that score rows, as the work of all layers.

    Raises `InputError` if the layers' share of the cost is unknown, or if they are all layers.
    """
    if settings.score_layers is None:
        return work
    with within("selection", "score_layers"):
        if isinstance(model, str):
            raise InputError(f"the cost of the first layers is unknown: {model}; leave it out")
        has_others = model.mixture is not None and model.mixture.layers != model.layers
        if has_others or model.recurrence is not None or model.num_mlps is not None:
            raise InputError("the layers of the model are of several kinds; leave it out")
        if settings.score_layers >= model.layers:
            raise InputError(f"is not less than the {model.layers} layers of the model; use fewer")
        return EarlyExit(settings.score_layers, model.layers).work(work)


def chosen_rows(num_rows: int, prompts_per_step: int, rows_per_step: int) -> int:
    """Return how many of the rows of a step are chosen: the last ones of an epoch may not fill a super-batch."""
    return math.ceil(num_rows * prompts_per_step / rows_per_step)


def work_flops(model: Decoder | str, work: Work) -> float:
    """Return the FLOPs of a forward pass; its tokens where the dimensions of the model are unknown."""
    return float(work.tokens if isinstance(model, str) else forward_flops(model, work))
