"""What a training run is given for online selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from align.accounting.flops import BACKWARD, Decoder, Work, forward_flops, sum_work
from align.data.batching import order
from align.data.token_groups import TokenGroup
from align.models.tree.batch import tree_batch
from align.train.selection.cut_groups import CutGroups
from align.train.selection.settings import UNIFORM, SelectionSettings
from align.train.settings import TrainSettings

if TYPE_CHECKING:
    from align.models.backbone import Backbone

SAMPLED_GROUPS = 512  # groups from which the cost of scoring is estimated


class SelectionCost(NamedTuple):
    """What selection costs; tokens take the place of FLOPs where the dimensions of a model are unknown."""

    scoring: float = 1.0  # rho: FLOPs of scoring a row over those of its forward pass
    once: float = 0.0  # FLOPs of the passes of fixed models over all rows, which are run once
    row: float = 1.0  # FLOPs of training on a row, on average
    training: float = 1 + BACKWARD  # FLOPs of training on a row over those of its forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedModel:
    """A model whose losses of the rows are computed once: the reference, or the scorer in place of the policy."""

    loads: Sequence[Callable[[], Backbone]] = ()  # load it; two models for a cross-fitted reference
    size: Decoder | str = "the dimensions were not given"  # or why they are unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How the rows of each step are chosen, and from which sources they come."""

    settings: SelectionSettings
    fixed: Mapping[str, FixedModel] = field(default_factory=dict[str, FixedModel])  # reference and scorer, by key
    sources: Mapping[str, int] = field(default_factory=dict[str, int])  # rows of each, as they follow each other
    cost: SelectionCost = SelectionCost()

    @property
    def cost_factor(self) -> float:
        """Return the training FLOPs over those of uniform training of as many rows, without passes of fixed models."""
        return self.settings.cost_factor(self.cost.scoring, self.cost.training)

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
        """Return the optimizer steps that cost as much as the passes of fixed models."""
        return self.cost.once / (self.cost.row * train.prompts_per_step)


def selection_cost(
    groups: Sequence[TokenGroup],
    settings: SelectionSettings,
    model: Decoder | str,
    fixed: Iterable[Decoder | str] = (),
    *,
    has_lm_head: bool = True,
    frozen: bool = False,
) -> SelectionCost:
    """Return what selection from the groups costs, estimated from some of them.

    `model` and `fixed` are the dimensions of the policy and of fixed models, or why they are unknown. With
    `frozen` only adapters are trained, and the gradients of the other weights are not computed.
    """
    sample = list(islice(order(len(groups), seed=0, epoch=0), SAMPLED_GROUPS))

    def work(part: Sequence[TokenGroup]) -> Work:
        return sum_work(tree_batch(part[index].sequences).work() for index in sample)

    whole = work(groups)
    scored = whole if settings.score_tokens is None else work(CutGroups(groups, settings.score_tokens))
    sizes = [model, *fixed]
    if unknown := [size for size in sizes if isinstance(size, str)]:  # tokens and FLOPs must not be added up
        sizes = [unknown[0]] * len(sizes)
    own, *others = sizes
    num_heads = 2 if settings.coupling == "gradient" and has_lm_head else 1  # products with the LM head
    scoring = scored._replace(targets=num_heads * scored.targets)
    training = float(BACKWARD if frozen else 1 + BACKWARD)
    return SelectionCost(
        scoring=_flops(own, scoring) / _flops(own, whole),
        once=sum(_flops(size, scored) for size in others) * len(groups) / len(sample),
        row=training * _flops(own, whole) / len(sample),
        training=training,
    )


def _flops(model: Decoder | str, work: Work) -> float:
    return float(work.tokens if isinstance(model, str) else forward_flops(model, work))
