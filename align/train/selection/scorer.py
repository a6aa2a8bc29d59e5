"""The losses of groups that a step chooses from: of the policy now, and of the reference from its cache.

Shape legend: B distinct groups to score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from align.accounting.flops import Work, sum_work
from align.config import stable_hash
from align.data.token_groups import TokenGroup
from align.errors import InputError
from align.models.backbone import Backbone
from align.models.policy import Policy
from align.models.probe import choose_forward
from align.models.tree.batch import TokenBatch
from align.models.weights import fingerprint
from align.train.indexed_groups import GroupView
from align.train.objectives.base import ScoredObjective
from align.train.objectives.batch import GroupBatch
from align.train.passes.micro_batches import MicroBatcher
from align.train.references.cache import ReferenceCache, References
from align.train.references.compute import SCORE_WORK
from align.train.references.run_passes import RunPasses
from align.train.selection.features import HeadFeatures
from align.train.selection.folds import FOLDS, FoldedReferences, SomeGroups, folds_of
from align.train.selection.sampler import Floats
from align.train.selection.selection import FixedModel
from align.train.selection.settings import SELECTION
from align.train.sharding.products import products_in
from align.train.training_run import WORK_METRICS


class Losses(NamedTuple):
    """The losses of some groups, in their order."""

    policy_B: Floats | None  # None if the score does not need it
    reference_B: Floats | None
    features_BF: Floats | None  # where the choice is coupled
    metrics: dict[str, float]  # work of all ranks, and seconds


class Scorer:
    """Computes the losses of groups; all ranks call it together."""

    def __init__(
        self,
        model: nn.Module,
        objective: ScoredObjective,
        batcher: MicroBatcher,
        fixed: Mapping[str, References | FoldedReferences],
        features: HeadFeatures | None = None,
    ) -> None:
        """`fixed` holds the outputs of the reference, and of a scorer in place of the policy."""
        self._model, self._objective, self._batcher, self._features = model, objective, batcher, features
        self._fixed = {row: fixed[name] for row, name in enumerate(("scorer", "reference")) if name in fixed}

    @torch.no_grad()
    def losses(self, groups: Sequence[int], *, needs_policy: bool) -> Losses:
        """Return the losses of the groups under the current weights, gathered from all ranks."""
        began_s = time.monotonic()
        accelerator = self._batcher.accelerator
        distinct, inverse = np.unique(np.asarray(groups, np.int64), return_inverse=True)
        place = {int(group): position for position, group in enumerate(distinct)}
        loss_2B = torch.zeros(2, len(distinct), dtype=torch.float64, device=accelerator.device)
        exits = distinct.tolist() if self._batcher.exit is not None else []
        plan = self._batcher.plan(distinct.tolist(), exits)
        work = Work(0, 0, 0)
        num_passes = 0
        own = plan.ranks[accelerator.process_index]
        found = list[tuple[list[int], Tensor]]()
        with self._features.recording() if self._features is not None else nullcontext():
            for members, micro in zip(own, self._batcher.micro_batches(plan), strict=True):
                places = [place[group] for group in members]
                if needs_policy:
                    outputs = self._objective.outputs(self._model, micro.batch.tokens)
                    loss_2B[0, places] = self._objective.group_losses(outputs, micro.batch)[: len(members)]
                    work = sum_work([work, self._work(micro.batch)])
                    num_passes += 1
                    if self._features is not None:
                        found.append((places, self._features.of(outputs, micro.batch)[: len(places)]))
                for row in self._fixed if members else ():
                    loss_2B[row, places] = self._fixed_losses(row, members, micro.batch)
        sums = torch.cat([loss_2B.flatten(), loss_2B.new_tensor([float(part) for part in work])])
        values = cast(Tensor, accelerator.reduce(sums, reduction="sum")).cpu().numpy()  # each loss is of one rank
        policy_B, reference_B = values[: -len(work)].reshape(2, -1)[:, inverse]
        names = [SELECTION + name for name in (*WORK_METRICS, "micro_batches")]
        metrics: dict[str, float] = dict(zip(names, [*map(int, values[-len(work) :]), num_passes], strict=True))
        return Losses(
            policy_B if needs_policy or 0 in self._fixed else None,
            reference_B if 1 in self._fixed else None,
            self._gathered(found, len(distinct))[inverse] if found else None,
            {**metrics, SELECTION + "seconds": time.monotonic() - began_s},
        )

    def _work(self, batch: GroupBatch) -> Work:
        """Return the work of scoring a micro-batch."""
        work = batch.tokens.work()
        return work if self._features is None else work._replace(targets=work.targets * self._features.num_heads)

    def _gathered(self, found: Sequence[tuple[list[int], Tensor]], number: int) -> Floats:
        """Return the features of `number` distinct groups from all ranks, shape [B, F]."""
        _, first = found[0]
        features_BF = first.new_zeros(number, first.shape[1])
        for places, of_groups in found:
            features_BF[places] = of_groups
        gathered = cast(Tensor, self._batcher.accelerator.reduce(features_BF, reduction="sum"))
        return gathered.cpu().double().numpy()

    def _fixed_losses(self, row: int, members: Sequence[int], batch: GroupBatch) -> Tensor:
        outputs = [value for group in members for value in self._fixed[row].of(group)]
        return self._objective.group_losses(
            torch.tensor(outputs, dtype=torch.float64, device=batch.reference_BK.device), batch
        )


def fixed_outputs(passes: RunPasses, groups: Sequence[TokenGroup]) -> dict[str, References | FoldedReferences]:
    """Return what the fixed models of the selection compute for the groups, from the cache or computed now.

    Of a cross-fitted reference, the first model was trained on the first half of the groups and scores the second one.
    A model is in memory only for this; every process holds all of it.
    """
    assert passes.run.selection is not None
    return {name: _outputs_of(passes, groups, name, fixed) for name, fixed in passes.run.selection.fixed.items()}


def _outputs_of(
    passes: RunPasses, groups: Sequence[TokenGroup], name: str, fixed: FixedModel
) -> References | FoldedReferences:
    """Return the outputs of the reference or of the scorer."""
    if len(fixed.loads) == 1:
        return _pass(passes, name, fixed.loads[0], GroupView(groups), SCORE_WORK[name][0])
    folds = folds_of(groups)
    indices = [np.flatnonzero(folds != fold).tolist() for fold in range(1, FOLDS + 1)]
    parts = [
        _pass(passes, name, load, GroupView(SomeGroups(groups, scored)), work_file)
        for load, scored, work_file in zip(fixed.loads, indices, SCORE_WORK[name], strict=True)
    ]
    return FoldedReferences(parts, indices)


def _pass(passes: RunPasses, name: str, load: Callable[[], Backbone], groups: GroupView, work_file: str) -> References:
    """Return the outputs of one model for the groups that it scores."""
    run = passes.run
    objective = cast(ScoredObjective, run.objective)
    with passes.processes.activity(f"loading the {name} of the selection"):
        model = load().to(passes.accelerator.device)
    precision = run.settings.precision
    forward = choose_forward(model, groups.probe_sequences(), run.forward, precision=precision)

    def outputs(tokens: TokenBatch) -> list[Any]:
        with products_in(precision, passes.accelerator.device):
            return objective.outputs(model, tokens).tolist()

    # Log-probabilities depend on the weights alone, and are those of a preference loss; rewards on the loss too
    kind = precision if isinstance(model, Policy) else f"{precision}-{stable_hash(objective.cache_key())[:16]}"
    cache = ReferenceCache(
        run.references,
        weights=fingerprint(model),
        precision=kind,
        shape=objective.output_shape,
        exit=passes.exit and model.early_exit(passes.exit.layers),
    )
    of = f" of the selection's {name}"
    return passes.outputs(cache, outputs, groups, forward=forward.name, work_file=work_file, of=of)


def scored_objective(objective: object) -> ScoredObjective:
    """Return the objective if its loss of each group is known; raise `InputError` otherwise."""
    if not isinstance(objective, ScoredObjective):
        raise InputError(
            f"{type(objective).__name__} has no `outputs` and `group_losses`, which selection scores rows by",
            ("selection",),
        )
    return objective
