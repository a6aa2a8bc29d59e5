"""GGUF files: the model that a `gguf:FILE` path names, dequantized to fp32."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, modeling_gguf_pytorch_utils

from align.models.loading.files import check_loaded
from align.models.loading.origin import remove_randomness, set_origin
from align.models.settings import GGUF

READ_AS_LLAMA = ("mistral",)  # the same weights; GGUF files have no name of their own for it


def load_gguf(file: Path, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """Load a GGUF file as a causal language model in fp32; `config` replaces what the file says of it.

    The weights are copied to a new model, because transformers marks the loaded one as quantized and cannot save it.
    Raises `InputError` for a file with more weights than the model, or with fewer.
    """
    auto: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False, "dtype": torch.float32}
    if config is not None and config.model_type not in READ_AS_LLAMA:
        options["config"] = config
    with read_once():
        loaded, info = auto.from_pretrained(str(file.parent), output_loading_info=True, **options)
        unused = _unused(file, loaded.config)
    check_loaded(f"{GGUF}{file}", info["missing_keys"], [*info["unexpected_keys"], *unused])
    values = loaded.config.to_dict()
    plain = {key: value for key, value in values.items() if key not in ("quantization_config", "_name_or_path")}
    new: PretrainedConfig = type(loaded.config).from_dict(plain) if config is None else config
    origin = remove_randomness(new)._replace(dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(new, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.name_or_path = f"{GGUF}{file}"  # recorded as the base of adapters that are saved without it
    return set_origin(model, origin)


@contextmanager
def read_once() -> Generator[None]:
    """Parse the file and the table of its tensors' names once; transformers does so several times, for seconds each.

    Show no progress bar of the tensors, which transformers' own switch leaves on.
    """
    hf: Any = modeling_gguf_pytorch_utils
    replaced: dict[tuple[Any, str], Any] = {
        (hf, "tqdm"): partial(hf.tqdm, disable=True),
        (gguf, "GGUFReader"): cache(gguf.GGUFReader),
        (gguf, "get_tensor_name_map"): cache(gguf.get_tensor_name_map),
    }
    before = {place: getattr(*place) for place in replaced}
    try:
        for place, value in replaced.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


def _unused(file: Path, config: PretrainedConfig) -> list[str]:
    """Return the weights of layers that the model lacks, which transformers skips silently."""
    layers = config.get_text_config().num_hidden_layers
    names = [str(tensor.name) for tensor in gguf.GGUFReader(str(file)).tensors]
    blocks = [(name, re.match(r"blk\.(\d+)\.", name)) for name in names]
    return [name for name, block in blocks if block and int(block[1]) >= layers]
