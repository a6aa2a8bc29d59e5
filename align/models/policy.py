"""The policy: loaded from a hub id, a folder, a GGUF file or a fresh configuration, and saved as a plain folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
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
from align.models import tree_attention
from align.models.logprobs import LogitTransform, install
from align.models.tree import TokenBatch

GGUF = "gguf:"

# What transformers raises for files and configurations that it cannot make a model of.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError)
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


class Policy(nn.Module):
    """A causal language model that answers with the log-probabilities of a batch's targets; what accelerate wraps."""

    def __init__(self, hf: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.hf = hf
        head = self.base.get_output_embeddings()
        if type(head) is not nn.Linear:
            kind = type(self.base).__name__
            raise InputError(f"the LM head of {kind} is a {type(head).__name__}, not a plain linear layer")
        install(head, logit_transform(self.base.config))
        if getattr(self.base.config.get_text_config(), "attn_logit_softcapping", None) and self._attention == "sdpa":
            self.base.set_attn_implementation("eager")  # transformers 5.20 drops the cap under sdpa, 5.23 refuses it
        self._plain_attention: str = self._attention

    @property
    def base(self) -> PreTrainedModel:
        """The model itself, under the adapters where there are any."""
        return cast(PreTrainedModel, self.hf.get_base_model() if isinstance(self.hf, PeftModel) else self.hf)

    @property
    def is_tree(self) -> bool:
        """Whether attention runs over root paths (`use_forward` says)."""
        return self._attention == tree_attention.NAME

    @property
    def _attention(self) -> str:
        return cast(str, self.base.config._attn_implementation)  # pyright: ignore[reportPrivateUsage] - no public name

    def use_forward(self, name: Literal["tree", "plain"]) -> None:
        """Switch between the tree and its plain twin."""
        if self.is_tree != (name == "tree"):
            self.base.set_attn_implementation(tree_attention.NAME if name == "tree" else self._plain_attention)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Log-probability of each target in nats, fp32, shape [N]."""
        hidden = self.hidden(batch)
        head = cast(nn.Module, self.base.get_output_embeddings())
        return head(hidden.flatten(0, 1)[batch.rows_N], targets=batch.targets_N)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Last hidden states [R, L, D], of every token computed."""
        # The model's own attention would swallow the layout and attend to everything before.
        assert self.is_tree == (batch.layout is not None), "a tree batch goes with use_forward('tree')"
        where = {"attention_mask": batch.attention_mask} if batch.layout is None else {"tree": batch.layout}
        decoder = cast(nn.Module, self.base.get_decoder())
        if decoder is self.base:  # Llama 4 names a part that its text model does not have
            decoder = cast(nn.Module, self.base.model)
        output = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **where)
        return output.last_hidden_state


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the architecture does to its logits, from the names its configuration uses for it."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return LogitTransform(scale=scale, softcap=softcap)


def load_policy(settings: PolicySettings) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy in fp32 with dropout off, and its tokenizer with its own chat template."""
    if (settings.path is None) == (settings.fresh is None):
        raise InputError("policy: give either path (hub id, folder or gguf:FILE) or fresh (a configuration)")
    model = _fresh(settings.fresh, settings.seed) if settings.fresh is not None else _load(str(settings.path))
    tokenizer = load_tokenizer(settings)
    num_embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > num_embeddings:
        raise InputError(f"policy: the tokenizer has {len(tokenizer)} tokens and the model {num_embeddings} embeddings")
    hf: PreTrainedModel | PeftModel = model
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.path is not None and _is_adapter(settings.path):
        hf = PeftModel.from_pretrained(model, str(settings.path), is_trainable=True)
    elif settings.lora is not None:
        hf = _with_adapters(model, settings.lora, settings.seed)
    policy = Policy(hf)
    policy.train()  # gradient checkpointing runs in training mode only; there is no dropout left to be on
    return policy, tokenizer


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


def _load(path: str) -> PreTrainedModel:
    if _is_adapter(path):
        path = str(LoraConfig.from_pretrained(path).base_model_name_or_path)
    try:
        if path.startswith(GGUF):
            return _load_gguf(gguf_file(path))
        config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=False))
        options = {"config": config, "dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"policy: no model can be read from {path!r}: {one_line(error)[:300]}") from error
    if missing := sorted(loaded[1]["missing_keys"]):
        raise InputError(f"policy: {path!r} lacks {len(missing)} of the model's weights, {missing[0]} for one")
    return loaded[0]


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


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
        with _seeded(seed):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except _UNREADABLE as error:
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
    except _UNREADABLE as error:
        raise InputError(f"policy.fresh: {one_line(error)[:300]}") from error


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    """The CPU's generator at `seed`, and as it was afterwards; no other device draws here."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _with_adapters(model: PreTrainedModel, lora: LoraSettings, seed: int) -> PeftModel:
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        with _seeded(seed):
            adapted = cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        raise InputError(f"policy.lora.targets: {one_line(error)[:300]}") from error
    if type(model.get_output_embeddings()) is not nn.Linear:
        raise InputError("policy.lora.targets: the LM head takes no adapter; name other modules")
    return adapted


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with every dropout and router noise at 0: policy and reference must agree at first."""
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge: bool = True,
    end_of_turn: int | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads: safetensors, tokenizer with chat template, generation config.

    Generation stops at what it stopped at before, at EOS and at `end_of_turn`, the token that trained responses end
    with. With `merge` adapters are folded into the weights, in place: the policy is not to be trained on afterwards.
    """
    hf = policy.hf
    if isinstance(hf, PeftModel) and merge:
        hf = cast(PreTrainedModel, hf.merge_and_unload())
    base = policy.base if not isinstance(hf, PreTrainedModel) else hf
    before: Any = base.generation_config.eos_token_id
    known: list[Any] = [*(before if isinstance(before, list) else [before]), tokenizer.eos_token_id, end_of_turn]
    stops = sorted({stop for stop in known if stop is not None})
    base.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    base.generation_config.pad_token_id = tokenizer.pad_token_id
    # The vocabulary is never resized, and peft would ask the hub whether it was.
    options: dict[str, Any] = {"save_embedding_layers": False} if isinstance(hf, PeftModel) else {}
    hf.save_pretrained(str(folder), safe_serialization=True, **options)
    tokenizer.save_pretrained(str(folder))


def fingerprint(policy: Policy) -> str:
    """Sixteen hex digits that depend on every weight, adapters included, by value."""
    digest = hashlib.sha256()
    for name, value in sorted(policy.hf.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(memoryview(value.detach().cpu().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def quiet_transformers() -> None:
    """No bars and no advice from the libraries below: what is worth saying, align says."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
