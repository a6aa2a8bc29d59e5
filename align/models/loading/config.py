"""Model configurations: loaded, or built from values."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from align.accounting.flops import Decoder, decoder_from_config
from align.errors import InputError, one_line
from align.models.adapters.files import adapter_base
from align.models.loading.errors import LOAD_ERRORS, MAX_SHOWN, loading
from align.models.settings import GGUF, is_adapter
from align.registry import suggest

FROM_CONFIG = ("policy", "from_config")
# Keys that configurations accept in addition to their own fields
_EXTRA_KEYS = {"model_type", "rope_theta", "rope_scaling"}


def load_config(path: str) -> PretrainedConfig:
    """Load the configuration of a Hub ID, a folder or a GGUF file; for a folder of adapters, that of their base."""
    source = adapter_base(path) if is_adapter(path) else path
    with loading("a model", source, "policy"):
        if source.startswith(GGUF):
            file = gguf_file(source)
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def build_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """Return the configuration with these values; `model_type` names the architecture.

    Raises `InputError` for an unknown architecture or key.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise InputError("a transformers architecture is required, such as llama", (*FROM_CONFIG, "model_type"))
    if kind not in CONFIG_MAPPING:
        hint = suggest(kind, CONFIG_MAPPING.keys())[:200]
        raise InputError(f"unknown architecture {kind!r}; {hint}", (*FROM_CONFIG, "model_type"))
    config_type = CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(config_type)}
    known = fields | config_type.attribute_map.keys() | _EXTRA_KEYS
    if unknown := sorted(values.keys() - known):
        raise InputError(f"unknown key of {kind}; {suggest(unknown[0], known)}", (*FROM_CONFIG, unknown[0]))
    try:
        return AutoConfig.for_model(**values)
    except LOAD_ERRORS as error:
        raise InputError(one_line(error)[:MAX_SHOWN], FROM_CONFIG) from error


def is_sequence_classifier(config: PretrainedConfig) -> bool:
    """Return whether the configuration was saved with a sequence classifier, as that of a reward model is."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def max_positions(config: PretrainedConfig) -> int | None:
    """Return the maximum sequence length in tokens, or None if the configuration has none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def gguf_file(path: str) -> Path:
    """Return the file of a `gguf:FILE` path; raise `InputError` if it does not exist."""
    file = Path(path.removeprefix(GGUF)).expanduser()
    if not os.path.isfile(file):  # unlike Path.is_file it also answers for names that are no paths
        raise InputError(f"no such GGUF file: {str(file)[:MAX_SHOWN]}", ("policy",))
    return file


def dimensions(config: PretrainedConfig) -> Decoder | str:
    """Return the dimensions that a model's cost depends on, or why they are unknown."""
    try:
        return decoder_from_config(config.to_dict())
    except InputError as error:
        return str(error)
