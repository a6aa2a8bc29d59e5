"""Where a model comes from: a hub id, a folder, a GGUF file or a fresh configuration; adapters on top of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from align.config import InputError, Settings, nearest, one_line

GGUF = "gguf:"

# What transformers raises for files and configurations that it cannot make a model of.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError)
# Names that a configuration takes beside its own fields.
_ALSO_CONFIG = {"model_type", "rope_theta", "rope_scaling"}


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021) on the linear layers."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, gt=0)
    targets: str | list[str] = "all-linear"  # module names, or every linear layer but the LM head
    merge: bool = True  # save base plus adapters as one plain folder; false: save the adapters alone


class PolicySettings(Settings):
    """Which model, and how it runs."""

    path: str | None = None  # hub id, folder, or gguf:FILE
    fresh: dict[str, Any] | None = None  # configuration of a model made from nothing, with its `model_type`
    tokenizer: str | None = None  # folder or hub id; the model's own where left out
    chat_template: str | None = None  # a built-in's name or a file; the tokenizer's own where left out
    forward: Literal["auto", "tree", "plain"] = "auto"
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None
    seed: int = 0  # of a fresh model's weights and of new adapters


def load_base(settings: PolicySettings) -> PreTrainedModel:
    """The causal language model in fp32 with dropout off; of a path that holds adapters, what is under them."""
    if (settings.path is None) == (settings.fresh is None):
        raise InputError("policy: give either path (hub id, folder or gguf:FILE) or fresh (a configuration)")
    if settings.fresh is not None:
        return _fresh(settings.fresh, settings.seed)
    path = str(settings.path)
    if is_adapter(path):
        path = str(LoraConfig.from_pretrained(path).base_model_name_or_path)
    if not path.startswith(GGUF):
        model = load_pretrained(path, AutoModelForCausalLM)
        if is_classifier(model.config):
            raise InputError(f"policy: {path!r} holds a reward model, which is no policy")
        return model
    try:
        return _load_gguf(gguf_file(path))
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"policy: no model can be read from {path!r}: {one_line(error)[:300]}") from error


def load_pretrained(path: str, kind: type[Any]) -> PreTrainedModel:
    """The model of a folder or hub id with all its weights, as one of transformers' Auto classes makes it."""
    try:
        config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=False))
        options = {"config": config, "dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
        loaded: Any = kind.from_pretrained(path, output_loading_info=True, **options)
    except UNREADABLE as error:
        raise InputError(f"policy: no model can be read from {path!r}: {one_line(error)[:300]}") from error
    if missing := sorted(loaded[1]["missing_keys"]):
        raise InputError(f"policy: {path!r} lacks {len(missing)} of the model's weights, {missing[0]} for one")
    return loaded[0]


def load_tokenizer_for(model: PreTrainedModel, settings: PolicySettings) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name, of which the model knows every token."""
    tokenizer = load_tokenizer(settings)
    num_embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > num_embeddings:
        raise InputError(f"policy: the tokenizer has {len(tokenizer)} tokens and the model {num_embeddings} embeddings")
    return tokenizer


def load_tokenizer(settings: PolicySettings) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name, without the model."""
    source = settings.tokenizer or settings.path
    if source is None:
        raise InputError("policy.tokenizer: a fresh policy needs a tokenizer, as a folder or a hub id")
    try:
        if source.startswith(GGUF):
            file = gguf_file(source)
            return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"policy: no tokenizer can be read from {source!r}: {one_line(error)[:300]}") from error


def is_adapter(path: str) -> bool:
    """Whether the folder holds adapters alone."""
    return (Path(path) / "adapter_config.json").is_file()


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether the configuration was saved with a sequence classifier, which a reward model is."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def gguf_file(path: str) -> Path:
    """The file that `gguf:FILE` names."""
    file = Path(path.removeprefix(GGUF)).expanduser()
    if not file.is_file():
        raise InputError(f"policy: {file}: no such GGUF file")
    return file


def _load_gguf(file: Path) -> PreTrainedModel:
    """The de-quantised weights in a fresh model: as loaded, they are marked quantised and cannot be saved."""
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    plain = {key: value for key, value in values.items() if key not in ("quantization_config", "_name_or_path")}
    model = AutoModelForCausalLM.from_config(without_dropout(type(loaded.config).from_dict(plain)), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.name_or_path = f"{GGUF}{file}"  # adapters that are saved alone name their base by it
    return model


def _fresh(values: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model with random weights that depend on the configuration and the seed only."""
    config = fresh_config(values)
    try:
        with seeded(seed):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except UNREADABLE as error:
        raise InputError(f"policy.fresh: {one_line(error)[:300]}") from error


def fresh_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that the values describe; `model_type` names the architecture."""
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise InputError("policy.fresh.model_type: name an architecture of transformers, such as llama")
    if kind not in CONFIG_MAPPING:
        raise InputError(f"policy.fresh.model_type: {kind!r}; {nearest(kind, CONFIG_MAPPING.keys())[:200]}")
    made = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(made)} | made.attribute_map.keys() | _ALSO_CONFIG
    if unknown := sorted(values.keys() - known):
        raise InputError(f"policy.fresh.{unknown[0]}: unknown key of {kind}; {nearest(unknown[0], known)}")
    try:
        return without_dropout(AutoConfig.for_model(**values))
    except UNREADABLE as error:
        raise InputError(f"policy.fresh: {one_line(error)[:300]}") from error


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """The CPU's generator at `seed`, and as it was afterwards; no other device draws here."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def adapted(model: PreTrainedModel, settings: PolicySettings, *, task: str) -> PreTrainedModel | PeftModel:
    """The model as it is trained: recomputing activations and under new adapters, where the settings ask for either.

    `task` is peft's word: a model that classifies trains its head whole.
    """
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.path is not None and is_adapter(settings.path) and task == "CAUSAL_LM":
        return PeftModel.from_pretrained(model, settings.path, is_trainable=True)
    if settings.lora is None:
        return model
    lora = settings.lora
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type=task
    )
    try:
        with seeded(settings.seed):
            return cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        raise InputError(f"policy.lora.targets: {one_line(error)[:300]}") from error


def length_limit(config: PretrainedConfig) -> int | None:
    """Positions that the model can tell apart, where its configuration says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with every dropout and router noise at 0: policy and reference must agree at first."""
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def quiet_transformers() -> None:
    """No bars and no advice from the libraries below: what is worth saying, align says."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
