"""Complete weights of a trained model, to be saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from torch import Tensor

from align.distributed.processes import Processes
from align.models.saving.weights import Gather
from align.train.sharding.replicated import Replicated

T = TypeVar("T")


class ShardedGather(Gather):
    """Gathers sharded weights for the main process, which writes them."""

    def __init__(self, sharding: Replicated, processes: Processes) -> None:
        self._sharding = sharding
        self._processes = processes
        self.is_main = processes.is_main

    def on_main(self, work: Callable[[], T]) -> T:
        """Run work on the main process and return its result on every process."""
        return self._processes.run_on_main(work, "writing the model")

    def complete(self, values: Sequence[Tensor]) -> AbstractContextManager[Sequence[Tensor]]:
        """Return a context with complete parameters and buffers."""
        return self._sharding.complete(values)
