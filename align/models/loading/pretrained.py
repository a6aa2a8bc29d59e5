"""Weights: a causal language model from a Hub ID, a folder, a GGUF file or a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from align.artifacts import check_not_removed
from align.errors import InputError, one_line
from align.models.adapters.files import adapter_base, base_quantization
from align.models.loading.config import (
    FROM_CONFIG,
    build_config,
    gguf_file,
    is_sequence_classifier,
    max_positions,
)
from align.models.loading.errors import LOAD_ERRORS, MAX_SHOWN, loading
from align.models.loading.files import check_loaded, check_weight_index, load_generation_config
from align.models.loading.gguf import load_gguf
from align.models.loading.int8 import check_torchao, is_int8
from align.models.loading.origin import remove_randomness, set_origin
from align.models.loading.quantization import dequantize, patch_quantized_layers, quantization_options
from align.models.loading.seeding import seeded
from align.models.loading.shards import hold_shards, reading_shards
from align.models.settings import GGUF, PolicySettings, exported_gguf, is_adapter

QUANTIZE = ("policy", "quantize")


def load_base(settings: PolicySettings) -> PreTrainedModel:
    """Load the causal language model in fp32 without dropout; for a folder of adapters, their base.

    With `quantize` the linear layers are in 4 bits instead. Raises `InputError` if the settings name no model or two,
    or if it cannot be loaded.
    """
    if (settings.path is None) == (settings.from_config is None):
        raise InputError("give either path (Hub ID, folder or gguf:FILE) or from_config (a configuration)", ("policy",))
    if settings.from_config is not None:
        if settings.quantize:
            raise InputError("a randomly initialized model cannot be quantized; import it in a step first", QUANTIZE)
        return _initialize(settings.from_config, settings.seed)
    path = str(settings.path)
    if not is_adapter(path):
        return _load(path, settings.quantize)
    check_not_removed(path)
    base_quantize = _quantization_of_base(path, settings)
    model = _load(adapter_base(path), base_quantize)
    # Stop tokens may have been set when the adapters were trained
    model.generation_config = load_generation_config(path) or model.generation_config
    return dequantize(model) if base_quantize and not settings.quantize else model


def load_pretrained(
    path: str, auto_class: type[Any], *, quantize: Literal["nf4"] | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a folder or Hub ID with one of transformers' Auto classes, without dropout; shards, if `load_shards` asks.

    Raises `InputError` if weights are missing or were removed, if the model does not use all, or if they are quantized.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    options |= quantization_options() if quantize else {}
    check_not_removed(path)
    check_weight_index(path)
    generation_config = load_generation_config(path)
    with loading("a model", path, "policy"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        origin = remove_randomness(config)
        if auto_class is AutoModelForCausalLM and is_sequence_classifier(config):
            raise InputError(f"{path!r} is a reward model, not a policy", ("policy",))
        if quantize and getattr(config, "quantization_config", None):
            raise _already_quantized(path)
        if is_int8(config):
            check_torchao(("policy",))
        if (limit := max_positions(config)) is not None and limit < 1:
            raise InputError(f"{path!r}: max_position_embeddings is {limit}, so no sequence fits", ("policy",))
        with nullcontext() if quantize or is_int8(config) else reading_shards():
            loaded: Any = auto_class.from_pretrained(path, output_loading_info=True, config=config, **options)
    model, info = loaded
    check_loaded(path, info["missing_keys"], info["unexpected_keys"])
    if generation_config is not None and model.can_generate():
        model.generation_config = generation_config
    set_origin(model, origin)
    if quantize:
        return patch_quantized_layers(model, path)
    if is_int8(config):
        return model.requires_grad_(False)
    # Quantized weights would silently not be trained
    if not all(value.is_floating_point() for value in model.parameters()):
        raise _already_quantized(path)
    hold_shards(model)
    return model


def count_weights(config: PretrainedConfig) -> int:
    """Return the number of weights of a causal language model, shared ones once, without allocating them."""
    with torch.device("meta"), loading("a model", str(config.model_type), "policy"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(value.numel() for value in model.parameters())


def default_device() -> Literal["cpu", "cuda"]:
    """Return the device for a model that no accelerator places: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def silence_transformers() -> None:
    """Turn off transformers' progress bars and warnings; `align` reports what matters."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _load(path: str, quantize: Literal["nf4"] | None) -> PreTrainedModel:
    """Load the causal language model of a Hub ID, a folder or a GGUF file."""
    exported = None if path.startswith(GGUF) else exported_gguf(path)
    if exported is None and not path.startswith(GGUF):
        return load_pretrained(path, AutoModelForCausalLM, quantize=quantize)
    if quantize:
        raise InputError(f"{path} is already quantized; give a Hub ID or a folder in full precision", QUANTIZE)
    with loading("a model", path, "policy"):
        if exported is None:
            return load_gguf(gguf_file(path))
        check_not_removed(path)
        model = load_gguf(gguf_file(exported), AutoConfig.from_pretrained(path, trust_remote_code=False))
        model.generation_config = load_generation_config(path) or model.generation_config
        return model


def _quantization_of_base(path: str, settings: PolicySettings) -> Literal["nf4"] | None:
    """Return the quantization of the base under a folder's adapters.

    Raises `InputError` if the adapters would be trained further on a base that is quantized differently.
    """
    base_quantize = base_quantization(path)
    if base_quantize not in (None, "nf4"):
        raise InputError(f"unknown quantization {base_quantize!r} of the base of {path}; known: nf4", ("policy",))
    keeps_adapters = settings.lora is not None and not settings.lora.merge
    if (keeps_adapters or settings.quantize) and base_quantize != settings.quantize:
        trained_on = "an nf4 base; set nf4" if base_quantize else "a base in full precision; remove this setting"
        raise InputError(f"the adapters in {path} were trained on {trained_on}", QUANTIZE)
    return base_quantize


def _already_quantized(path: str) -> InputError:
    return InputError(
        f"the weights in {path!r} are already quantized; give the model in full precision and set policy.quantize",
        ("policy",),
    )


def _initialize(values: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """Return a model with random weights that depend on the configuration and the seed only."""
    config = build_config(values)
    origin = remove_randomness(config)
    try:
        with seeded(seed):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        return set_origin(model, origin)
    except LOAD_ERRORS as error:
        raise InputError(one_line(error)[:MAX_SHOWN], FROM_CONFIG) from error
