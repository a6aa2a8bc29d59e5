"""Run a server that cannot outlive the process that started it, however that process ends.

A script for the standard library alone: `python -I -S supervisor.py PARENT GRACE_S COMMAND...`. It runs the command
until the command ends, its standard input is closed, or the process PARENT is gone. Then it ends the command with all
its descendants: SIGTERM, and after GRACE_S seconds SIGKILL. Should the supervisor itself be killed, the kernel kills
the command.

On Linux descendants are found whatever group or session they moved to, because orphans become children of the
supervisor. Elsewhere those in the command's process group are ended.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

POLL_S = 0.2  # between two looks at the command and the parent
WAIT_S = 0.02  # between two looks at descendants that are ending
KILL_S = 30.0  # a process that SIGKILL has not ended by then waits in the kernel
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
NOT_FOUND = 127  # exit status of a shell for a command that cannot be started
IS_LINUX = sys.platform == "linux"


def supervise(parent: int, grace_s: float, command: Sequence[str]) -> int:
    """Run the command as described above and return its exit status; 128 and more after a signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        return 1
    child = _start(command)
    status = None
    while status is None and not asked and os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
        status = _reaped().get(child)
    found = _end(child, grace_s)
    code = os.waitstatus_to_exitcode(status if status is not None else found.get(child, 0))
    return code if code >= 0 else 128 - code


def _start(command: Sequence[str]) -> int:
    """Start the command in its own process group; return its process id."""
    supervisor = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == supervisor:
            os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
            os.execvp(command[0], list(command))
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.stderr.flush()
    os._exit(NOT_FOUND)


def _end(child: int, grace_s: float) -> dict[int, int]:
    """End the command with its descendants; return the wait statuses of those that were children."""
    began = time.monotonic()
    reaped = _reaped()
    _send(child, signal.SIGTERM)
    while alive := _alive(child, reaped):
        waited_s = time.monotonic() - began
        if waited_s > grace_s + KILL_S:
            sys.stderr.write(f"processes {alive} do not end\n")
            break
        if waited_s > grace_s:
            _send(child, signal.SIGKILL)
        time.sleep(WAIT_S)
        reaped |= _reaped()
    return reaped


def _send(child: int, number: signal.Signals) -> None:
    """Send a signal to the command's group and to all descendants."""
    for send, target in [(os.killpg, child), *((os.kill, pid) for pid in _descendants())]:
        with suppress(ProcessLookupError, PermissionError):  # ended meanwhile, or belongs to another user
            send(target, number)


def _alive(child: int, reaped: dict[int, int]) -> list[int]:
    if IS_LINUX:
        return _descendants()
    try:
        os.killpg(child, 0)
    except (ProcessLookupError, PermissionError):
        return []
    return [child] if child not in reaped else []


def _descendants() -> list[int]:
    """Return the process ids of all descendants that run, on Linux."""
    children: dict[int, list[int]] = {}
    zombies: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*") if IS_LINUX else ():
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # ended meanwhile
            continue
        children.setdefault(int(parent), []).append(int(folder.name))
        zombies |= {int(folder.name)} if state == "Z" else set()
    found = list[int]()
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return [pid for pid in found if pid not in zombies]


def _reaped() -> dict[int, int]:
    """Return the wait statuses of the children that have ended."""
    found: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found[pid] = status


def _prctl(option: int, value: int) -> None:
    if IS_LINUX:
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
