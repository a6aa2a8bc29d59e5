"""GGUF files: the model that a `gguf:FILE` path names, dequantized to fp32."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, modeling_gguf_pytorch_utils

from align.models.loading.files import check_loaded
from align.models.loading.origin import remove_randomness, set_origin
from align.models.settings import GGUF


def load_gguf(file: Path) -> PreTrainedModel:
    """Load a GGUF file as a causal language model in fp32.

    The weights are copied to a new model, because transformers marks the loaded one as quantized and cannot save it.
    Raises `InputError` for a file with more weights than the model, or with fewer.
    """
    auto: Any = AutoModelForCausalLM
    options = {"gguf_file": file.name, "trust_remote_code": False, "dtype": torch.float32}
    with _without_bar():
        loaded, info = auto.from_pretrained(str(file.parent), output_loading_info=True, **options)
    check_loaded(f"{GGUF}{file}", info["missing_keys"], [*info["unexpected_keys"], *_unused(file, loaded.config)])
    values = loaded.config.to_dict()
    plain = {key: value for key, value in values.items() if key not in ("quantization_config", "_name_or_path")}
    config = type(loaded.config).from_dict(plain)
    origin = remove_randomness(config)._replace(dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.name_or_path = f"{GGUF}{file}"  # recorded as the base of adapters that are saved without it
    return set_origin(model, origin)


@contextmanager
def _without_bar() -> Generator[None]:
    """Show no progress bar of the tensors, which transformers' own switch leaves on."""
    module: Any = modeling_gguf_pytorch_utils
    before = module.tqdm
    module.tqdm = partial(before, disable=True)
    try:
        yield
    finally:
        module.tqdm = before


def _unused(file: Path, config: PretrainedConfig) -> list[str]:
    """Return the weights of layers that the model lacks, which transformers skips silently."""
    layers = config.get_text_config().num_hidden_layers
    names = [str(tensor.name) for tensor in GGUFReader(file).tensors]
    blocks = [(name, re.match(r"blk\.(\d+)\.", name)) for name in names]
    return [name for name, block in blocks if block and int(block[1]) >= layers]
