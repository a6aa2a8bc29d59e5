"""Forward the progress, metrics and error of a step that runs in `accelerate launch`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from align.artifacts import METRICS, read_json, write_json
from align.distributed.progress import RESOURCES, Progress

PHASES = "phases.json"  # in the working folder: the phases of a launched step, and the units done in the last
WRITE_EVERY_S = 1.0
TRAIN = "train"  # the phase that writes a line of metrics for each unit
TRACEBACK = "Traceback (most recent call last):"
CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
RANK = re.compile(r"\[rank\d+\]: ?")  # before each line of a traceback that torch prints


class WrittenProgress:
    """Progress of a launched step that is forwarded, and written to a file for the process that launched it."""

    def __init__(self, progress: Progress, working: Path) -> None:
        self._progress = progress
        self._path = working / PHASES
        self._phases: list[dict[str, Any]] = []
        self._done, self._written_s = 0, 0.0
        self._metrics: dict[str, float] = {}  # the last ones of the phase
        self._attempt = uuid4().hex

    def note(self, text: str) -> None:
        """Forward to the progress."""
        self._progress.note(text)

    def watch(self, step: str, state: str) -> None:
        """Do nothing: the process that launched this one shows the states."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Forward to the progress, and write."""
        self._progress.phase(name, total, done)
        self._phases.append({"name": name, "total": total, "done": done})
        self._done = done
        self._metrics = {}
        self._write()

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Forward to the progress, and write about once a second."""
        self._progress.advance(units, metrics)
        self._done += units
        self._metrics |= metrics or {}
        if time.monotonic() - self._written_s > WRITE_EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written_s = time.monotonic()
        written = {"attempt": self._attempt, "phases": self._phases, "done": self._done, "metrics": self._metrics}
        write_json(self._path, written)


class Follower:
    """Passes on the progress that a launched step writes; a file of an earlier attempt has to be removed before."""

    def __init__(self, working: Path, progress: Progress) -> None:
        self._phases = working / PHASES
        self._metrics = working / METRICS
        self._progress = progress
        self._attempt = ""
        self._num_phases = 0
        self._name = ""
        self._done = 0
        self._resources: dict[str, float] = {}  # the last ones that the step has written

    def look(self) -> None:
        """Pass on what was written since the last look: every phase, and in training every line of metrics."""
        if not self._phases.is_file():
            return
        written = read_json(self._phases)
        if written["attempt"] != self._attempt:  # a requeued job starts with the first phase again
            self._attempt = written["attempt"]
            self._num_phases = 0
            self._name = ""
            self._done = 0
        self._resources = {name: value for name, value in written["metrics"].items() if name in RESOURCES}
        self._pass_on_metrics()
        for phase in written["phases"][self._num_phases :]:
            self._progress.phase(phase["name"], phase["total"], phase["done"])
            self._name, self._done = phase["name"], phase["done"]
            self._num_phases += 1
            self._pass_on_metrics()
        if self._name != TRAIN and written["done"] > self._done:
            self._progress.advance(written["done"] - self._done, written.get("metrics"))
            self._done = written["done"]

    def _pass_on_metrics(self) -> None:
        if self._name != TRAIN or not self._metrics.is_file():
            return
        lines = self._metrics.read_text("utf-8").splitlines(keepends=True)
        for line in [line for line in lines[self._done :] if line.endswith("\n")]:
            self._progress.advance(1, {**self._resources, **json.loads(line)})
            self._done += 1


def failure_in(log: str) -> str:
    """Return why a launched step failed: our own error, else the exception of the first traceback, else the last line.

    >>> failure_in("align: step 2: the loss is nan")
    'align: step 2: the loss is nan'
    """
    lines = [line for line in log.splitlines() if line.strip()]
    own = next((line for line in lines if line.startswith("align: ")), None)
    return own or _first_exception(lines) or (lines[-1].strip() if lines else "no output")


def _first_exception(lines: list[str]) -> str | None:
    """Return the last exception of the first chain of tracebacks, of the process that prints the first one."""
    first = next((number for number, line in enumerate(lines) if line.endswith(TRACEBACK)), None)
    if first is None:
        return None
    prefix = lines[first].removesuffix(TRACEBACK)
    own = [line.removeprefix(prefix) for line in lines[first:] if line.startswith(prefix)]
    if not RANK.fullmatch(prefix):
        own = [line for line in own if not RANK.match(line)]
    found: str | None = None
    is_next = True  # whether the next traceback belongs to the chain
    for line in own:
        if line == TRACEBACK and is_next:
            found = None
            is_next = False
        elif found is None and not line.startswith(" "):
            found = line
        elif line.startswith(CHAINED):
            is_next = True
        elif found is not None:
            break  # further lines of the message, or other output
    return found
