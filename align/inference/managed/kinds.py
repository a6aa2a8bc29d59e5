"""The kinds of managed servers: how each is started, named and asked. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from align.inference.managed.settings import GpuServerSettings, Precision, TransformersServeSettings, VllmSettings

HOST = "127.0.0.1"
DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16"}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM 0.33, MaxLoRARanks: the values of --max-lora-rank


class Adapters(NamedTuple):
    """LoRA adapters on the model that is served."""

    folder: str
    rank: int


class ServedModel(NamedTuple):
    """What a server is started for."""

    path: str  # absolute folder, or Hub ID; under adapters their base
    name: str  # under which the server offers it, where it can be given a name
    adapters: Adapters | None = None
    rates: Precision | None = None  # of a reward model, which gives scores and no text


Arguments = Callable[[Any, ServedModel, int], list[str]]  # settings, model, port -> words after the command


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """How the servers of a program are started and asked."""

    title: str  # the program's name in messages
    arguments: Arguments
    version: tuple[str, ...]  # the words after the command that make it print its version
    environment: Callable[[Any], dict[str, str]] = lambda settings: {}
    has_names: bool = True  # whether a model can be offered under another name than its path
    takes_adapters: bool = False  # whether adapters are served without merging them
    cannot_rate: str = ""  # why it serves no reward models
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])  # further fields of every request


def _vllm(settings: VllmSettings, model: ServedModel, port: int) -> list[str]:
    words = ["serve", model.path, "--host", HOST, "--port", str(port)]
    words += ["--tensor-parallel-size", str(settings.tensor_parallel)]
    words += ["--gpu-memory-utilization", str(settings.gpu_share)]
    if model.rates is None:
        # Without it unset sampling parameters are those of the model's generation_config.json
        words += ["--generation-config", "vllm"]
    else:
        # Requests ask for values without activation, too; versions that would ignore that do not know this setting
        words += ["--runner", "pooling", "--pooler-config", json.dumps({"use_activation": False})]
        words += ["--dtype", DTYPES[model.rates]]
    if settings.max_model_len is not None:
        words += ["--max-model-len", str(settings.max_model_len)]
    if model.adapters is None:
        return [*words, "--served-model-name", model.name, *settings.args]
    rank = next((rank for rank in LORA_RANKS if rank >= model.adapters.rank), LORA_RANKS[-1])
    # The tokenizer in the adapters' folder has the chat template that they were trained with
    words += ["--served-model-name", f"{model.name}-base", "--tokenizer", model.adapters.folder]
    module = json.dumps({"name": model.name, "path": model.adapters.folder})
    return [*words, "--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", module, *settings.args]


def _sglang(settings: GpuServerSettings, model: ServedModel, port: int) -> list[str]:
    words = ["serve", "--model-path", model.path, "--served-model-name", model.name, "--host", HOST]
    words += ["--port", str(port), "--tp-size", str(settings.tensor_parallel)]
    words += ["--mem-fraction-static", str(settings.gpu_share), "--sampling-defaults", "openai"]
    if settings.max_model_len is not None:
        words += ["--context-length", str(settings.max_model_len)]
    if settings.batch_invariant:
        words.append("--enable-deterministic-inference")
    return [*words, *settings.args]


def _transformers_serve(settings: TransformersServeSettings, model: ServedModel, port: int) -> list[str]:
    return ["serve", model.path, "--host", HOST, "--port", str(port), *settings.args]


def _vllm_environment(settings: VllmSettings) -> dict[str, str]:
    # With a key of the user's other servers, this one would refuse requests without it
    return {"VLLM_API_KEY": "", **({"VLLM_BATCH_INVARIANT": "1"} if settings.batch_invariant else {})}


KINDS: dict[str, ServerKind] = {
    "vllm": ServerKind(
        title="vLLM",
        arguments=_vllm,
        version=("--version",),
        environment=_vllm_environment,
        takes_adapters=True,
    ),
    "sglang": ServerKind(
        title="SGLang",
        arguments=_sglang,
        version=("version",),
        # Version 0.5.23, models/qwen2_classification.py and qwen3_classification.py: nn.Linear with a bias that no
        # checkpoint has, so each start adds other random numbers to the scores
        cannot_rate="SGLang gives the reward models of several architectures a head with random numbers",
    ),
    "transformers_serve": ServerKind(
        title="transformers serve",
        arguments=_transformers_serve,
        version=("version",),
        has_names=False,
        cannot_rate="transformers serve has no scores of reward models",
        # transformers 5.24: temperature counts only with do_sample, and top_k is 50 where nothing is given
        body={"generation_config": json.dumps({"do_sample": True, "top_k": 0, "repetition_penalty": 1.0})},
    ),
}
