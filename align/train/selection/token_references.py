"""The log-probability of each trained token under the reference of a selection of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from align.errors import RunError
from align.models.policy import Policy
from align.models.probe import choose_forward
from align.models.tree.batch import TokenBatch
from align.models.weights import fingerprint
from align.train.distillation.cache import TeacherCache, TeacherTargets, TopLogps
from align.train.indexed_groups import GroupView
from align.train.objectives.batch import GroupBatch
from align.train.references.cache import References
from align.train.references.compute import SCORE_WORK
from align.train.references.run_passes import RunPasses
from align.train.sharding.products import products_in

REFERENCE = "reference"


class TokenReferences(TeacherTargets):
    """The reference's log-probabilities of the trained tokens of the training rows."""

    def __init__(self, places: References, folder: Path, column: Path, weights: str, *, num_train: int) -> None:
        """`num_train` is the number of training rows; the groups from there on are held out."""
        super().__init__(places, folder, column, weights)
        self._num_train = num_train

    def added_to(self, batch: GroupBatch, groups: Sequence[int]) -> GroupBatch:
        """Return the batch of these groups with its `reference_N`; held-out rows have none, as all tokens count."""
        if groups[0] >= self._num_train:
            return batch
        _, logps_N1 = self.of(groups)
        return replace(batch, reference_N=logps_N1[:, 0])


def token_references(passes: RunPasses) -> TokenReferences | None:
    """Return the reference's log-probabilities for the training rows, from the cache or computed now.

    None if the run chooses no tokens. The reference is in memory only for this; every process holds all of it.
    """
    run, device = passes.run, passes.accelerator.device
    if run.selection is None or not run.selection.settings.chooses_tokens:
        return None
    with passes.processes.activity("loading the reference of the selection"):
        model = cast(Policy, run.selection.fixed[REFERENCE].loads[0]()).to(device)
    groups = GroupView(run.train)
    precision = run.settings.precision
    forward = choose_forward(model, groups.probe_sequences(), run.forward, precision=precision)

    def outputs(tokens: TokenBatch) -> list[TopLogps]:
        with products_in(precision, device):
            return _token_logps(model, tokens)

    weights, (work_file, *_) = fingerprint(model), SCORE_WORK[REFERENCE]
    cache = TeacherCache(run.references, weights=weights, precision=precision, top_k=0)
    of = " of the tokens, by the selection's reference"
    places = passes.outputs(cache, outputs, groups, forward=forward.name, work_file=work_file, of=of)
    return TokenReferences(places, cache.folder, passes.column(work_file), weights, num_train=len(groups))


def _token_logps(model: Policy, batch: TokenBatch) -> list[TopLogps]:
    """Return the log-probability of each target, [N, 1], of each sequence; no other tokens are kept."""
    logps_N = model(batch).float().cpu().numpy()
    if not np.isfinite(logps_N).all():
        raise RunError(f"the reference's log-probability of a token is {logps_N[~np.isfinite(logps_N)][0]}")
    ends = np.cumsum(np.bincount(batch.sequence_N.cpu().numpy(), minlength=batch.num_sequences))[:-1]
    return [TopLogps(np.empty((len(part), 0), np.int32), part[:, None]) for part in np.split(logps_N, ends)]
