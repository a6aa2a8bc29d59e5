"""Linear layers in int8 by torchao: saved as safetensors, loaded by transformers, never trained; imports no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from align.errors import InputError, Location

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LIBRARY = "torchao"
Int8Method = Literal["int8", "int8_dynamic"]
# Method -> torchao's configuration: the weights of an output channel share a scale, and so do the activations of a
# token where they are rounded, too
CONFIGS = {"int8": "Int8WeightOnlyConfig", "int8_dynamic": "Int8DynamicActivationInt8WeightConfig"}


def check_torchao(loc: Location = ()) -> None:
    """Raise `InputError` if torchao is missing."""
    if find_spec(LIBRARY) is None:
        raise InputError('torchao, which computes in int8, is not installed: pip install -e ".[int8]"', loc)


def int8_options(method: Int8Method) -> dict[str, Any]:
    """Return the options of `from_pretrained` that quantize the linear layers, the LM head left out."""
    from transformers import TorchAoConfig  # noqa: PLC0415 - settings are checked without it

    check_torchao(("method",))
    return {"quantization_config": TorchAoConfig(_configuration(method))}


def quantize_linear(model: PreTrainedModel, method: Int8Method) -> None:
    """Quantize the linear layers of a loaded model in place, as the stage `quantize` does; the LM head is left out."""
    from torch import nn  # noqa: PLC0415

    library: Any = import_module("torchao.quantization")  # optional
    head = model.get_output_embeddings()

    def is_quantized(module: object, _: str) -> bool:
        return isinstance(module, nn.Linear) and module is not head

    library.quantize_(model, _configuration(method), filter_fn=is_quantized)


def _configuration(method: Int8Method) -> object:
    library: Any = import_module("torchao.quantization")  # optional
    return getattr(library, CONFIGS[method])()


def is_int8(config: PretrainedConfig) -> bool:
    """Return whether a saved model's weights are in int8 by torchao."""
    found: Any = getattr(config, "quantization_config", None) or {}
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    kind = (values.get("quant_type") or {}).get("default") or {}
    return values.get("quant_method") == LIBRARY and kind.get("_type") in CONFIGS.values()


def check_trainable(model: PreTrainedModel) -> None:
    """Raise `InputError` for weights in int8, which are neither trained nor saved in another form."""
    if is_int8(model.config):
        message = "its weights are in int8, and can only be evaluated; start from the policy that was quantized"
        raise InputError(message, ("policy",))
