"""A base in 4 bits under adapters (QLoRA, Dettmers et al. 2023), loaded by bitsandbytes.

The weights of linear layers are NF4 with quantized scales; embeddings, norms and the LM head stay in fp32.
"""

from __future__ import annotations

import os
import types
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from align.errors import InputError, one_line

NF4 = "nf4"
BLOCK = 64  # weights that share a scale (Dettmers et al. 2023, sec. 3)
LOC = ("policy", "quantize")


def quantization_options() -> dict[str, Any]:
    """Return the options of `from_pretrained` that load a model in 4 bits onto this process's device.

    Raises `InputError` if bitsandbytes is missing or finds no device, and under ZeRO-3 initialization or FSDP.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError("bitsandbytes is not installed: pip install bitsandbytes", LOC)
    if is_deepspeed_zero3_enabled():  # transformers then creates layers without a device, which bitsandbytes needs
        raise InputError(
            "weights in 4 bits cannot be partitioned while they are loaded; set zero3_init_flag to false in the launch "
            "file, so that ZeRO-3 partitions them afterwards",
            LOC,
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError("FSDP does not shard weights in 4 bits; launch with DDP or ZeRO", LOC)
    try:
        with warnings.catch_warnings():  # deprecations between libraries
            warnings.simplefilter("ignore", DeprecationWarning)
            # Importable only where bitsandbytes is installed
            integration: Any = import_module("transformers.integrations.bitsandbytes")
            integration.validate_bnb_backend_availability(raise_exception=True)
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(f"bitsandbytes finds no usable device: {one_line(error)[:200]}", LOC) from error
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=NF4, bnb_4bit_use_double_quant=True)
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether the linear layers of the model are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def patch_quantized_layers(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Make the 4-bit layers compute in the dtype of their input or of autocast, in training and evaluation.

    In evaluation mode bitsandbytes repacks the weights for CPUs with AVX512-BF16, which fails for widths that are not a
    multiple of 64 and rounds differently. It also multiplies in its own dtype instead of autocast's and permanently
    rounds biases to it. Raises `InputError` for layers that bitsandbytes does not compute correctly.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "quant_state")]
    if any(issubclass(layer.source_cls, Conv1D) for layer in layers):  # replaced by linear layers, transposed
        raise InputError(f"{path!r} has Conv1D layers (as GPT-2), and only linear layers can be quantized", LOC)
    widths = {layer.in_features for layer in layers if layer.weight.device.type == "cpu"}
    if odd := sorted(width for width in widths if width % BLOCK):  # bitsandbytes 0.50.2 mixes up the rows' scales
        raise InputError(
            f"on a CPU bitsandbytes supports only layers whose number of inputs is a multiple of {BLOCK}; {path!r} has "
            f"layers of {odd[0]}",
            LOC,
        )
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return model


def _forward(self: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - a layer of bitsandbytes, an optional dependency
    library: Any = import_module("bitsandbytes")  # optional
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = None if self.bias is None else self.bias.to(dtype)
    return library.matmul_4bit(x.to(dtype), self.weight, bias=bias, quant_state=self.weight.quant_state)


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with its 4-bit layers replaced by linear layers in fp32 of the same values, all trainable."""
    return cast(PreTrainedModel, model.dequantize(dtype=torch.float32)).requires_grad_(True)
