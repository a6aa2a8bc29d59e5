"""What is estimated of a step before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from align.data.batching import Balance


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a step will take; of what is made on the way the most that it can be."""

    name: str
    stage: str
    rows: int  # that it trains on, answers or judges
    tokens: int = 0  # computed (in one epoch, where it trains), each distinct (prefix, token) of a group once
    flops: float = 0.0  # of the whole step, reference pass included
    seconds: float = 0.0
    disk: int = 0  # bytes that it leaves behind
    spare: int = 0  # bytes of its checkpoints, while it runs
    bound: bool = False  # whether rows and tokens are the most that an earlier step can make
    training: Training | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is known of a training step whose rows are there."""

    counts: dict[str, int]
    format: str
    optimizer_steps: int
    longest: int  # tokens of the longest sequence
    unshared: int  # tokens of an epoch if responses did not share their prompt
    memory: int  # bytes at the peak
    balances: list[Balance]  # of the first optimizer steps, for numbers of ranks that have a group each
