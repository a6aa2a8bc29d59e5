"""Low-rank adapters on a policy: new ones, an earlier step's trained on, or frozen below new ones; and their folder.

Adapters that lie on each other are saved as one: the sum B1 A1 + B2 A2 is the product of [B1 B2] and [A1; A2]. So a
folder needs nothing but its base, and whatever loads LoRA loads the policy that was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.artifacts import read_json, write_json
from align.config import stable_hash
from align.errors import InputError, one_line
from align.models.settings import LoraSettings, is_adapter
from align.registry import suggest

T = TypeVar("T")
# What transformers and peft raise for files and configurations that they cannot make a model of.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError)
MADE_OF = "made_of.json"  # of a folder of adapters: their base, how it was quantised, and the rank of each part
LINEAR = (nn.Linear, LoraLayer)  # a layer without adapters, and one under them
TOP, BELOW = "default", "below"  # peft's names of what is trained, and of what stands still under it


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """The CPU's generator at `seed`, and as it was afterwards; no other device draws here."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def base_of(path: str) -> str:
    """The model under a folder's adapters; where it is gone, and a folder of its name is beside this one, that one."""
    base = str(_saved_config(path).base_model_name_or_path or "")
    moved = Path(path).resolve().parent / Path(base).name  # a run's folder has been moved as a whole
    if Path(base).is_absolute() and not Path(base).exists() and moved.is_dir():
        base = str(moved)
    if not base:
        raise InputError(f"policy: the adapters in {path!r} do not say which model they lie on")
    if is_adapter(base):
        raise InputError(f"policy: the adapters in {path!r} lie on other adapters, {base!r}, and not on a model")
    return base


def quantization_of(path: str) -> str | None:
    """How the model under a folder's adapters was quantised when they were trained; None where it was not."""
    file = Path(path) / MADE_OF
    return cast("str | None", read_json(file).get("quantize")) if file.is_file() else None


def new_adapters(model: PreTrainedModel, lora: LoraSettings, *, seed: int, task: str) -> PeftModel:
    """The model under new adapters, which change nothing yet.

    `task` is peft's word: a model that classifies trains its head whole.
    """
    if not (lora.merge or model.name_or_path):
        raise InputError(
            f"policy.lora.adapters: {lora.adapters!r} needs a base in a folder; import the fresh model first"
        )
    with seeded(seed):
        return _named(_asked(lambda: cast(PeftModel, get_peft_model(model, _new_config(model, lora, task)))))


def continued(model: PreTrainedModel, path: str, lora: LoraSettings) -> PeftModel:
    """The model under a folder's adapters, to be trained on; the settings may not ask for others."""
    made = _with_saved(model, path, TOP)
    config = cast(LoraConfig, made.peft_config[TOP])
    there: dict[str, Any] = {"rank": config.r, "alpha": config.lora_alpha}
    asked: dict[str, Any] = {"rank": lora.rank, "alpha": lora.alpha}
    if "targets" in lora.model_fields_set:
        there["targets"] = _adapted(made, TOP)
        _asked(lambda: made.add_adapter("asked", _new_config(model, lora, "CAUSAL_LM"), low_cpu_mem_usage=True))
        asked["targets"] = _adapted(made, "asked")
        made.delete_adapter("asked")
    for name in sorted(there.keys() & lora.model_fields_set):
        if there[name] != asked[name]:
            raise InputError(
                f"policy.lora.{name}: 'continued' trains the adapters in {path} on, and they have another: "
                f"{str(there[name])[:100]}; leave it out, or stack new ones on them"
            )
    return made


def stacked(model: PreTrainedModel, path: str, lora: LoraSettings, *, seed: int) -> PeftModel:
    """The model under a folder's adapters, which stand still, and under new ones, which change nothing yet."""
    made = _with_saved(model, path, BELOW)
    below = cast(LoraConfig, made.peft_config[BELOW])
    more = {"use_dora": below.use_dora, "bias": below.bias != "none", "modules_to_save": below.modules_to_save}
    if odd := [name for name, value in more.items() if value]:
        raise InputError(f"policy.lora.adapters: the adapters in {path} have {odd[0]}, and nothing is stacked on that")
    # New ones that began where those below once began would look into much the same directions.
    with seeded(int(stable_hash([seed, below.r])[:8], 16)):
        _asked(lambda: made.add_adapter(TOP, _new_config(model, lora, "CAUSAL_LM")))
    made.peft_config[TOP].base_model_name_or_path = below.base_model_name_or_path
    cast(Any, made.base_model).set_adapter([BELOW, TOP])
    made.set_requires_grad(BELOW, requires_grad=False)
    return made


