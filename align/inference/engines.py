"""Engines by kind: a model in this process, a server that is started for it, another server, or a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from align.inference.managed.engine import ManagedEngine
from align.inference.openai_engine import OpenAIEngine
from align.inference.samples import NOTHING_FINISHED, Engine, Finished, Sample, Throughput
from align.inference.settings import CustomEngineSettings, EngineSettings, SamplingSettings
from align.inference.transformers_engine import TransformersEngine
from align.records import Prompt
from align.registry import UserCode, import_dotted


class _CustomEngine:
    """A user's own engine, with its exceptions handled."""

    def __init__(self, policy: str, settings: CustomEngineSettings, *, name: str) -> None:
        self._code = UserCode("engine", settings.name)
        make = import_dotted(settings.name, "engine")
        self._engine: Engine = self._code.call(make, policy, settings.settings, name=name)
        with self._code:
            self.name = self._engine.name

    @property
    def throughput(self) -> Throughput:
        """Throughput of the user's engine."""
        with self._code:
            return self._engine.throughput

    def sample(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, *, finished: Finished = NOTHING_FINISHED
    ) -> Iterator[Sample]:
        """Yield the samples of the user's engine."""
        return self._code.iterate(self._code.call(self._engine.sample, prompts, settings, finished=finished))


# Key of EngineSettings -> make(policy, settings, name=...)
ENGINES: dict[str, Callable[..., Any]] = {
    "local": TransformersEngine.load,
    "vllm": ManagedEngine,
    "sglang": ManagedEngine,
    "transformers_serve": ManagedEngine,
    "server": OpenAIEngine,
    "custom": _CustomEngine,
}


def load_engine(
    policy: str | Path,
    settings: EngineSettings = EngineSettings(),  # noqa: B008 - frozen
    *,
    name: str | None = None,
) -> Engine:
    """Return the engine that samples from `policy`.

    `policy` is a folder, a Hub ID or gguf:FILE, or the name by which a server knows the model. `name` identifies the
    policy in the samples and in their seeds; it defaults to `policy`. A managed engine starts its server, which runs
    until the engine's `close` or the end of the process. Raises `InputError` for a model that cannot be loaded and for
    a server that does not answer or does not list the model, `RunError` for a server that does not start.
    """
    return ENGINES[settings.kind](str(policy), settings.chosen, name=name or str(policy))
