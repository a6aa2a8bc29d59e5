"""The engines of a step: what is recorded of them, and those of the policy that a step evaluates."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from align.accounting.flops import Work, sum_work
from align.distributed.processes import Processes
from align.inference.engines import load_engine
from align.inference.managed.serving import Place, serving
from align.inference.managed.version import engine_version
from align.inference.samples import Engine, Throughput
from align.inference.settings import EngineSettings, LocalSettings
from align.redaction import as_written
from align.stages.costs.measured import Done, sampling_done
from align.stages.inputs.context import RunContext
from align.stages.responses.tasks import TaskSettings


def engine_place(context: RunContext) -> Place:
    """Return where the servers of a step run."""
    return Place(context.processes, context.folder, context.progress)


def engine_identity(engine: EngineSettings, processes: Processes) -> dict[str, Any]:
    """Return what samples of the engine are made with: settings, and the version of a managed server's program."""
    managed = engine.managed
    if managed is None:
        return engine.cache_key()
    version = processes.run_on_main(lambda: engine_version(managed), f"asking for the version of {engine.kind}")
    return {**engine.cache_key(), "version": version}


def engine_report(engine: EngineSettings, identity: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """Return what a manifest says of an engine that these processes have asked.

    `repeatable` is whether a step that is resumed, or run again, draws the same samples; None if that is up to a
    server or to a user's own engine.
    """
    managed = engine.managed
    repeatable = True if engine.kind == "local" else None
    if managed is not None:
        repeatable = managed.is_repeatable(processes.world_size)
    return {"kind": engine.kind, "repeatable": repeatable, **as_written(identity)}


def engine_settings(settings: TaskSettings) -> EngineSettings:
    """Return the engine of a task: its own, or this process in the task's precision."""
    if settings.engine is not None:
        return settings.engine
    return EngineSettings(local=LocalSettings(precision=settings.precision))


class PolicyEngines:
    """The engines of the policy that a step evaluates, each loaded once; a managed server runs alone."""

    def __init__(self, policy: str | None, context: RunContext) -> None:
        self.name = policy or ""
        folder = context.inputs.folders.get(self.name)
        self.path = self.name if folder is None else str(folder)
        self._context = context
        self._loaded: dict[str, Engine] = {}
        self._used: list[EngineSettings] = []
        self._speeds: list[Throughput] = []
        self.observed: list[Work] = []  # forward passes of all processes beside those of the engines
        self._server = ExitStack()

    def engine(self, settings: EngineSettings) -> Engine:
        """Return the engine with these settings."""
        key = settings.model_dump_json()
        if key not in self._loaded:
            if any(each.managed is not None for each in (settings, *self._used)):
                self.release()
            place = engine_place(self._context)
            reachable = self._server.enter_context(serving(self.path, settings, name=self.name, place=place))
            self._loaded[key] = load_engine(self.path, reachable, name=self.name)
            self._used.append(settings)
            self._speeds.append(self._loaded[key].throughput)
        return self._loaded[key]

    def release(self) -> None:
        """Stop the server and forget the engines, so that their memory is free."""
        self._loaded.clear()
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loaded.clear()
        self._server.__exit__(kind, error, at)

    def done(self, processes: Processes, more: Work) -> Done:
        """Return the work of all engines, and of the forward passes `observed` and `more`."""
        speeds = [speed for part in processes.all_gather_object(self._speeds) for speed in part]
        if not self.path:  # given responses
            return Done(devices=processes.world_size)
        if any(each.kind != "local" for each in self._used):
            return Done.elsewhere(devices=processes.world_size)
        precision = next((each.local.precision for each in self._used if each.local is not None), "fp32")
        work = sum_work([*(speed.work for speed in speeds), *self.observed, more])
        return replace(sampling_done([(self.path, work)], precision), devices=processes.world_size)
