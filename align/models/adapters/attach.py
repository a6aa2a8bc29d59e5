"""Attach low-rank adapters to a model: new ones, saved ones to train further, or new ones on top of frozen ones."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from align.config import stable_hash
from align.errors import InputError, one_line
from align.models.adapters.files import FROZEN, TRAINED, adapted_modules, load_adapter_config
from align.models.adapters.merging import merge_and_untie, tied_targets
from align.models.loading.errors import MAX_SHOWN, loading
from align.models.loading.seeding import seeded
from align.models.settings import GGUF, LoraSettings, PolicySettings, is_adapter, kept_adapters_error
from align.registry import suggest

LINEAR = (nn.Linear, LoraLayer)  # a linear layer, without or with adapters
LORA = ("policy", "lora")
MODULES = "modules_to_save"


def prepare_for_training(model: PreTrainedModel, settings: PolicySettings, *, task: str) -> PreTrainedModel | PeftModel:
    """Turn on gradient checkpointing and attach adapters, as the settings say.

    Adapters in the folder of a policy are merged into the weights unless the settings train or keep them. `task` is
    peft's task type, CAUSAL_LM or SEQ_CLS; for SEQ_CLS the adapters of the folder must already be merged.
    """
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    path, lora = settings.path, settings.lora
    if path is not None and is_adapter(path) and task == "CAUSAL_LM":
        if lora is not None and lora.adapters == "continued":
            return _check_kept(continue_adapters(model, path, lora))
        if lora is not None and lora.adapters == "stacked":
            return _check_kept(stack_adapters(model, path, lora, seed=settings.seed))
        model = merge_adapters(model, path)
    if lora is None:
        return model
    adapted = add_adapters(model, lora, seed=settings.seed, task=task)
    return adapted if lora.merge else _check_kept(adapted)


def add_adapters(model: PreTrainedModel, lora: LoraSettings, *, seed: int, task: str) -> PeftModel:
    """Return the model with new adapters, which do not change its output yet.

    With task SEQ_CLS peft also trains all weights of the head.
    """
    if not lora.merge and (not model.name_or_path or model.name_or_path.startswith(GGUF)):
        raise kept_adapters_error(lora)
    with seeded(seed), _target_errors():
        return _with_absolute_base(cast(PeftModel, get_peft_model(model, _new_config(model, lora, task))))


def continue_adapters(model: PreTrainedModel, path: str, lora: LoraSettings) -> PeftModel:
    """Return the model with a folder's adapters, to be trained further.

    Raises `InputError` if the settings ask for another rank, alpha or targets than the adapters have.
    """
    result = _with_saved(model, path, TRAINED, dropout=lora.dropout if "dropout" in lora.model_fields_set else None)
    config = cast(LoraConfig, result.peft_config[TRAINED])
    saved: dict[str, Any] = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dora": config.use_dora,
        "rslora": config.use_rslora,
        MODULES: sorted(config.modules_to_save or ()),
    }
    wanted: dict[str, Any] = {name: getattr(lora, name) for name in saved} | {MODULES: sorted(lora.modules_to_save)}
    if "targets" in lora.model_fields_set:
        saved["targets"] = adapted_modules(result, TRAINED)
        with _target_errors():
            result.add_adapter("wanted", _new_config(model, lora, "CAUSAL_LM"), low_cpu_mem_usage=True)
        wanted["targets"] = adapted_modules(result, "wanted")
        result.delete_adapter("wanted")
    for name in sorted(saved.keys() & lora.model_fields_set):
        if saved[name] != wanted[name]:
            raise InputError(
                f"'continued' trains the adapters in {path}, whose {name} is {str(saved[name])[:100]}; leave it out, "
                "or set adapters to 'stacked'",
                (*LORA, name),
            )
    return result


def stack_adapters(model: PreTrainedModel, path: str, lora: LoraSettings, *, seed: int) -> PeftModel:
    """Return the model with a folder's adapters, frozen, and new ones on top, which do not change its output yet."""
    result = _with_saved(model, path, FROZEN)
    frozen = cast(LoraConfig, result.peft_config[FROZEN])
    options = {"use_dora": frozen.use_dora, "bias": frozen.bias != "none", "modules_to_save": frozen.modules_to_save}
    if unsupported := [name for name, value in options.items() if value]:
        raise InputError(
            f"the adapters in {path} use {unsupported[0]}, which adapters: stacked does not support",
            (*LORA, "adapters"),
        )
    # With the seed of the frozen adapters the new ones would start from nearly the same directions
    with seeded(int(stable_hash([seed, frozen.r])[:8], 16)), _target_errors():
        result.add_adapter(TRAINED, _new_config(model, lora, "CAUSAL_LM"))
    result.peft_config[TRAINED].base_model_name_or_path = frozen.base_model_name_or_path
    cast(Any, result.base_model).set_adapter([FROZEN, TRAINED])
    result.set_requires_grad(FROZEN, requires_grad=False)
    return result


