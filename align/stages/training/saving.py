"""Saving of a step's trained model, and the comparison of the saved model with the trained one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.models.backbone import Backbone
from align.models.loading.int8 import check_trainable
from align.models.loading.pretrained import load_pretrained
from align.models.policy import Policy, load_policy
from align.models.saving.comparison import compare_saved
from align.models.saving.folder import check_saveable
from align.models.saving.weights import WHOLE, Gather
from align.models.settings import LoraSettings, PolicySettings
from align.models.weights import WrittenWeights
from align.train.loop import Loop
from align.train.resuming import keep_checkpoint
from align.train.sharding.gather import ShardedGather
from align.train.training_run import TrainingResult

B = TypeVar("B", bound=Backbone)


def save_trained(
    loop: Loop,
    result: TrainingResult,
    folder: Path,
    *,
    save: Callable[[B, Gather], WrittenWeights],
    load_saved: Callable[[torch.dtype], Backbone],
) -> dict[str, Any]:
    """Save the trained model, compare what is on disk with it, and return what the manifest says of that.

    All processes call it together. `save` writes the trained model and returns its weights, `load_saved` loads what was
    written in a dtype. If anything fails, a checkpoint keeps the weights.

    Under ZeRO-3 and FSDP2 no process holds a complete model: weights are gathered, and adapters merged, a few at a
    time, and those that were written are loaded in the dtype of the files, from which they are mapped.
    """
    loop.checkpointer.save_trained(result.metrics)
    if loop.training_run.settings.until_step is not None and result.metrics:
        loop.processes.run_on_main(lambda: keep_checkpoint(folder), "keeping the checkpoint")
    expected = loop.outputs()
    loop.sharding.reshard()
    trained = cast(B, loop.policy)
    if loop.sharding.gathers_per_layer:
        written = save(trained, ShardedGather(loop.sharding, loop.processes))
        dtype = written.dtype
    else:
        written = loop.processes.run_on_main(partial(save, trained, WHOLE), "writing the model")
        dtype = torch.float32
    difference = loop.processes.run_on_main(
        lambda: compare_saved(load_saved(dtype), expected, written=written, folder=folder), "comparing the saved model"
    )
    return {"saved": {"max_difference": difference, "rows": len(expected.sequences)}}


def check_before_training(
    model: Backbone, tokenizer: PreTrainedTokenizerBase, processes: Processes, progress: Progress
) -> None:
    """Raise for whatever a save would refuse after the training, and report what it will leave out."""
    check_trainable(model.base)
    activity = "checking that the model can be saved"
    if left_out := processes.run_on_main(lambda: check_saveable(model, tokenizer), activity):
        names = ", ".join(left_out)
        progress.note(
            f"generation_config.json: the saved model will lack {names}, which have no effect as they are set"
        )


def load_saved_policy(folder: Path, settings: PolicySettings, dtype: torch.dtype) -> Backbone:
    """Load the policy that a step with these settings has written to a folder; adapters in fp32."""
    if settings.lora is None or settings.lora.merge:
        return Policy(load_pretrained(str(folder), AutoModelForCausalLM, dtype=dtype))
    lora = LoraSettings(adapters="continued")
    return load_policy(PolicySettings(path=str(folder), lora=lora, quantize=settings.quantize))[0]
