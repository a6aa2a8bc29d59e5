"""Who is still there: every process of a launch says once a second that it lives, and what it is doing.

A process whose node is cut off closes no connection: the others would wait in a collective for as long as that may
take. Here they notice its silence, say whose it is, and end; the same command goes on from the last checkpoint.
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

BEAT_S = 1.0
SILENCE_S = 20.0  # after which a process is taken for gone; whatever it computes, its heart beats in its own thread
DYING_S = 1.0  # from the end of a process's connections to its own
ENDED = "ended"  # what a process says when it ends by itself, and the first under this name
LOST = "lost"  # under which the first process tells the others who is gone


class Heartbeat:
    """The beat of this process, and what it knows of the others'."""

    over = False  # of every heart of the process

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count
        self.place = "starting"  # what this process is doing, for the others to know
        self._homes: list[tuple[str, int]] = [(socket.gethostname(), os.getpid())]
        if self.count > 1:
            self._homes = gather_object(self._homes)
            self._store = self._joined()
            self._heard = time.monotonic()  # when the store last answered
            atexit.register(self._farewell)
            self._beating, watching = (threading.Thread(target=each, daemon=True) for each in (self._beat, self._watch))
            self._beating.start()
            watching.start()

    def gone(self) -> list[int]:
        """Processes of this machine that are no more; one that is just dying is waited for."""
        here, began = socket.gethostname(), time.monotonic()
        while True:
            dead = [number for number, (host, process) in enumerate(self._homes) if host == here and _is_dead(process)]
            if dead or time.monotonic() - began > DYING_S:
                return dead
            time.sleep(DYING_S / 100)

    def _joined(self) -> TCPStore:
        """The store that the first process serves."""
        host = os.environ.get("MASTER_ADDR", "localhost")
        options: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=SILENCE_S)}
        served = TCPStore(host, 0, is_master=True, **options) if self.number == 0 else None
        port: int = broadcast_object_list([served.port if served is not None else 0])[0]
        return served if served is not None else TCPStore(host, port, is_master=False, **options)

    def _beat(self) -> None:
        """Say that this process lives, and hear of the others; a store that does not answer lets this stand still."""
        told, changed = [""] * self.count, [time.monotonic()] * self.count
        names = [str(number) for number in range(self.count)]
        beats = 0
        while not self.over:
            beats += 1
            try:
                self._store.set(str(self.number), json.dumps([beats, self.place]))
                if self.number == 0:
                    said = (
                        [each.decode() for each in self._store.multi_get(names)] if self._store.check(names) else told
                    )
                    now = time.monotonic()
                    changed = [now if new != old else at for new, old, at in zip(said, told, changed, strict=True)]
                    told = said
                    silent = [at for at in range(self.count) if now - changed[at] > SILENCE_S and told[at] != ENDED]
                    if silent:
                        self._store.set(LOST, self._word_of(silent[0], told[silent[0]]))
                if self._store.check([LOST]):
                    self._end(self._store.get(LOST).decode())
                Heartbeat.over = Heartbeat.over or self._store.check([ENDED])
                self._heard = time.monotonic()
            except RuntimeError:  # the connection is gone: the watch decides when that has lasted too long
                pass
            time.sleep(BEAT_S)
        with suppress(RuntimeError):  # the first is gone already
            self._store.set(ENDED if self.number == 0 else str(self.number), ENDED)

    def _farewell(self) -> None:
        """End the beat in peace, with the process; the first, with whom the store goes, lets all hear of it."""
        rest()
        self._beating.join(SILENCE_S)
        if self.number == 0:
            time.sleep(2 * BEAT_S)

    def _watch(self) -> None:
        """End when the store has not answered for too long."""
        while time.monotonic() - self._heard <= SILENCE_S:
            time.sleep(BEAT_S)
            if self.over:
                return
        self._end(self._word_of(0, ""))

    def _word_of(self, number: int, told: str) -> str:
        """What there is to say of a process that is silent."""
        last = f"; its last word: {json.loads(told)[1]}" if told else ""
        return f"process {number} on {self._homes[number][0]} has not been heard of for {SILENCE_S:.0f} s{last}"

    def _end(self, word: str) -> NoReturn:
        """End this process at once, whatever it waits for."""
        sys.stderr.write(f"align: process {self.number} of {self.count}: {self.place}: {word}\n")
        sys.stderr.flush()
        os._exit(1)


@cache
def heartbeat(number: int, count: int) -> Heartbeat:
    """The one heart of this process; the first call is made by all of them together."""
    return Heartbeat(number, count)


def rest() -> None:
    """Say no more and miss nobody: the end is near, and whoever comes to it first takes the store along."""
    Heartbeat.over = True


def _is_dead(process: int) -> bool:
    """Whether the process has ended, though its parent may not have taken note of that."""
    status = Path(f"/proc/{process}/stat")
    if not Path("/proc/self/stat").is_file():  # no Linux
        return False
    try:
        return status.read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True
