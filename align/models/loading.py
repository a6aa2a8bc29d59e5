"""Where a model comes from: a hub id, a folder, a GGUF file or a fresh configuration; adapters on top of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from align.errors import InputError, one_line
from align.models.adapters import (
    UNREADABLE,
    base_of,
    continued,
    folded,
    new_adapters,
    quantization_of,
    seeded,
    stacked,
)
from align.models.quantized import dequantized, quantization, steady
from align.models.settings import GGUF, PolicySettings, is_adapter
from align.registry import suggest

QUANTIZED = "policy: the weights in {!r} are quantised, and not by policy.quantize; give the model in full precision"
# Names that a configuration takes beside its own fields.
_ALSO_CONFIG = {"model_type", "rope_theta", "rope_scaling"}


def load_base(settings: PolicySettings) -> PreTrainedModel:
    """The causal language model in fp32 with dropout off; of a path that holds adapters, what is under them."""
    if (settings.path is None) == (settings.from_config is None):
        raise InputError("policy: give either path (hub id, folder or gguf:FILE) or from_config (a configuration)")
    if settings.from_config is not None:
        if settings.quantize:
            raise InputError("policy.quantize: only a model that is read is quantised; import the fresh one first")
        return _fresh(settings.from_config, settings.seed)
    path = str(settings.path)
    if not is_adapter(path):
        return _read(path, settings.quantize)
    under = _quantization_under(path, settings)
    model = _read(base_of(path), under)
    if (Path(path) / GENERATION_CONFIG_NAME).is_file():  # where responses end may have been learned with the adapters
        model.generation_config = GenerationConfig.from_pretrained(path)
    return dequantized(model) if under and not settings.quantize else model


def _read(path: str, quantize: Literal["nf4"] | None) -> PreTrainedModel:
    """The causal language model of a hub id, a folder or a GGUF file."""
    if not path.startswith(GGUF):
        model = load_pretrained(path, AutoModelForCausalLM, quantize=quantize)
        if is_classifier(model.config):
            raise InputError(f"policy: {path!r} holds a reward model, which is no policy")
        return model
    if quantize:
        raise InputError(f"policy.quantize: {path} is quantised in its own way; give a hub id or a folder")
    try:
        return _load_gguf(gguf_file(path))
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"policy: no model can be read from {path!r}: {one_line(error)[:300]}") from error


def _quantization_under(path: str, settings: PolicySettings) -> Literal["nf4"] | None:
    """How the model under a folder's adapters is quantised, which the settings must agree with to train on top."""
    under = quantization_of(path)
    if under not in (None, "nf4"):
        raise InputError(f"policy: the adapters in {path} lie on weights in {under!r}, which is unknown; there is nf4")
    trained_on = settings.lora is not None and not settings.lora.merge
    if (trained_on or settings.quantize) and under != settings.quantize:
        raise InputError(
            f"policy.quantize is {settings.quantize or 'left out'}, and the adapters in {path} were trained on "
            f"{'weights in nf4' if under else 'weights that were not quantised'}"
        )
    return under


def load_pretrained(path: str, kind: type[Any], *, quantize: Literal["nf4"] | None = None) -> PreTrainedModel:
    """The model of a folder or hub id with all its weights, as one of transformers' Auto classes makes it."""
    more = quantization() if quantize else {}
    try:
        config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=False))
        if quantize and getattr(config, "quantization_config", None):
            raise InputError(QUANTIZED.format(path))
        options = {"config": config, "dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
        loaded: Any = kind.from_pretrained(path, output_loading_info=True, **options, **more)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"policy: no model can be read from {path!r}: {one_line(error)[:300]}") from error
    if missing := sorted(loaded[1]["missing_keys"]):
        raise InputError(f"policy: {path!r} lacks {len(missing)} of the model's weights, {missing[0]} for one")
    model = loaded[0]
    if quantize:
        return steady(model, path)
    if not all(value.is_floating_point() for value in model.parameters()):  # they would stand still, and nobody told
        raise InputError(QUANTIZED.format(path))
    return model


def config_of(path: str) -> PretrainedConfig:
    """The configuration of the model at a hub id, a folder or a GGUF file, or under a folder's adapters."""
    source = base_of(path) if is_adapter(path) else path
    try:
        if source.startswith(GGUF):
            file = gguf_file(source)
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"policy: no model can be read from {source!r}: {one_line(error)[:300]}") from error


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
        raise InputError(f"policy.from_config: {one_line(error)[:300]}") from error


def fresh_config(values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that the values describe; `model_type` names the architecture."""
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise InputError("policy.from_config.model_type: name an architecture of transformers, such as llama")
    if kind not in CONFIG_MAPPING:
        raise InputError(f"policy.from_config.model_type: {kind!r}; {suggest(kind, CONFIG_MAPPING.keys())[:200]}")
    made = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(made)} | made.attribute_map.keys() | _ALSO_CONFIG
    if unknown := sorted(values.keys() - known):
        raise InputError(f"policy.from_config.{unknown[0]}: unknown key of {kind}; {suggest(unknown[0], known)}")
    try:
        return without_dropout(AutoConfig.for_model(**values))
    except UNREADABLE as error:
        raise InputError(f"policy.from_config: {one_line(error)[:300]}") from error


def adapted(model: PreTrainedModel, settings: PolicySettings, *, task: str) -> PreTrainedModel | PeftModel:
    """The model as it is trained: recomputing activations and under adapters, where the settings ask for either.

    Adapters of a policy's path are folded in unless the settings keep them. `task` is peft's word.
    """
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    path, lora = settings.path, settings.lora
    if path is not None and is_adapter(path) and task == "CAUSAL_LM":  # else they are in the decoder already
        if lora is not None and lora.adapters == "continued":
            return continued(model, path, lora)
        if lora is not None and lora.adapters == "stacked":
            return stacked(model, path, lora, seed=settings.seed)
        model = folded(model, path)
    return model if lora is None else new_adapters(model, lora, seed=settings.seed, task=task)


def default_device() -> Literal["cpu", "cuda"]:
    """Where a model goes that nothing else places: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
