"""A server for one policy, for the processes of a launch: the first starts and stops it, and all of them ask it."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from align.distributed.launch import environment_without_launch
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.errors import InputError, RunError, one_line, within
from align.inference.managed.gpu_memory import free_memory, missing_memory, release_memory
from align.inference.managed.kinds import KINDS
from align.inference.managed.served_model import remove_merged, served_model
from align.inference.managed.server import MAX_LINE, ManagedServer
from align.inference.managed.settings import GpuServerSettings, ManagedSettings, Precision
from align.inference.settings import EngineSettings, ServerSettings
from align.redaction import printable, redact

LOG = "engine.log"  # in a step's folder: the output of its servers
RETRIES = 3  # of a request; a server on this machine that does not answer for seconds has ended
FOLDER, POLICY = "{folder}", "{policy}"  # in the command that refreshes a server


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server runs: the processes that share it, and the folder of its log."""

    processes: Processes
    folder: Path
    progress: Progress


@contextmanager
def serving(
    path: str, engine: EngineSettings, *, name: str, place: Place, rates: Precision | None = None
) -> Generator[EngineSettings]:
    """Yield settings of an engine that samples from the policy in `path`, for as long as the block runs.

    With `rates`, its precision, it is a reward model.

    For a managed engine these are the address of a server that was started for it. A server with `refresh` is
    refreshed. The simultaneous requests of a server are divided among the processes, each of which has at least one.
    Other settings are yielded as they are. All processes enter and leave together, and must have finished
    asking when they leave.

    Raises `RunError` if the server does not start, or ends while the block runs.
    """
    if engine.managed is not None:
        with _started(path, engine.managed, name=name, place=place, rates=rates) as server:
            yield EngineSettings(server=_share(server, place.processes))
        return
    if engine.server is None:
        yield engine
        return
    if engine.server.refresh is not None:
        words = refresh_words(engine.server.refresh, path, name)
        place.processes.run_on_main(lambda: _refresh(words, place), f"refreshing the server for {name}")
    yield EngineSettings(server=_share(engine.server, place.processes))


def _share(server: ServerSettings, processes: Processes) -> ServerSettings:
    """Return the settings for one of the processes that ask the server: its share of the simultaneous requests."""
    return server.model_copy(update={"concurrency": max(1, server.concurrency // processes.world_size)})


@contextmanager
def _started(
    path: str, settings: ManagedSettings, *, name: str, place: Place, rates: Precision | None
) -> Generator[ServerSettings]:
    processes = place.processes
    kind = KINDS[settings.kind]
    activity = f"starting {kind.title} for {name}"
    release_memory()
    _check_one_machine(processes, kind.title)
    num_gpus = settings.tensor_parallel if isinstance(settings, GpuServerSettings) else 1
    before = free_memory(num_gpus) if processes.is_main else []
    started: list[ManagedServer] = []

    def start() -> tuple[str, str]:
        with within("engine", settings.kind):
            model = served_model(path, name, settings, place.folder, rates=rates)
            place.progress.phase(f"start {settings.kind}", 0)
            started.append(ManagedServer(settings, model, place.folder / LOG))
            return started[0].start(), started[0].name

    try:
        url, served_name = processes.run_on_main(start, activity)
        yield ServerSettings(
            base_url=url,
            models={name: served_name},
            concurrency=settings.concurrency,
            timeout_s=settings.timeout_s,
            retries=RETRIES,
            body=dict(kind.body),
        )
    except RunError as error:
        if started and started[0].has_failed():
            raise RunError(
                f"{kind.title} ended while it was asked: {started[0].last_line()}; see {place.folder / LOG}; finished "
                "samples are kept, rerun the same command to resume"
            ) from error
        raise
    finally:
        for server in started:
            server.stop()
        if processes.is_main:
            remove_merged(place.folder)
    if missing := missing_memory(before):
        place.progress.note(f"{kind.title} has ended, and {missing / 2**20:,.0f} MiB of a GPU are not free again")


def _check_one_machine(processes: Processes, title: str) -> None:
    """Raise if processes of other machines could not reach the server."""
    hosts = set(processes.all_gather_object(socket.gethostname()))
    if len(hosts) > 1:
        raise InputError(
            f"{title} serves one machine, and the launch has {len(hosts)}: launch the step on one, or start servers "
            "yourself and use engine.server",
            ("launch",),
        )


def refresh_words(command: str, path: str, name: str) -> list[str]:
    """Return the words of the command that refreshes a server, with folder and policy filled in.

    >>> refresh_words("reload --name '{policy}' {folder}", "/runs/a b", "rpo-1")
    ['reload', '--name', 'rpo-1', '/runs/a b']
    """
    local = Path(path).expanduser()
    folder = str(local.resolve()) if local.is_dir() else path
    return [word.replace(FOLDER, folder).replace(POLICY, name) for word in shlex.split(command)]


def _refresh(words: list[str], place: Place) -> None:
    log = place.folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {redact(' '.join(words))}\n".encode())
        file.flush()
        try:
            ended = subprocess.run(
                words,
                env=environment_without_launch(os.environ),  # as for a server that is started here
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            raise RunError(f"engine.server.refresh: {words[0]}: {error.strerror}") from error
    if ended.returncode:
        lines = printable(log.read_text("utf-8", "replace")).strip().splitlines()
        last = one_line(lines[-1])[:MAX_LINE]
        raise RunError(f"engine.server.refresh ended with status {ended.returncode}: {last}; see {log}")