def merge_adapters(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return the model with a folder's adapters merged into its weights; which weights are trainable stays the same."""
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    if any(hasattr(value, "ds_id") for value in model.parameters()):
        raise InputError(
            f"the adapters in {path!r} cannot be merged into weights that ZeRO-3 partitions while they are loaded; "
            "merge them in an import step, or set zero3_init_flag to false in the launch file",
            ("policy",),
        )
    result = merge_and_untie(_with_saved(model, path, TRAINED))
    for name, value in result.named_parameters():
        value.requires_grad_(name in trainable)
    return result


def _check_kept(model: PeftModel) -> PeftModel:
    """Return the model unless its adapters cannot be saved without their base.

    Other libraries merge an adapter on a tied weight into every layer that uses the weight.
    """
    if tied := tied_targets(model):
        target = tied[0].removesuffix(".base_layer").rpartition(".")[2]
        raise InputError(
            f"{target} shares its weight with another layer of this model (tie_word_embeddings), and adapters on it "
            "can only be merged; leave it out, or set lora.adapters to 'merged', which unties them",
            (*LORA, "targets"),
        )
    return model


def _new_config(model: PreTrainedModel, lora: LoraSettings, task: str) -> LoraConfig:
    modules = dict(model.named_modules())
    for target in lora.targets if isinstance(lora.targets, list) else ():  # peft complains only if none of them exists
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, LINEAR)}
            hint = suggest(target, linear - {"base_layer", "lm_head", TRAINED, FROZEN})
            raise InputError(f"the model has no module {target!r}; {hint}", (*LORA, "targets"))
    names = {part for name in modules for part in name.split(".")}
    for name in lora.modules_to_save:
        if name not in names:
            raise InputError(f"the model has no module {name!r}; {suggest(name, names)[:200]}", (*LORA, MODULES))
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        modules_to_save=lora.modules_to_save or None,
        task_type=task,
    )


@contextmanager
def _target_errors() -> Generator[None]:
    """Turn peft's complaints about the target modules into errors about the setting."""
    try:
        with _without_warnings():
            yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(one_line(error)[:MAX_SHOWN], (*LORA, "targets")) from error


@contextmanager
def _without_warnings() -> Generator[None]:
    """Hide peft's warnings that need no action.

    They are about tied weights, which `merge_and_untie` merges; about transposed weights (GPT-2); and about the ranks
    that peft sets for the fused experts of a mixture, whether they have adapters or not.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", r".*(tie_word_embeddings|fan_in_fan_out)", UserWarning)
        yield


def _with_saved(model: PreTrainedModel, path: str, name: str, dropout: float | None = None) -> PeftModel:
    """Return the model with a folder's adapters; raise `InputError` if weights do not match.

    Their dropout is the given one, by default that of their configuration; frozen ones have none.
    """
    config = load_adapter_config(path)
    config.base_model_name_or_path = None
    config.inference_mode = False
    if name == FROZEN or dropout is not None:
        config.lora_dropout = dropout or 0.0
    with loading("adapters", path, "policy"):
        with seeded(0), _without_warnings():
            result = _with_absolute_base(cast(PeftModel, get_peft_model(model, config, adapter_name=name)))
        found: Any = set_peft_model_state_dict(result, load_peft_weights(path, device="cpu"), adapter_name=name)
    trainable = {key for key, value in result.named_parameters() if value.requires_grad}
    if missing := sorted(trainable & set(found.missing_keys)):
        raise InputError(f"{path!r} lacks {len(missing)} weights of its adapters, such as {missing[0]}", ("policy",))
    if found.unexpected_keys:
        unexpected = min(found.unexpected_keys)
        raise InputError(f"{path!r} has weights that its configuration does not use, such as {unexpected}", ("policy",))
    return result


def _with_absolute_base(model: PeftModel) -> PeftModel:
    """Record the base of the adapters by its absolute path if it is a folder, so that any process finds it."""
    for config in model.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())
    return model
