"""Scoring by the first layers of the policy, and training half of the rows through them (Flexi-JEST).

The scores are those of the policy after its first layers, followed by its own final norm and head: an exit without
weights of its own, so checkpoints, the optimizer and the saved policy stay as they are. Half of each batch is trained
through the exit in place of all layers, as Flexi-JEST trains half of each batch in low resolution (Evans et al. 2024,
arXiv:2406.17711), so that the exit follows the policy. The reference is scored through as many of its own
layers, and must have been trained in the same way: the loss of all its layers would mark rows that the first layers
cannot learn as learnable for ever.
"""

from __future__ import annotations

from align.errors import InputError, within
from align.models.backbone import Backbone
from align.models.router_loss import router_loss
from align.models.tree.batch import EarlyExit
from align.train.training_run import TrainingRun


def make_exit(run: TrainingRun, policy: Backbone, kind: str) -> EarlyExit | None:
    """Return the exit of a run that trains one; raise `InputError` where that is not supported.

    `kind` is that of the launch, by accelerate's name.
    """
    if run.selection is None or not run.selection.settings.trains_exit:
        return None
    settings = run.selection.settings
    settings.check_kind(kind)
    assert settings.score_layers is not None
    with within("selection", "score_layers"):
        if router_loss(policy) is not None:
            raise InputError("is not supported with a router auxiliary loss, which is that of all layers; leave it out")
        return policy.early_exit(settings.score_layers)
