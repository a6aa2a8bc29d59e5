"""Folders of adapters: their base and configuration, and saving.

Stacked adapters are saved as one: B1 A1 + B2 A2 = [B1 B2] [A1; A2]. A folder therefore needs only its base, and any
library that loads LoRA loads the trained policy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from align.artifacts import read_json, write_json
from align.errors import InputError
from align.models.loading.errors import loading
from align.models.saving.weights import WHOLE, Gather
from align.models.settings import is_adapter
from align.models.weights import WrittenWeights, written_weights

ADAPTER_INFO = "made_of.json"  # in a folder of adapters: their base, its quantization, and the rank of each part
TRAINED, FROZEN = "default", "below"  # names in peft of the trained adapters and of the frozen ones under them


def load_adapter_config(path: str) -> LoraConfig:
    """Load the configuration of a folder's adapters; raise `InputError` if they are not LoRA."""
    with loading("adapters", path, "policy"):
        config = PeftConfig.from_pretrained(path)
    if not isinstance(config, LoraConfig):
        raise InputError(
            f"the adapters in {path!r} are of type {config.peft_type}; only LoRA is supported", ("policy",)
        )
    return config


def adapter_base(path: str) -> str:
    """Return the path or Hub ID of the model under a folder's adapters.

    If the recorded path does not exist, a folder of the same name next to this one is used: the run was moved.
    """
    base = str(load_adapter_config(path).base_model_name_or_path or "")
    moved = Path(path).resolve().parent / Path(base).name
    if Path(base).is_absolute() and not Path(base).exists() and moved.is_dir():
        base = str(moved)
    if not base:
        raise InputError(f"the adapters in {path!r} do not name their base model", ("policy",))
    if is_adapter(base):
        raise InputError(f"the base of the adapters in {path!r} is a folder of adapters too: {base!r}", ("policy",))
    return base


def base_quantization(path: str) -> str | None:
    """Return how the base of a folder's adapters was quantized during their training; None if it was not."""
    file = Path(path) / ADAPTER_INFO
    return cast("str | None", read_json(file).get("quantize")) if file.is_file() else None


def adapted_modules(model: PeftModel, *names: str) -> list[str]:
    """Return the names of the modules that have at least one of the named adapters."""
    modules = cast(Any, model.get_base_model()).named_modules()
    layers = [(name, module) for name, module in modules if isinstance(module, LoraLayer)]
    return sorted(name for name, layer in layers if adapters_on(layer) & set(names))


def adapters_on(layer: LoraLayer) -> set[str]:
    """Return the names of the adapters on a layer."""
    return {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}


def adapter_weights(hf: PeftModel, name: str = TRAINED) -> dict[str, Tensor]:
    """Return the weights of the named adapter, under the names that they have in a file; they may be sharded."""
    state = hf.state_dict(keep_vars=True)
    # The vocabulary is never resized; by default peft queries the Hub to find out
    return get_peft_model_state_dict(hf, state, adapter_name=name, save_embedding_layers=cast(Any, False))


def save_adapters(
    hf: PeftModel,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    gather: Gather = WHOLE,
) -> WrittenWeights:
    """Write the adapters without their base, stacked ones as one, and return what identifies their weights.

    `quantize` is the quantization of the base, which is recorded. If weights are sharded, every process calls it with a
    `gather`.
    """
    names = [name for name in (FROZEN, TRAINED) if name in hf.peft_config]
    parts = [_complete(adapter_weights(hf, name), gather) for name in names]
    return gather.on_main(lambda: _write(hf, folder, dict(zip(names, parts, strict=True)), dtype, quantize))


def _complete(weights: Mapping[str, Tensor], gather: Gather) -> dict[str, Tensor]:
    """Return copies of complete weights in main memory; none on a process that does not write."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        with gather.complete([value]) as (full,):
            if gather.is_main:
                found[name] = full.to("cpu", value.dtype, copy=True)
    return found


def _write(
    hf: PeftModel, folder: Path, weights: Mapping[str, dict[str, Tensor]], dtype: torch.dtype, quantize: str | None
) -> WrittenWeights:
    """Write complete weights of adapters, by name of the adapter."""
    names, parts = list(weights), list(weights.values())
    config = cast(LoraConfig, copy.copy(hf.peft_config[TRAINED]))
    ranks = [max(len(value) for key, value in part.items() if _is_lora_a(key)) for part in parts]
    if len(names) == 2:
        parts = [_concatenate(hf, parts, ranks)]
        config.r = config.lora_alpha = sum(ranks)  # scaling of 1; the matrices contain that of each part
        config.use_rslora = False
        config.rank_pattern = {}
        config.alpha_pattern = {}
        config.target_modules = adapted_modules(hf, *names)
    config.inference_mode = True
    for name, value in dict(vars(config)).items():
        if isinstance(value, set):  # the order of a set differs between processes
            setattr(config, name, sorted(cast("set[str]", value)))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.to(dtype).contiguous() for name, value in parts[0].items()}
    assert all(value.numel() for value in tensors.values()), "weights of a sharded model must be gathered"
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    info = {"base": config.base_model_name_or_path, "quantize": quantize}
    write_json(folder / ADAPTER_INFO, {**info, "rank": ranks[-1], "rank_below": sum(ranks[:-1])})
    return written_weights(tensors, dtype)


def _is_lora_a(key: str) -> bool:
    """Return whether the matrix is applied to the layer's input (lora_A, lora_embedding_A), unlike lora_B."""
    return key.partition(".lora_")[2].removesuffix(".weight").endswith("A")


def _concatenate(hf: PeftModel, parts: Sequence[Mapping[str, Tensor]], ranks: Sequence[int]) -> dict[str, Tensor]:
    """Return the matrices of one adapter that equals the sum of the frozen and the trained one, by saved name."""
    result: dict[str, Tensor] = {}
    for key in sorted({key for part in parts for key in part}):
        dim = 0 if _is_lora_a(key) else 1
        layer = cast(Any, hf.get_submodule(key.partition(".lora_")[0]))
        blocks: list[Tensor] = []
        for name, part, rank in zip((FROZEN, TRAINED), parts, ranks, strict=True):
            shape = list(next(each[key] for each in parts if key in each).shape)
            shape[dim] = rank  # zeros fill up a layer of lower rank, or one that has only the other adapter
            block = torch.zeros(shape)
            if key in part:
                factor = 1.0 if dim == 0 else layer.scaling[name]
                block.narrow(dim, 0, part[key].shape[dim]).copy_(part[key] * factor)
            blocks.append(block)
        result[key] = torch.cat(blocks, dim=dim)
    return result
