"""Models of steps: import, tokenizers trained on the spot, and a trained model saved from several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.artifacts import discard_attempt
from align.data.chat_templates import apply_template
from align.data.tokenizer import train_tokenizer
from align.models.backbone import Backbone
from align.models.loading.config import build_config, dimensions, load_config
from align.models.loading.pretrained import silence_transformers
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.saving.comparison import compare_saved, model_outputs, random_groups
from align.models.settings import PolicySettings
from align.procedural import tasks
from align.stages.costs.measured import Done
from align.stages.inputs.context import ModelSpec, RunContext

B = TypeVar("B", bound=Backbone)


def import_policy(spec: ModelSpec, context: RunContext) -> dict[str, Any]:
    """Write a policy as a plain folder, with a tokenizer trained for it where `spec` asks for one."""
    silence_transformers()
    discard_attempt(context.folder)
    settings = with_tokenizer(spec, context.folder)
    policy, tokenizer = load_policy(settings)
    apply_template(tokenizer)
    expected = model_outputs(policy, random_groups(len(tokenizer)))
    written = save_policy(policy, tokenizer, context.folder, dtype=settings.save_dtype)
    saved, _ = load_policy(PolicySettings(path=str(context.folder)))
    compare_saved(saved, expected, written=written, folder=context.folder)
    weights = sum(value.numel() for value in policy.parameters())
    done = Done(dimensions=dimensions(policy.base.config), weights=weights)
    return {"weights": weights, "tokens": len(tokenizer), "done": done}


def with_tokenizer(spec: ModelSpec, folder: Path) -> PolicySettings:
    """Return the settings with a tokenizer trained into `folder`, where `spec` asks for one."""
    settings = spec.settings
    if spec.vocab_size is None:
        return settings
    tokenizer = train_tokenizer(tasks.corpus(), vocab_size=spec.vocab_size, chat_template="")
    apply_template(tokenizer, settings.chat_template or "chatml")
    tokenizer.save_pretrained(str(folder))
    config = settings.from_config
    if config is not None:  # the new model gets the tokenizer's size and special tokens
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = {"vocab_size": len(tokenizer), **ids, **config}
    return settings.model_copy(update={"tokenizer": str(folder), "from_config": config, "chat_template": None})


def planned_tokenizer(spec: ModelSpec, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a step will use, with its chat template, before any step has run."""
    settings = with_tokenizer(spec, folder)
    tokenizer = load_tokenizer(settings)
    apply_template(tokenizer)
    return tokenizer


def planned_config(spec: ModelSpec, vocab_size: int) -> PretrainedConfig:
    """Return the configuration of the model that a step starts from or asks, before any step has run."""
    settings = spec.settings
    if settings.from_config is not None:
        return build_config({"vocab_size": vocab_size, **settings.from_config})
    return load_config(str(settings.path))
