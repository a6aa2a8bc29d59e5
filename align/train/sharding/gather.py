"""The trained model with complete weights, to be saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar, cast

import torch
from torch import Tensor

from align.distributed.processes import Processes
from align.models.backbone import Backbone
from align.models.saving.weights import Gather
from align.train.sharding.replicated import Replicated

B = TypeVar("B", bound=Backbone)
T = TypeVar("T")


class ShardedGather(Gather):
    """Gathers sharded weights for the main process, which writes them."""

    def __init__(self, sharding: Replicated, processes: Processes) -> None:
        self._sharding, self._processes, self.is_main = sharding, processes, processes.is_main

    def on_main(self, work: Callable[[], T]) -> T:
        """Run work on the main process and return its result on every process."""
        return self._processes.run_on_main(work, "writing the model")

    def complete(self, values: Sequence[Tensor]) -> AbstractContextManager[Sequence[Tensor]]:
        """Return a context with complete parameters and buffers."""
        return self._sharding.complete(values)


def complete_model(sharding: Replicated, processes: Processes, load: Callable[[], B]) -> B:
    """Return the trained model with complete weights on the main process; all processes call it together.

    If weights are complete only while a layer runs, the main process loads the untrained model again with `load`, into
    main memory, and the trained weights are copied into it. On the other processes the result is then None.
    """
    if not sharding.gathers_per_layer:
        return cast(B, sharding.policy)
    model = processes.run_on_all(lambda: load() if processes.is_main else None, "loading the model to save it")
    parameters = {} if model is None else dict(model.named_parameters())
    with torch.no_grad():
        for name, value in sharding.policy.named_parameters():
            if value.requires_grad:
                with sharding.complete([value]) as (full,):
                    if model is not None:
                        parameters[name].copy_(full)
    return cast(B, model)
