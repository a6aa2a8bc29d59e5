"""The process that starts sandboxes: for each request it forks a supervisor, which forks and isolates a worker.

All of them are forks of this process, which has imported the workers' modules and sees no request's content. A worker
ends with its supervisor, and a supervisor with this process. Needs the standard library only.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import select
import signal
import socket
import sys
import types
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from align.sandbox import framing, isolation
from align.sandbox.isolation import LayerUnavailable


def serve(modules: Sequence[str]) -> None:
    """Fork a supervisor for each request: a socket to the process that asks, and the worker's descriptors."""
    for module in modules:
        importlib.import_module(module)
    sys.path.pop()  # the project's folder, from the command that started this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a supervisor
    requests = socket.socket(fileno=0)
    while True:
        data, received, _, _ = socket.recv_fds(requests, 1, 16)
        if not data:
            return
        if os.fork() == 0:
            try:
                requests.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                supervise(socket.socket(fileno=received[0]), received[1:])
            finally:
                os._exit(0)
        for descriptor in received:
            os.close(descriptor)


def supervise(channel: socket.socket, descriptors: Sequence[int]) -> None:
    """Run one worker and report how it ended; kill it where the other end of the channel is closed."""
    isolation.die_with_parent()
    try:
        request = framing.read_json(channel.fileno())
    except EOFError:
        return  # the process that asked has ended
    try:
        isolation.enter_namespaces()
    except (LayerUnavailable, OSError) as error:
        framing.write(channel.fileno(), framing.pack_json({"missing": str(error)}))
        return
    isolation.die_with_parent()  # a change of credentials may have reset it
    parent_closed, parent_open = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(parent_open)
        run_isolated(request, channel, descriptors, parent_closed)
    framing.write(channel.fileno(), framing.pack_json({"started": child}))
    for descriptor in descriptors:
        os.close(descriptor)
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, channel], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    report = {"code": os.waitstatus_to_exitcode(status), "cpu_s": used.ru_utime + used.ru_stime}
    framing.write(channel.fileno(), framing.pack_json({**report, "memory_mb": used.ru_maxrss / 1024}))


def run_isolated(
    request: Mapping[str, Any], channel: socket.socket, descriptors: Sequence[int], parent_closed: int
) -> None:
    """Isolate this process, then run the worker's `main`. Does not return."""
    report, parent_closed = (
        fcntl.fcntl(descriptor, fcntl.F_DUPFD, 200) for descriptor in (channel.detach(), parent_closed)
    )
    try:
        os.setsid()
        first_free = keep_descriptors(descriptors)
        filter_syscalls = isolate(request, parent_closed)
    except (LayerUnavailable, OSError) as error:
        framing.write(report, framing.pack_json({"missing": str(error)}))
        os._exit(1)
    os.closerange(first_free, 1 << 16)
    os.environ.clear()
    sys.argv[:] = [""]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.modules[request["module"]].main(request["argument"], *([filter_syscalls] if request["forks"] else []))
    os._exit(0)


def isolate(request: Mapping[str, Any], parent_closed: int) -> Callable[[], None]:
    """Apply every layer; a worker that forks has the last one, which is returned, applied by each of its children."""
    isolation.build_root(request)
    isolation.drop_privileges()
    isolation.die_with_parent()
    if select.select([parent_closed], [], [], 0)[0]:  # end of file: the parent ended before the call above
        os._exit(1)
    isolation.set_limits(request)
    filter_syscalls = partial(isolation.filter_syscalls, b64decode(request["filter"]))
    if request["forks"]:
        isolation.check_filter(filter_syscalls)
    else:
        filter_syscalls()
    return filter_syscalls


def keep_descriptors(descriptors: Sequence[int]) -> int:
    """Leave an empty standard input and output open, and `descriptors` from 3 on; return the first free number."""
    empty = os.open(os.devnull, os.O_RDWR)
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in [empty, empty, empty, *descriptors]]
    for number, descriptor in enumerate(high):
        os.dup2(descriptor, number)
    return 3 + len(descriptors)
