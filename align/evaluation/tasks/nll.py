"""Mean negative log-likelihood of held-out responses, in nats per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from align.evaluation.likelihood_task import LikelihoodTask
from align.evaluation.task import Parts

if TYPE_CHECKING:
    from align.data.token_groups import TokenGroup
    from align.distributed.processes import Processes
    from align.models.policy import Policy


def measure(policy: Policy, groups: Sequence[TokenGroup], *, precision: str, processes: Processes) -> Iterator[Parts]:
    """Yield nats and trained tokens, over all responses of each group."""
    from align.evaluation.likelihood import likelihoods  # noqa: PLC0415 - imports torch

    for each in likelihoods(policy, groups, precision=precision, processes=processes):
        yield {"nll": (-sum(one.logp for one in each), sum(one.length for one in each))}


TASK = LikelihoodTask(name="nll", metrics=("nll",), measure=measure, preferred_only=True)
