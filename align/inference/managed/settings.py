"""Settings of the engines whose server `align` starts for each policy. Imports no torch."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from align.config import Settings

Precision = Literal["fp32", "bf16"]
Kind = Literal["vllm", "sglang", "transformers_serve"]  # the keys of `align.inference.managed.kinds.KINDS`


class ManagedSettings(Settings, ABC):
    """What the servers have in common."""

    kind: ClassVar[Kind]

    command: str = Field(description="Command that starts the server's program; it may have several words.")
    ready_s: float = Field(default=900.0, gt=0, description="Seconds within which the server must answer.")
    concurrency: int = Field(default=128, ge=1, description="Maximum number of simultaneous requests.")
    timeout_s: float = Field(
        default=600.0, gt=0, description="Seconds after which a request without a complete answer is retried."
    )
    args: list[str] = Field(default=[], description="Further arguments of the server, one word each.")
    env: dict[str, str] = Field(
        default={}, description="Environment variables of the server, besides those of this process. No secrets."
    )

    @field_validator("command")
    @classmethod
    def _has_words(cls, command: str) -> str:
        if not shlex.split(command):
            raise ValueError("name a command, such as vllm or /opt/vllm/bin/vllm")
        return command

    @property
    def words(self) -> list[str]:
        """The words of the command."""
        return shlex.split(self.command)

    @abstractmethod
    def is_repeatable(self, num_processes: int = 1) -> bool:
        """Return whether a sample does not depend on the other requests: a resumed step draws the same samples.

        `num_processes` send requests, each at least one at a time.
        """

    def cache_key(self) -> dict[str, Any]:
        """Return the settings that decide a sample, as JSON; not where or on how many devices the server runs."""
        include = {"args", "env", "batch_invariant", "max_model_len"}  # without room, a prompt has no response
        return self.model_dump(mode="json", include=include, exclude_none=True)


class GpuServerSettings(ManagedSettings):
    """What vLLM and SGLang have in common."""

    tensor_parallel: int = Field(default=1, ge=1, description="Number of GPUs that share the model.")
    gpu_share: float = Field(default=0.9, gt=0, le=1, description="Share of a GPU's memory that the server takes.")
    max_model_len: int | None = Field(
        default=None, ge=2, description="Most tokens of a prompt with its response; the model's own limit if left out."
    )
    batch_invariant: bool = Field(
        default=False,
        description="Whether samples do not depend on the other requests. Slower, and not on every GPU and model.",
    )

    def is_repeatable(self, num_processes: int = 1) -> bool:  # noqa: ARG002 - of any number
        """Return whether the server's batch-invariant kernels are on."""
        return self.batch_invariant


class VllmSettings(GpuServerSettings):
    """A server of vLLM for each policy, in an environment of its own."""

    kind = "vllm"

    command: str = Field(default="vllm", description="Command of vLLM, such as /opt/vllm/bin/vllm.")


class SglangSettings(GpuServerSettings):
    """A server of SGLang for each policy, in an environment of its own."""

    kind = "sglang"

    command: str = Field(default="sglang", description="Command of SGLang, such as /opt/sglang/bin/sglang.")


class TransformersServeSettings(ManagedSettings):
    """A server of `transformers serve` for each policy. It answers one request after the other."""

    kind = "transformers_serve"

    command: str = Field(default="transformers", description="Command of transformers.")
    # The seed of a request is that of the whole server: two requests at a time would draw each other's numbers
    concurrency: int = Field(
        default=1,
        ge=1,
        description="Maximum number of simultaneous requests; with 1, and one process that asks, a sample follows from "
        "its seed.",
    )

    def is_repeatable(self, num_processes: int = 1) -> bool:
        """Return whether the server has one request at a time."""
        return self.concurrency == num_processes == 1