def folded(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The model with a folder's adapters in its weights, which are trained where they were before."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    if any(hasattr(value, "ds_id") for value in model.parameters()):
        raise InputError(
            f"policy: the adapters in {path!r} cannot be folded into weights that ZeRO-3 shares out as they are read; "
            "import them in a step before, or set zero3_init_flag to false in the launch file"
        )
    made = cast(PreTrainedModel, cast(Any, _with_saved(model, path, TOP)).merge_and_unload())
    for name, value in made.named_parameters():
        value.requires_grad_(name in trained)
    return made


def save_adapters(
    hf: PeftModel, folder: Path, *, weights: Mapping[str, Tensor] | None = None, quantize: str | None = None
) -> None:
    """Write the adapters alone, as one, whatever lies on what; `weights` are those of a model that is sharded."""
    parts = [name for name in (BELOW, TOP) if name in hf.peft_config]
    # The vocabulary is never resized, and peft would ask the hub whether it was.
    options: Any = {"state_dict": weights, "save_embedding_layers": False}
    found = [get_peft_model_state_dict(hf, adapter_name=name, **options) for name in parts]
    config = cast(LoraConfig, copy.copy(hf.peft_config[TOP]))
    ranks = [max(len(value) for key, value in part.items() if _is_in(key)) for part in found]
    if len(parts) == 2:
        found = [_stacked_weights(hf, found, ranks)]
        config.r = config.lora_alpha = sum(ranks)  # a factor of 1: the matrices hold their own
        config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
        config.target_modules = _adapted(hf, *parts)
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in found[0].items()}
    assert all(value.numel() for value in tensors.values()), "of a sharded model, frozen adapters too come in full"
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    about = {"base": config.base_model_name_or_path, "quantize": quantize}
    write_json(folder / MADE_OF, {**about, "rank": ranks[-1], "rank_below": sum(ranks[:-1])})


def _is_in(key: str) -> bool:
    """Whether a matrix of this name takes a layer's input: lora_A, lora_embedding_A, and not lora_B."""
    return key.partition(".lora_")[2].removesuffix(".weight").endswith("A")


def _stacked_weights(hf: PeftModel, parts: Sequence[Mapping[str, Tensor]], ranks: Sequence[int]) -> dict[str, Tensor]:
    """The matrices whose products are the sums of two adapters', by their names in a folder."""
    made: dict[str, Tensor] = {}
    for key in sorted({key for part in parts for key in part}):
        dim = 0 if _is_in(key) else 1
        layer = cast(Any, hf.get_submodule(key.partition(".lora_")[0]))
        blocks: list[Tensor] = []
        for name, part, rank in zip((BELOW, TOP), parts, ranks, strict=True):
            shape = list(next(each[key] for each in parts if key in each).shape)
            shape[dim] = rank  # a layer of a lower rank, or one that only the other adapter is on, gets zeros
            block = torch.zeros(shape)
            if key in part:
                factor = 1.0 if dim == 0 else layer.scaling[name]
                block.narrow(dim, 0, part[key].shape[dim]).copy_(part[key].detach() * factor)
            blocks.append(block)
        made[key] = torch.cat(blocks, dim=dim)
    return made


def _new_config(model: PreTrainedModel, lora: LoraSettings, task: str) -> LoraConfig:
    layers = dict(model.named_modules())
    for target in lora.targets if isinstance(lora.targets, list) else ():  # peft objects where none is there, only
        if not any(place == target or place.endswith(f".{target}") for place in layers):
            linear = {place.rpartition(".")[2] for place, layer in layers.items() if isinstance(layer, LINEAR)}
            hint = suggest(target, linear - {"base_layer", "lm_head", TOP, BELOW})
            raise InputError(f"policy.lora.targets: no layer of the model is called {target!r}; {hint}")
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type=task)


def _asked(make: Callable[[], T]) -> T:
    """What `make` makes of adapters that the settings ask for."""
    try:
        return make()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"policy.lora.targets: {one_line(error)[:300]}") from error


def _named(made: PeftModel) -> PeftModel:
    """The same, whose adapters name a base in a folder so that it is found from anywhere."""
    for config in made.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())
    return made


def _saved_config(path: str) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(path)
    except UNREADABLE as error:
        raise InputError(f"policy: no adapters can be read from {path!r}: {one_line(error)[:300]}") from error
    if not isinstance(config, LoraConfig):
        raise InputError(f"policy: the adapters in {path!r} are of the kind {config.peft_type}; only LoRA is taken")
    return config


def _with_saved(model: PreTrainedModel, path: str, name: str) -> PeftModel:
    """The model under a folder's adapters, with all their weights and without their dropout."""
    config = _saved_config(path)
    config.base_model_name_or_path, config.lora_dropout, config.inference_mode = None, 0.0, False
    try:
        with seeded(0):
            made = _named(cast(PeftModel, get_peft_model(model, config, adapter_name=name)))
        found: Any = set_peft_model_state_dict(made, load_peft_weights(path, device="cpu"), adapter_name=name)
    except UNREADABLE as error:
        raise InputError(f"policy: no adapters can be read from {path!r}: {one_line(error)[:300]}") from error
    known = {key for key, value in made.named_parameters() if value.requires_grad}
    if wrong := sorted(known & set(found.missing_keys)):
        raise InputError(f"policy: {path!r} lacks {len(wrong)} of the adapters' weights, {wrong[0]} for one")
    if wrong := sorted(found.unexpected_keys):
        raise InputError(f"policy: {path!r} holds weights that its adapters have no place for, {wrong[0]} for one")
    return made


def _adapted(made: PeftModel, *names: str) -> list[str]:
    """Names in the model of the layers that one of these adapters is on."""
    layers = cast(Any, made.get_base_model()).named_modules()
    return sorted(place for place, layer in layers if isinstance(layer, LoraLayer) and names_on(layer) & set(names))


def names_on(layer: LoraLayer) -> set[str]:
    """Adapters on one layer."""
    return {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}
