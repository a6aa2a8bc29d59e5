"""Tokenizers of policies and reward models."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from align.data.chat_templates import apply_template
from align.errors import InputError
from align.models.loading.config import gguf_file
from align.models.loading.errors import loading
from align.models.settings import GGUF, PolicySettings

LOADED_HOW = ("local_files_only", "is_local")  # transformers saves them: HF_HUB_OFFLINE would change the saved files
TOKENIZER_CONFIG = "tokenizer_config.json"
CLASS = "align_declared_class"  # attribute of a tokenizer


def load_tokenizer(settings: PolicySettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the settings, with the chat template that they name, without loading the model."""
    source = settings.tokenizer or settings.path
    if source is None:
        raise InputError("required with from_config: a folder or a Hub ID", ("policy", "tokenizer"))
    with loading("a tokenizer", source, "policy"):
        if source.startswith(GGUF):
            file = gguf_file(source)
            folder = str(file.parent)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            setattr(tokenizer, CLASS, get_tokenizer_config(source).get("tokenizer_class"))
    for name in LOADED_HOW:
        tokenizer.init_kwargs.pop(name, None)
    if settings.chat_template is not None:
        apply_template(tokenizer, settings.chat_template)
    return tokenizer


def declared_class(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the class that the tokenizer's own files name; transformers saves the class that it loaded instead."""
    name: Any = getattr(tokenizer, CLASS, None)
    return name if isinstance(name, str) else None


def load_tokenizer_for(model: PreTrainedModel, settings: PolicySettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the settings; raise `InputError` if the model has fewer embeddings than it has tokens."""
    tokenizer = load_tokenizer(settings)
    num_embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > num_embeddings:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {num_embeddings} embeddings", ("policy",)
        )
    return tokenizer
