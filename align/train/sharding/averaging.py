"""The mean of the weights after the last optimizer steps of a run (checkpoint averaging, as in WSM).

Each process averages its own shards in fp32, one optimizer step after the other, and checkpoints store the average as
they store moments. It is a running mean, m += (w - m) / k, of which the mean of equal weights is exact; a sum of three
equal fp32 numbers may be rounded, so that a third of it is another number.

bf16_master averages the fp32 master weights and rounds the mean once; bf16_stochastic averages its bf16 weights and
rounds their mean to the nearest bf16 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel

from align.distributed.progress import Progress
from align.errors import InputError
from align.train.sharding.replicated import WEIGHT, Replicated
from align.train.sharding.snapshots import ADAPTERS


class WeightAverage:
    """Averages the trained weights after the given optimizer steps, the last of which ends the run.

    Without steps it does nothing. Adapters are refused: the mean of their factors is not the mean of their products.
    """

    def __init__(self, sharding: Replicated, steps: Sequence[int], progress: Progress) -> None:
        self.steps, self._sharding, self._progress = steps, sharding, progress
        if not steps:
            return
        if isinstance(sharding.policy.hf, PeftModel):
            raise InputError(ADAPTERS, ("train", "average"))
        # Allocated before the first step, so that too little memory is found then and not at the end of the training
        sharding.averages = {
            shard.name: shard.values[WEIGHT].to(torch.float32, copy=True) for shard in sharding.shards(moments=False)
        }

    @torch.no_grad()
    def add(self, step: int) -> dict[str, float]:
        """Add the weights if they are averaged after this step, and replace them by the mean after the last one.

        Returns the number of averaged weights as a metric.
        """
        if step not in self.steps:
            return {}
        sharding = self._sharding
        count = self.steps.index(step) + 1
        sharding.is_averaging = True
        for shard in sharding.shards(moments=False):
            weight, mean = shard.values[WEIGHT], sharding.averages[shard.name]
            if count == 1:
                mean.copy_(weight)
            else:
                mean.add_((weight - mean).div_(count))
            if count == len(self.steps):
                weight.copy_(mean)
        if count == len(self.steps):
            sharding.sync_model()
            steps = ", ".join(map(str, self.steps))
            self._progress.note(f"the weights are now the mean of those after steps {steps}")
        return {"averaged_snapshots": count}
