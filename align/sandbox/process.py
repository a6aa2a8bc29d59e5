"""Untrusted Python in an isolated process; Linux, with or without root, nothing to install.

The process can compute with the standard library, in limited time, memory and threads, and write to one folder in
memory that is removed with it. It sees no other file, process, user, network or environment, and cannot start, signal
or trace any process. `isolation` lists the layers. Where the kernel lacks one, an `InputError` names it before
anything runs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field

from align.config import Settings
from align.errors import InputError, RunError
from align.sandbox import framing
from align.sandbox.activity import Activity
from align.sandbox.seccomp import syscall_filter

# CPU cores for this process: those of the machine, divided among the processes of a launch
NUM_CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
PYTHON = (sys.executable, "-s", "-S", "-P", "-c")  # without installed packages and the folder of a script
PROGRAM_WORKER, TESTS_WORKER, CALLS_WORKER = WORKERS = (
    "align.sandbox.program_worker",
    "align.sandbox.tests_worker",
    "align.sandbox.calls_worker",
)
FORKING_WORKERS = (CALLS_WORKER,)  # run no program themselves, but fork children that do
PROJECT = str(Path(__file__).parents[2])
SERVER_PROGRAM = (
    f"import sys; sys.path.append({PROJECT!r}); from align.sandbox.fork_server import serve; serve({WORKERS})"
)
# What the interpreter needs to start: the same order of sets in every run, and one heap for all threads. Programs see
# an empty environment.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1",
    **{name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ},
}
PACKAGES = ("site-packages", "dist-packages")  # in the standard library's folder, but not part of it
GRACE_S = 10.0  # for a worker to be killed
FORBIDDEN = (
    "the kernel or the container forbids it: see user.max_user_namespaces and, on Ubuntu, AppArmor's restriction"
)

_starting = threading.Lock()

# Prints the folders of the standard library, and the shared libraries that its modules load.
LIST_LIBRARIES = """
import importlib, json, os, sys
found = [path for path in sys.path if os.path.exists(path)]
for folder in filter(os.path.isdir, found):
    for name in sorted(os.listdir(folder)):
        module, _, ending = name.partition(".")
        if ending.endswith("so") and not module.startswith(("_test", "_tkinter", "_xx", "xx")):
            try:
                importlib.import_module(module)
            except ImportError:
                pass
