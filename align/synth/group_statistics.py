"""Statistics of scored groups: row counts, rewards, pass rates, and how much rewards depend on length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import correlation, fmean, stdev
from typing import Any


@dataclass(slots=True)
class GroupStatistics:
    """Counts of prompts, responses and groups by outcome, and the rewards of the groups that were kept."""

    counts: Counter[str] = field(default_factory=Counter[str])
    rewards: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])  # best minus worst reward of each group
    longer_wins: list[float] = field(default_factory=list[float])  # per pair: 1, 0, or 0.5 for equal lengths; no ties
    verdicts: list[tuple[float, ...]] = field(
        default_factory=list[tuple[float, ...]]
    )  # rewards of each prompt's samples
    centered_lengths: list[float] = field(default_factory=list[float])  # characters minus the group's mean
    centered_rewards: list[float] = field(default_factory=list[float])  # reward minus the group's mean

    def add_group(self, rated: Sequence[tuple[int, float]]) -> None:
        """Add a group: (characters, reward) of each response, best first."""
        rewards = [reward for _, reward in rated]
        mean_length, mean_reward = fmean(length for length, _ in rated), fmean(rewards)
        self.rewards += rewards
        self.gaps.append(rewards[0] - rewards[-1])
        self.centered_lengths += [length - mean_length for length, _ in rated]
        self.centered_rewards += [reward - mean_reward for reward in rewards]
        for (length, reward), (other_length, other_reward) in combinations(rated, 2):
            if reward == other_reward:
                self.counts["pairs:tied"] += 1
            else:
                self.counts["pairs"] += 1
                self.longer_wins.append(0.5 if length == other_length else float(length > other_length))

    def report(self) -> dict[str, Any]:
        """Return the statistics as JSON; a value is None if there is too little data for it.

        `longer_wins` is the share of pairs in which the longer response has the higher reward, `length_correlation`
        the Pearson correlation of length and reward within groups. `pass_rate_mean`, and the shares of the prompts that
        no response and that every response passes, are of all prompts, also those whose groups were dropped.
        """
        varies = len(set(self.centered_lengths)) > 1 and len(set(self.centered_rewards)) > 1
        return {
            "counts": dict(sorted(self.counts.items())),
            "reward_mean": fmean(self.rewards) if self.rewards else None,
            "reward_deviation": stdev(self.rewards) if len(self.rewards) > 1 else None,
            "gap_mean": fmean(self.gaps) if self.gaps else None,
            "longer_wins": fmean(self.longer_wins) if self.longer_wins else None,
            "length_correlation": correlation(self.centered_lengths, self.centered_rewards) if varies else None,
            **self._pass_rates(),
        }

    def _pass_rates(self) -> dict[str, float]:
        """Return how many prompts pass; empty if a reward is outside of [0, 1], and so not a pass rate."""
        rewards = [reward for each in self.verdicts for reward in each]
        if not rewards or min(rewards) < 0 or max(rewards) > 1:
            return {}
        rates = [pass_rate(each) for each in self.verdicts]
        return {
            "pass_rate_mean": fmean(rates),
            "never_passed": fmean(rate == 0 for rate in rates),
            "always_passed": fmean(rate == 1 for rate in rates),
        }


def pass_rate(rewards: Sequence[float], *, threshold: float = 1.0) -> float:
    """Return the share of a prompt's responses whose reward is at least `threshold`: 1 is easy, 0 is out of reach.

    Preference pairs need a rate between the two. phi-4 keeps rates from 0.2 to 0.8 (Abdin et al. 2024).

    >>> pass_rate([1.0, 0.0, 0.5, 1.0])
    0.5
    """
    return sum(reward >= threshold for reward in rewards) / len(rewards)
