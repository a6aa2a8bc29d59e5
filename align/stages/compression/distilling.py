"""Work of the stage `distill`."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.errors import InputError
from align.models.loading.config import dimensions, load_config
from align.models.policy import Policy, load_policy
from align.models.settings import PolicySettings
from align.stages.inputs.context import RunContext
from align.stages.training.contract import TrainingSettings
from align.stages.training.policy_training import prepare
from align.train.distillation.objective import DistillationObjective
from align.train.distillation.settings import DistillationSettings
from align.train.distillation.teacher import TEACHER
from align.train.training_run import Teacher


def distill(step: TrainingSettings, teacher: str, loss: DistillationSettings, context: RunContext) -> dict[str, Any]:
    """Train the student, write it, and return what the manifest says of it."""
    path = str(context.inputs.folders[teacher])

    def make_teacher(tokenizer: PreTrainedTokenizerBase) -> Teacher:
        return Teacher(partial(_load, path, tokenizer), loss.top_k, dimensions(load_config(path)))

    training = prepare(step, DistillationObjective(loss), context, make_teacher)
    return training.save(context.folder, training.loop.run())


def _load(path: str, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Load the teacher, its adapters merged; raise `InputError` unless it reads the same tokens."""
    policy, own = load_policy(PolicySettings(path=path))
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError("the teacher has another tokenizer than the student; name a policy with the same", TEACHER)
    return policy.eval()
