"""Settings of the average of a training's last weights; no torch."""

from __future__ import annotations

from pydantic import Field

from align.config import Settings
from align.errors import InputError

# Training settings that may end it before its last step, or choose its weights by evaluations
CONFLICTING = ("keep", "early_stopping", "callbacks", "until_step", "on_divergence")
CONFLICT = (
    "cannot be combined with train.average, whose last snapshot follows the last planned step; leave one of the two out"
)
# The mean of A1 B1 and A2 B2 is another one than that of A1 and A2 times that of B1 and B2
ADAPTERS = "the mean of adapter factors is not the mean of their products; train all weights, or leave average out"


class SnapshotSettings(Settings):
    """Which weights of a training are averaged."""

    last: int = Field(ge=2, description="Number of snapshots of the weights; the last one follows the last step.")
    every: int = Field(ge=1, description="Optimizer steps between snapshots, counted back from the last step.")

    def steps(self, num_steps: int) -> list[int]:
        """Return the optimizer steps after which a training of `num_steps` takes its snapshots.

        Raises `InputError` if there are too few.

        >>> SnapshotSettings(last=3, every=2).steps(10)
        [6, 8, 10]
        """
        needed = (self.last - 1) * self.every + 1
        if num_steps < needed:
            raise InputError(
                f"{self.last} snapshots, one every {self.every} steps, need {needed} optimizer steps, and there are "
                f"{num_steps}; use fewer snapshots or a smaller interval"
            )
        return list(range(num_steps - needed + 1, num_steps + 1, self.every))
