"""A base in 4 bits under adapters (QLoRA, Dettmers et al. 2023), loaded by bitsandbytes.

The weights of linear layers are NF4 with quantised scales; embeddings, norms and the LM head stay in fp32.
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


def quantization() -> dict[str, Any]:
    """What `from_pretrained` needs to load a model in 4 bits onto this process's device."""
    if find_spec("bitsandbytes") is None:
        raise InputError("policy.quantize: bitsandbytes is not installed; pip install 'align[qlora]'")
    if is_deepspeed_zero3_enabled():  # transformers then makes layers without a device, and bitsandbytes needs one
        raise InputError(
            "policy.quantize: weights in 4 bits cannot be shared out as they are read; set zero3_init_flag to false in "
            "the launch file, and ZeRO-3 does so afterwards"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError("policy.quantize: FSDP cuts no weights in 4 bits; launch DDP or ZeRO")
    try:
        with warnings.catch_warnings():  # of the libraries to each other
            warnings.simplefilter("ignore", DeprecationWarning)
            # There is no module of transformers that could be imported without bitsandbytes.
            integration: Any = import_module("transformers.integrations.bitsandbytes")
            integration.validate_bnb_backend_availability(raise_exception=True)
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(f"policy.quantize: bitsandbytes finds no device here: {one_line(error)[:200]}") from error
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=NF4, bnb_4bit_use_double_quant=True)
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model's linear layers are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def steady(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The model, whose products depend on their input and on autocast as those of plain linear layers do.

    In evaluation bitsandbytes packs the weights anew for a CPU with AVX512-BF16, where it fails for widths that are no
    multiple of 64 and rounds elsewhere; it takes its own type for the product, not autocast's, and rounds biases to it
    for good.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "quant_state")]
    if any(issubclass(layer.source_cls, Conv1D) for layer in layers):  # they come back as linear layers, turned round
        raise InputError(f"policy.quantize: {path!r} is made of Conv1D layers, as GPT-2 is, and not of linear ones")
    widths = {layer.in_features for layer in layers if layer.weight.device.type == "cpu"}
    if odd := sorted(width for width in widths if width % BLOCK):  # seen in 0.50.2: scales of one row taken for another
        raise InputError(
            f"policy.quantize: on a CPU bitsandbytes reads layers of {odd[0]} inputs wrongly, which {path!r} has; only "
            f"multiples of {BLOCK} are right"
        )
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return model


def _forward(self: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - bitsandbytes' layer, which is not always there
    library: Any = import_module("bitsandbytes")  # optional
    kind = x.device.type
    exact = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = None if self.bias is None else self.bias.to(exact)
    return library.matmul_4bit(x.to(exact), self.weight, bias=bias, quant_state=self.weight.quant_state)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as plain linear layers in fp32, with the values that the 4 bits stand for."""
    return cast(PreTrainedModel, model.dequantize(dtype=torch.float32)).requires_grad_(True)
