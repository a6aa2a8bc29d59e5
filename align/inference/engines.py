"""Which engine a policy runs in: a model in this process, or one that a server knows by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from align.config import Settings, build
from align.errors import InputError
from align.inference.openai_engine import OpenAIEngine, ServerSettings
from align.inference.samples import Engine
from align.inference.transformers_engine import LocalSettings, TransformersEngine

# Of an engine's settings what decides no sample: a run may go on with less memory, or from a server's next address
HOW = {"local": {"batch_size"}, "server": {"base_url", "concurrency", "timeout_s", "retries", "api_key_env"}}
SOME = "policy"  # in place of the name of one that is not known yet, to check the other settings by


class EngineSettings(Settings):
    """How a policy runs: `server` where it does not run in this process, else `local`."""

    local: Mapping[str, Any] = Field(default_factory=dict[str, Any])  # as LocalSettings, less the path
    server: Mapping[str, Any] = Field(default_factory=dict[str, Any])  # as ServerSettings, less the model

    def deciding(self) -> dict[str, Any]:
        """The settings, as JSON, without what says only how the engine runs."""
        return {
            kind: {key: value for key, value in given.items() if key not in HOW[kind]}
            for kind, given in self.model_dump(mode="json").items()
        }

    @field_validator("local")
    @classmethod
    def _of_local(cls, local: Mapping[str, Any]) -> Mapping[str, Any]:
        _local(local, SOME)
        return local

    @field_validator("server")
    @classmethod
    def _of_server(cls, server: Mapping[str, Any]) -> Mapping[str, Any]:
        if server:
            _server(server, SOME)
        return server

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.server and self.local:
            raise InputError("give local or server, not both")
        return self


def _local(given: Mapping[str, Any], policy: str) -> LocalSettings:
    return build(LocalSettings, _named(given, "path", policy))


def _server(given: Mapping[str, Any], policy: str) -> ServerSettings:
    return build(ServerSettings, _named(given, "model", policy))


def _named(given: Mapping[str, Any], key: str, policy: str) -> dict[str, Any]:
    if key in given:
        raise InputError(f"{key}: is the policy's own name, {given[key]!r} here; leave it out")
    return {**given, key: policy}


def make_engine(policy: str, settings: EngineSettings = EngineSettings(), *, name: str | None = None) -> Engine:  # noqa: B008 - frozen
    """The engine of a folder, hub id or gguf:FILE, or of the name by which a server knows a model.

    Its samples go by `name`, the policy's own where left out.
    """
    if settings.server:
        return OpenAIEngine(_server(settings.server, policy), name=name or policy)
    return TransformersEngine.load(_local(settings.local, policy), name=name or policy)
