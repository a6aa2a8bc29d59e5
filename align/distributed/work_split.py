"""Items split over the processes of a launch, each of which holds a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:  # imports torch
    from align.distributed.processes import Processes

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class WorkShard:
    """The items of one process: every `num_shards`-th item, starting with number `index`."""

    index: int = 0
    num_shards: int = 1

    @classmethod
    def of(cls, processes: Processes) -> Self:
        """Return the shard of this process."""
        return cls(processes.rank, processes.world_size)

    def contains(self, position: int) -> bool:
        """Return whether the item at this position belongs to the shard."""
        return position % self.num_shards == self.index

    def select(self, items: Sequence[T]) -> list[T]:
        """Return the items of the shard in their order."""
        return [item for position, item in enumerate(items) if self.contains(position)]


def split_work(
    items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]], *, processes: Processes, activity: str
) -> list[R]:
    """Run the work on each process's shard and return the results of all items, in their order, on every process."""
    shard = WorkShard.of(processes)
    results = processes.run_on_all(lambda: list(work(shard.select(items))), activity)
    shards = [iter(part) for part in processes.all_gather_object(results)]
    return [next(shards[position % processes.world_size]) for position in range(len(items))]