mapped = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps([found, sorted(path for path in mapped if os.path.isfile(path))]))
"""


class Limits(Settings):
    """Resource limits of a sandboxed process."""

    cpu_s: int = Field(
        default=5, ge=1, description="CPU time of all threads in seconds; waiting on a busy machine does not count."
    )
    wall_s: float = Field(
        default=60.0, gt=0, description="Elapsed time in seconds; at most `cpu_s` of them without computing."
    )
    memory_mb: int = Field(default=1024, ge=128, description="Address space in MiB.")
    folder_mb: int = Field(default=16, ge=1, description="Size of all files in MiB.")
    num_threads: int = Field(default=16, ge=1, description="Number of threads.")


class ExitReport(NamedTuple):
    """How a sandboxed process ended."""

    why: str  # continues "the program ...": "exited with status 0"
    cpu_s: float
    memory_mb: float  # peak resident memory


class Sandbox:
    """A worker in its sandbox; leaving the `with` block kills it.

    The worker is one of `WORKERS`; its `main` is called with `argument`, a JSON value. It inherits the descriptors as
    3, 4, ...; its standard input is empty and its output is discarded.
    """

    def __init__(self, worker: str, argument: Any, *, descriptors: Sequence[int], limits: Limits) -> None:  # noqa: ANN401 - any JSON value
        server = fork_server()
        read_only, hidden = standard_library()
        request = {"module": worker, "argument": argument, "read_only": read_only, "hidden": hidden}
        request["forks"] = worker in FORKING_WORKERS
        request["filter"] = b64encode(syscall_filter()).decode()
        self._request = framing.pack_json(request | limits.model_dump())
        self._limits = limits
        self._report: dict[str, Any] | None = None
        self._late = False
        self._process: int | None = None
        self._activity = Activity()
        self._channel, supervisors_end = socket.socketpair()
        with supervisors_end:
            try:
                socket.send_fds(server, [b"1"], [supervisors_end.fileno(), *descriptors])
            except OSError as error:
                self._channel.close()
                raise RunError(f"the process that starts sandboxes has ended: {error}") from error

    def __enter__(self) -> Self:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `wait` reports how
            self._channel.sendall(self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._channel.close()

    def wait(self, deadline: float) -> ExitReport:
        """Return how the process ended; at `deadline`, on the monotonic clock, it is killed."""
        if not self._has_ended(deadline):
            self._late = True
            self._kill()
        report = self._report
        if not report:
            raise RunError("a sandbox failed; its error is printed above")
        if "missing" in report:
            missing = report["missing"]
            raise InputError(f"the code sandbox cannot start: this system lacks {missing} ({FORBIDDEN})")
        why = f"exceeded the time limit of {self._limits.wall_s:g} s" if self._late else self._why(report)
        return ExitReport(why, report["cpu_s"], report["memory_mb"])

    def active_s(self) -> float | None:
        """Return for how long the worker has run or waited for a core; None if that is not known (yet)."""
        with contextlib.suppress(TimeoutError):
            self._receive(time.monotonic())
        return None if self._process is None else self._activity.update(self._process)

    def _kill(self) -> None:
        """Have the supervisor kill the worker, if it has not ended, and wait for the report."""
        with contextlib.suppress(OSError):  # not connected: the supervisor has ended
            self._channel.shutdown(socket.SHUT_WR)
        self._has_ended(time.monotonic() + GRACE_S)

    def _has_ended(self, deadline: float) -> bool:
        """Wait for the supervisor's report until the deadline; it is empty if the supervisor ended without one."""
        try:
            while self._report is None:
                self._receive(deadline)
        except TimeoutError:
            return False
        return True

    def _receive(self, deadline: float) -> None:
        """Read a message of the supervisor: the worker's process ID first, then the report."""
        if self._report is None:
            try:
                message = framing.read_json(self._channel.fileno(), deadline=deadline)
            except (EOFError, ConnectionError, framing.InvalidFrame):
                message = {}
            self._process = message.get("started", self._process)
            self._report = None if "started" in message else message

    def _why(self, report: dict[str, Any]) -> str:
        code = report["code"]
        # On a busy machine the CPU time in the report falls behind the one that the limit counts
        if code == -signal.SIGKILL and report["cpu_s"] > self._limits.cpu_s / 2:
            return f"exceeded the CPU time limit of {self._limits.cpu_s} s"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def fork_server() -> socket.socket:
    """Return the socket of this process's fork server, started by the first call."""
    with _starting:
        return _start(os.getpid())


@functools.cache
def _start(_process: int) -> socket.socket:
    if not sys.platform.startswith("linux"):
        raise InputError(f"the code sandbox needs Linux namespaces, and this is {sys.platform}")
    channel, servers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with servers_end:
        server = subprocess.Popen(
            [*PYTHON, SERVER_PROGRAM], stdin=servers_end.fileno(), env=ENVIRONMENT, cwd="/", start_new_session=True
        )

    def stop() -> None:
        channel.close()
        server.kill()
        server.wait()

    atexit.register(stop)
    return channel


@functools.cache
def standard_library() -> tuple[list[tuple[str, str]], list[str]]:
    """Return the parts of the system that a sandbox shows, as (path, path inside), and folders in them to hide.

    A shared library is shown under every name that it has in its folder, as the loader may look for any of them.
    """
    done = subprocess.run([*PYTHON, LIST_LIBRARIES], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    folders, libraries = json.loads(done.stdout)
    tops = [folder for folder in folders if not any(Path(other) in Path(folder).parents for other in folders)]
    names = {
        (library, str(alias))
        for library in libraries
        for alias in Path(library).parent.glob(Path(library).name.partition(".so")[0] + ".so.*")
        if alias.resolve() == Path(library).resolve() and not any(Path(top) in alias.parents for top in tops)
    }
    packages = [Path(top, name) for top in tops for name in PACKAGES]
    shown = [(folder, folder) for folder in tops] + sorted(names)
    return shown, [str(folder) for folder in packages if folder.is_dir()]
