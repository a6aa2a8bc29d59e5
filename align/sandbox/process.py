"""Untrusted Python in a locked-up process of its own; Linux, with or without root, nothing to install.

What it may do is compute: with the standard library, in bounded time, memory and threads, and write to one folder in
memory that ends with it. It sees no other file, process, user, network or environment, and can start, signal or trace
no one. `jail.py` says by which layers. Where the kernel lacks one, an `InputError` says which, before anything runs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
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
from align.sandbox.seccomp import syscall_filter

PYTHON = (sys.executable, "-s", "-S", "-P", "-c")  # no packages, no folder of a script
MODULES = (
    "align.sandbox.program_worker",
    "align.sandbox.tests_worker",
    "align.sandbox.calls_worker",
)  # what may run in a sandbox
FORKING = MODULES[2:]  # run no program themselves, but start children that lock themselves up to run one
PROJECT = str(Path(__file__).parents[2])
JAILS = f"import sys; sys.path.append({PROJECT!r}); from align.sandbox.isolation import serve; serve({MODULES})"
# What the interpreter needs to start; sets have one order in every run, and threads share one heap's address space.
# All of it is taken away before the program starts.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1",
    **{name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ},
}
PACKAGES = ("site-packages", "dist-packages")  # lie inside the standard library's folder and are no part of it
GRACE_S = 10.0  # for ending a process that is told to end
FORBIDDEN = (
    "the kernel or the container forbids it: see user.max_user_namespaces and, on Ubuntu, apparmor's restriction"
)

_starting = threading.Lock()

# Which folders hold the standard library, and which shared libraries its modules load.
ASK = """
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
    """What a sandboxed process may use."""

    cpu_s: int = Field(default=5, ge=1)  # of all its threads; a busy machine does not use it up
    wall_s: float = Field(default=60.0, gt=0)  # for one that waits
    memory_mb: int = Field(default=1024, ge=128)  # of address space
    folder_mb: int = Field(default=16, ge=1)  # of files
    num_threads: int = Field(default=16, ge=1)


class Ended(NamedTuple):
    """How a sandboxed process ended."""

    why: str  # what happened, to be read after "it": "ended with status 0"
    cpu_s: float
    memory_mb: float  # resident, at most


class Sandbox:
    """A module at work in its sandbox; leaving the `with` block ends it.

    The module is one of `MODULES`; its `main` is called with `argument`, a JSON value. The descriptors are its 3, 4,
    ...; its standard input is empty and what it prints goes nowhere.
    """

    def __init__(self, module: str, argument: Any, *, descriptors: Sequence[int], limits: Limits) -> None:  # noqa: ANN401 - any JSON value
        server = jails()
        read_only, hidden = standard_library()
        order = {"module": module, "argument": argument, "read_only": read_only, "hidden": hidden}
        order["forks"] = module in FORKING
        order["filter"] = b64encode(syscall_filter()).decode()
        self._order = json.dumps(order | limits.model_dump()).encode() + b"\n"
        self._limits, self._heard = limits, b""
        self._line, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(server, [b"1"], [theirs.fileno(), *descriptors])
            except OSError as error:
                self._line.close()
                raise RunError(f"the process that starts sandboxes is gone: {error}") from error

    def __enter__(self) -> Self:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `ended` says how
            self._line.sendall(self._order)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._line.close()

    def _end(self) -> bytes | None:
        """End the program if it has not ended; what its jail said of it."""
        with contextlib.suppress(OSError):  # not connected: the jail has gone already
            self._line.shutdown(socket.SHUT_WR)
        return self._said(time.monotonic() + GRACE_S)

    def _said(self, deadline: float) -> bytes | None:
        """What the jail says until it ends; None where it has not ended by the deadline."""
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            more = self._line.recv(1 << 16)
            if not more:
                return self._heard
            self._heard += more
        return None

    def ended(self, deadline: float) -> Ended:
        """How the program ended; one that has not at `deadline`, on the monotonic clock, is ended here."""
        said, late = self._said(deadline), ""
        if said is None:
            said, late = self._end(), f"was ended after {self._limits.wall_s:g} s"
        lines = (said or b"").decode().splitlines()
        if not lines:
            raise RunError("a sandbox failed; its error stands above")
        report = json.loads(lines[0])
        if "missing" in report:
            raise InputError(f"no code is executed without a sandbox, and {report['missing']} ({FORBIDDEN})")
        return Ended(late or self._why(report["code"], report["cpu_s"]), report["cpu_s"], report["memory_mb"])

    def _why(self, code: int, cpu_s: float) -> str:
        # On a crowded machine the time that is reported falls behind the time that the limit counts.
        if code == -signal.SIGKILL and cpu_s > self._limits.cpu_s / 2:
            return f"used up {self._limits.cpu_s} s of CPU time"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def jails() -> socket.socket:
    """The line to this process's server of jails, which is started by the first who asks."""
    with _starting:
        return _start(os.getpid())


@functools.cache
def _start(_process: int) -> socket.socket:
    if not sys.platform.startswith("linux"):
        raise InputError(f"code is executed in a sandbox of Linux namespaces, and this is {sys.platform}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [*PYTHON, JAILS], stdin=theirs.fileno(), env=ENVIRONMENT, cwd="/", start_new_session=True
        )

    def stop() -> None:
        ours.close()
        server.kill()
        server.wait()

    atexit.register(stop)
    return ours


@functools.cache
def standard_library() -> tuple[list[tuple[str, str]], list[str]]:
    """What a sandbox shows of the system, as (path, path inside), and the folders in it that stay empty.

    A shared library is shown by every name that it has in its folder, as the loader may look for any of them.
    """
    said = subprocess.run([*PYTHON, ASK], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    folders, libraries = json.loads(said.stdout)
    tops = [folder for folder in folders if not any(Path(other) in Path(folder).parents for other in folders)]
    names = {
        (library, str(beside))
        for library in libraries
        for beside in Path(library).parent.glob(Path(library).name.partition(".so")[0] + ".so.*")
        if beside.resolve() == Path(library).resolve() and not any(Path(top) in beside.parents for top in tops)
    }
    packages = [Path(top, name) for top in tops for name in PACKAGES]
    shown = [(folder, folder) for folder in tops] + sorted(names)
    return shown, [str(folder) for folder in packages if folder.is_dir()]
