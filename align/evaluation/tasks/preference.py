"""Preference accuracy: how often the policy finds the better of two responses more likely.

Measured beside it: the mean log-probability of the better and of the worse responses in nats (`chosen_logp`,
`rejected_logp`), which training by preference losses can push down together; the mean confidence of the decisions, with
the probability that the policy would produce the better one of the two, by summed and by mean log-probability; and the
calibration error of that confidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.evaluation.likelihood_task import LikelihoodTask
from align.evaluation.measures.calibration import calibration_error, confidence
from align.evaluation.statistics import Score
from align.evaluation.task import Parts

if TYPE_CHECKING:
    from align.data.token_groups import TokenGroup
    from align.distributed.processes import Processes
    from align.models.policy import Policy


def measure(policy: Policy, groups: Sequence[TokenGroup], *, precision: str, processes: Processes) -> Iterator[Parts]:
    """Yield the number of ordered pairs, by summed and by mean log-probability; no parts for a group without a pair.

    Every two responses of a group whose rewards differ form a pair. Where the row names a preferred response, it forms
    a pair with each other one.
    """
    from align.evaluation.likelihood import likelihoods  # noqa: PLC0415 - imports torch

    measured = likelihoods(policy, groups, precision=precision, processes=processes)
    for group, each in zip(groups, measured, strict=True):
        pairs = ordered_pairs(group)
        summed = sum(each[better].logp > each[worse].logp for better, worse in pairs)
        means = [one.logp / one.length for one in each]
        averaged = sum(means[better] > means[worse] for better, worse in pairs)
        sums = {
            "accuracy_summed": summed,
            "accuracy_per_token": averaged,
            "confidence_summed": sum(confidence(each[better].logp - each[worse].logp) for better, worse in pairs),
            "confidence_per_token": sum(confidence(means[better] - means[worse]) for better, worse in pairs),
            "chosen_logp": sum(each[better].logp for better, _ in pairs),
            "rejected_logp": sum(each[worse].logp for _, worse in pairs),
        }
        yield {name: (value, len(pairs)) for name, value in sums.items()} if pairs else {}


def ordered_pairs(group: TokenGroup) -> list[tuple[int, int]]:
    """Return (better, worse) indices of the responses known to differ; a label takes precedence over rewards."""
    indices = range(len(group.sequences))
    if group.chosen is not None:
        return [(group.chosen, other) for other in indices if other != group.chosen]
    rewards = group.rewards or [0.0 for _ in indices]
    return [(better, worse) for better in indices for worse in indices if rewards[better] > rewards[worse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceTask(LikelihoodTask):
    """A task with the calibration of its decisions."""

    def scores(self, parts: Sequence[Parts]) -> dict[str, Score]:
        """Return each metric and measure; a row of several pairs counts by its means in the calibration errors."""
        found = LikelihoodTask.scores(self, parts)
        known = [each for each in parts if each]
        for form in FORMS:
            confidences, right = (
                [each[f"{name}_{form}"][0] / each[f"{name}_{form}"][1] for each in known]
                for name in ("confidence", "accuracy")
            )
            found[f"calibration_error_{form}"] = calibration_error(confidences, right)
        return found


FORMS = ("summed", "per_token")
TASK = PreferenceTask(
    name="preference",
    metrics=("accuracy_summed", "accuracy_per_token"),
    measures=(
        *("chosen_logp", "rejected_logp"),
        *(f"{name}_{form}" for name in ("confidence", "calibration_error") for form in FORMS),
    ),
    measure=measure,
    compares=True,
)
