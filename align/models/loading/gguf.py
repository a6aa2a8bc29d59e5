"""GGUF files: the model that a `gguf:FILE` path names, dequantized to fp32."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.models.loading.config import disable_dropout
from align.models.settings import GGUF


def load_gguf(file: Path) -> PreTrainedModel:
    """Load a GGUF file as a causal language model in fp32.

    The weights are copied to a new model, because transformers marks the loaded one as quantized and cannot save it.
    """
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    plain = {key: value for key, value in values.items() if key not in ("quantization_config", "_name_or_path")}
    model = AutoModelForCausalLM.from_config(disable_dropout(type(loaded.config).from_dict(plain)), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.name_or_path = f"{GGUF}{file}"  # recorded as the base of adapters that are saved without it
    return model
