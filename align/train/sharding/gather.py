"""The trained model with complete weights, to be saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

from align.distributed.processes import Processes
from align.models.backbone import Backbone
from align.train.sharding.replicated import Replicated

B = TypeVar("B", bound=Backbone)


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
        for name, value in sharding.full_parameters():
            if model is not None:
                parameters[name].copy_(value)
    return cast(B, model)
