"""Pair accuracy of a reward model: how often it gives the better of two responses the higher reward.

Every two responses that the row ranks form a pair: by its label, by its rewards, or by the weighted sum of its
attributes. Equal rewards of the model count one half. A reward model's own report on held-out rows counts alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.accounting.flops import Work
from align.evaluation.likelihood_task import LikelihoodTask
from align.evaluation.pair_accuracy import preference_pairs
from align.evaluation.task import Parts, TaskInputs

if TYPE_CHECKING:
    from align.data.token_groups import TokenGroup
    from align.distributed.processes import Processes
    from align.models.reward_model import RewardModel


def measure(
    model: RewardModel, groups: Sequence[TokenGroup], *, precision: str, processes: Processes
) -> Iterator[Parts]:
    """Yield the number of pairs that the model ranks as the row does; no parts for a group without a pair.

    Each group is a micro-batch of its own, so that its rewards do not depend on the other rows of a process.
    """
    import torch  # noqa: PLC0415 - the table of tasks does not import it

    from align.models.probe import choose_forward  # noqa: PLC0415 - imports torch
    from align.models.reward_scoring import score_groups  # noqa: PLC0415 - imports torch

    model.use_forward(choose_forward(model, [each.sequences for each in groups], "auto", precision=precision).name)
    weights = dict(zip(model.rating.names, model.rating.weights, strict=True))
    own = dict[int, Parts]()
    for index in range(processes.rank, len(groups), processes.world_size):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            (scores_KA,) = score_groups(model, [groups[index]])
        rewards = model.rating.rewards(scores_KA)
        pairs = preference_pairs(groups[index].row, groups[index], rewards, weights=weights)
        own[index] = {"accuracy": (sum(pair.correct for pair in pairs), len(pairs))} if pairs else {}
    found = {index: each for part in processes.all_gather_object(own) for index, each in part.items()}
    yield from (found[index] for index in range(len(groups)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTask(LikelihoodTask):
    """A task that measures rows under a reward model in place of a policy."""

    def model(self, inputs: TaskInputs) -> RewardModel:
        """Return the evaluated reward model."""
        return inputs.reward_model()

    def work(self, groups: Sequence[TokenGroup]) -> Work:
        """Return the work of the forward passes over the groups, which have no LM head."""
        return LikelihoodTask.work(self, groups)._replace(targets=0)


TASK = RewardTask(name="pair_accuracy", metrics=("accuracy",), measure=measure, compares=True)
REWARD_TASKS: Sequence[str] = (TASK.name,)
