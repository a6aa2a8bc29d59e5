"""Which engine a policy runs in: a model in this process, or one that a server knows by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from align.config import InputError, Settings, build
from align.synth.engine import LocalSettings, TransformersEngine
from align.synth.samples import Engine
from align.synth.server import OpenAIEngine, ServerSettings


class EngineSettings(Settings):
    """How a policy runs: `server` where it does not run in this process, else `local`."""

    local: Mapping[str, Any] = Field(default_factory=dict[str, Any])  # as LocalSettings, less the path
    server: Mapping[str, Any] = Field(default_factory=dict[str, Any])  # as ServerSettings, less the model


def make_engine(policy: str, settings: EngineSettings = EngineSettings(), *, name: str | None = None) -> Engine:  # noqa: B008 - frozen
    """The engine of a folder, hub id or gguf:FILE, or of the name by which a server knows a model.

    Its samples go by `name`, the policy's own where left out.
    """
    for where, key in (("local", "path"), ("server", "model")):
        if key in getattr(settings, where):
            raise InputError(f"engine.{where}.{key}: is the policy's own name, {policy!r} here; leave it out")
    if settings.server:
        if settings.local:
            raise InputError("engine: give local or server, not both")
        asked = build(ServerSettings, {**settings.server, "model": policy}, "engine.server")
        return OpenAIEngine(asked, name=name or policy)
    local = build(LocalSettings, {**settings.local, "path": policy}, "engine.local")
    return TransformersEngine.load(local, name=name or policy)
