"""Engines by kind: a model in this process, a server, or a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.inference.openai_engine import OpenAIEngine
from align.inference.samples import Engine
from align.inference.settings import CustomEngineSettings, EngineSettings
from align.inference.transformers_engine import TransformersEngine
from align.registry import import_dotted


def _custom(policy: str, settings: CustomEngineSettings, *, name: str) -> Engine:
    return import_dotted(settings.name, "engine")(policy, settings.settings, name=name)


# Key of EngineSettings -> make(policy, settings, name=...)
ENGINES: dict[str, Callable[..., Any]] = {
    "local": TransformersEngine.load,
    "server": OpenAIEngine,
    "custom": _custom,
}


def load_engine(policy: str, settings: EngineSettings = EngineSettings(), *, name: str | None = None) -> Engine:  # noqa: B008 - frozen
    """Return the engine that samples from `policy`.

    `policy` is a folder, a Hub ID or gguf:FILE, or the name by which a server knows the model. `name` identifies the
    policy in the samples and in their seeds; it defaults to `policy`. Raises `InputError` for a model that cannot be
    loaded and for a server that does not answer.
    """
    return ENGINES[settings.kind](policy, settings.chosen, name=name or policy)
