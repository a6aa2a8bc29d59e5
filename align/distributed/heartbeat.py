"""Heartbeats: every process of a launch reports once a second that it is alive and what it is doing.

When a node loses its network no connection is closed, so the other processes would wait in a collective until its
timeout. Here they notice the missing heartbeats, name the lost process and exit; rerunning the same command resumes
from the last checkpoint.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - its documented name

INTERVAL_S = 1.0
TIMEOUT_S = 20.0  # without a heartbeat; they are sent from a thread, whatever the process computes
EXIT_WAIT_S = 5.0  # how long a process may take to exit after its connections were closed, on a busy machine
ENDED = "ended"  # stored by a process that exits normally; by the main process also under this key
LOST = "lost"  # key under which the main process names a lost process to the others


class Heartbeat:
    """The heartbeat of this process, and what it knows of the other processes."""

    stopped = threading.Event()  # of all heartbeats of the process

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.activity = "starting"  # what this process is doing, for error messages of the others
        self._hosts: list[tuple[str, int]] = [(socket.gethostname(), os.getpid())]
        if self.world_size > 1:
            self._hosts = gather_object(self._hosts)
            self._store = self._connect()
            self._last_response = time.monotonic()  # of the store
            atexit.register(self._on_exit)
            self._sender = threading.Thread(target=self._send, daemon=True)
            self._sender.start()
            threading.Thread(target=self._watch_store, daemon=True).start()

    def dead_processes(self) -> list[int]:
        """Return the ranks of the processes of this host that have exited; wait briefly for one that is exiting."""
        host = socket.gethostname()
        start = time.monotonic()
        while True:
            dead = [rank for rank, (name, pid) in enumerate(self._hosts) if name == host and _has_exited(pid)]
            if dead or time.monotonic() - start > EXIT_WAIT_S:
                return dead
            time.sleep(EXIT_WAIT_S / 100)

    def _connect(self) -> TCPStore:
        """Connect to the store that the main process serves."""
        host = os.environ.get("MASTER_ADDR", "localhost")
        options: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=TIMEOUT_S)}
        server = TCPStore(host, 0, is_master=True, **options) if self.rank == 0 else None
        port: int = broadcast_object_list([server.port if server is not None else 0])[0]
        return server if server is not None else TCPStore(host, port, is_master=False, **options)

    def _send(self) -> None:
        """Send heartbeats until they are stopped; exit when the main process reports a lost process."""
        seen = _Seen(self.world_size)
        num_sent = 0
        while not self.stopped.is_set():
            num_sent += 1
            try:
                self._store.set(str(self.rank), json.dumps([num_sent, self.activity]))
                if self.rank == 0 and (lost := seen.update(self._store)) is not None:
                    self._store.set(LOST, self._message(lost, seen.last[lost]))
                if self._store.check([LOST]):
                    self._exit(self._store.get(LOST).decode())
                if self._store.check([ENDED]):
                    stop_heartbeats()
                self._last_response = time.monotonic()
            except RuntimeError:  # the connection is lost; `_watch_store` decides when that has lasted too long
                pass
            self.stopped.wait(INTERVAL_S)
        with suppress(RuntimeError):  # the main process may have exited already
            self._store.set(ENDED if self.rank == 0 else str(self.rank), ENDED)

    def _on_exit(self) -> None:
        """Stop the heartbeats at exit; the main process, which serves the store, waits until all others know."""
        stop_heartbeats()
        self._sender.join(TIMEOUT_S)
        if self.rank == 0:
            others = [str(rank) for rank in range(1, self.world_size)]
            start = time.monotonic()
            while not self._have_ended(others) and time.monotonic() - start < 2 * INTERVAL_S:
                time.sleep(INTERVAL_S / 50)

    def _have_ended(self, ranks: list[str]) -> bool:
        """Return whether these processes have stopped their heartbeats."""
        return self._store.check(ranks) and all(value.decode() == ENDED for value in self._store.multi_get(ranks))

    def _watch_store(self) -> None:
        """Exit when the store has not responded for too long."""
        while time.monotonic() - self._last_response <= TIMEOUT_S:
            if self.stopped.wait(INTERVAL_S):
                return
        self._exit(self._message(0, ""))

    def _message(self, rank: int, last: str) -> str:
        activity = f"; last activity: {json.loads(last)[1]}" if last else ""
        return f"process {rank} on {self._hosts[rank][0]} sent no heartbeat for {TIMEOUT_S:.0f} s{activity}"

    def _exit(self, message: str) -> NoReturn:
        """Exit at once, even if the main thread waits in a collective."""
        sys.stderr.write(f"align: process {self.rank} of {self.world_size}: {self.activity}: {message}\n")
        sys.stderr.flush()
        os._exit(1)


class _Seen:
    """The last heartbeat of every process, and when it changed, as the main process reads them from the store."""

    def __init__(self, world_size: int) -> None:
        self._keys = [str(rank) for rank in range(world_size)]
        self.last, self._changed = [""] * world_size, [time.monotonic()] * world_size

    def update(self, store: TCPStore) -> int | None:
        """Read all heartbeats; return the rank of a process whose heartbeats have stopped, or None."""
        current = [value.decode() for value in store.multi_get(self._keys)] if store.check(self._keys) else self.last
        now = time.monotonic()
        for rank, (new, old) in enumerate(zip(current, self.last, strict=True)):
            if new != old:
                self._changed[rank] = now
        self.last = current
        silent = (rank for rank, time_s in enumerate(self._changed) if now - time_s > TIMEOUT_S)
        return next((rank for rank in silent if self.last[rank] != ENDED), None)


@cache
def get_heartbeat(rank: int, world_size: int) -> Heartbeat:
    """Return the only heartbeat of this process; all processes make the first call together."""
    return Heartbeat(rank, world_size)


def stop_heartbeats() -> None:
    """Stop sending and checking heartbeats; called before shutdown, when processes exit in any order."""
    Heartbeat.stopped.set()


def _has_exited(pid: int) -> bool:
    """Return whether the process has exited, even if its parent has not yet reaped it."""
    status = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").is_file():  # not on Linux
        return False
    try:
        return status.read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True
