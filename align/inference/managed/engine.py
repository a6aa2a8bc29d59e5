"""A managed server for use outside of a step: `load_engine`, `load_judge` and `align chat`."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from align.distributed.processes import Processes
from align.distributed.progress import SilentProgress
from align.errors import RunError
from align.inference.managed.serving import Place, serving
from align.inference.managed.settings import ManagedSettings, Precision
from align.inference.openai_engine import OpenAIEngine
from align.inference.samples import NOTHING_FINISHED, Finished, Sample, Throughput
from align.inference.settings import EngineSettings, SamplingSettings, ServerSettings
from align.records import Prompt


class StartedServer:
    """A server that was started for a model, at the address in `settings`.

    `close`, the end of a `with` block or of this process stops it. `rates` is the precision of a reward model.
    """

    def __init__(self, path: str, settings: ManagedSettings, *, name: str, rates: Precision | None = None) -> None:
        engine = EngineSettings.model_validate({settings.kind: settings})
        with ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="align-engine-"))
            stack.push(partial(_remove_folder, folder))
            place = Place(Processes(), folder, SilentProgress())
            reachable = stack.enter_context(serving(path, engine, name=name, place=place, rates=rates))
            assert reachable.server is not None
            self.settings: ServerSettings = reachable.server
            self._stack = stack.pop_all()
        self._closing = weakref.finalize(self, self._stack.close)

    def close(self) -> None:
        """Stop the server."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._closing.detach() is not None:
            self._stack.__exit__(kind, error, at)


def _remove_folder(
    folder: Path, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
) -> None:
    """Remove a server's folder, unless the server has failed: the message of the error names the log."""
    if not isinstance(error, RunError):
        shutil.rmtree(folder, ignore_errors=True)


class ManagedEngine:
    """Starts a server for the policy and samples from it.

    `close`, the end of a `with` block or of this process stops the server.
    """

    def __init__(self, policy: str, settings: ManagedSettings, *, name: str) -> None:
        self.name = name
        self._server = StartedServer(policy, settings, name=name)
        self._engine = OpenAIEngine(policy, self._server.settings, name=name)

    @property
    def throughput(self) -> Throughput:
        """Throughput of the requests."""
        return self._engine.throughput

    def sample(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, *, finished: Finished = NOTHING_FINISHED
    ) -> Iterator[Sample]:
        """Yield K samples of each distinct prompt in order of completion, except those in `finished`."""
        return self._engine.sample(prompts, settings, finished=finished)

    def close(self) -> None:
        """Stop the server."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.__exit__(kind, error, at)
