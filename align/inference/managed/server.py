"""One server of a model: started in a session of its own, watched until it answers, and stopped with all of it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from align.errors import RunError, one_line
from align.inference.managed import supervisor
from align.inference.managed.kinds import HOST, KINDS, ServedModel
from align.inference.managed.settings import ManagedSettings
from align.inference.managed.version import command_words, server_environment
from align.inference.requests.connection import Answer, Connection
from align.inference.requests.model_names import listed_models
from align.inference.requests.retries import TransientError
from align.redaction import printable, redact

POLL_S = 0.25  # between two looks at a server that starts or ends
ANSWER_S = 5.0  # within which a server that is ready answers
GRACE_S = 10.0  # between SIGTERM and SIGKILL
STOP_S = GRACE_S + supervisor.KILL_S + 10.0  # within which the supervisor must have ended the server
END_S = 30.0  # within which a server that no longer answers has ended, with its supervisor
PORTS = 3  # ports to try where another program takes the first between the choice of it and the server's start
OK = 200
TAIL_BYTES, MAX_LINE = 8192, 300  # of the server's log, and of its last line in an error


class ManagedServer:
    """A server that is running between `start` and `stop`. It ends with this process, even after SIGKILL."""

    def __init__(self, settings: ManagedSettings, model: ServedModel, log: Path) -> None:
        self._settings = settings
        self._kind = KINDS[settings.kind]
        self._log = log
        # Another server at the same address cannot be taken for this one
        name = f"{model.name}-{secrets.token_hex(4)}" if self._kind.has_names else model.path
        self._model = model._replace(name=name)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._root = ""  # URL

    @property
    def name(self) -> str:
        """The name under which the server offers the model."""
        return self._model.name

    def start(self) -> str:
        """Start the server and return its URL with /v1 once it offers the model.

        Raises `RunError` with the last line of its log if it ends, if it does not answer in time, or if it does not
        list the model; `InputError` if there is no such command.
        """
        for attempt in range(1, PORTS + 1):
            port = free_port()
            self._root = f"http://{HOST}:{port}"
            try:
                self._start(port)
                self._wait_until_ready()
            except RunError:
                self.stop()
                if attempt < PORTS and is_taken(port):
                    continue
                raise
            except BaseException:  # an interrupt
                self.stop()
                raise
            return f"{self._root}/v1"
        raise AssertionError("the last attempt returns or raises")

    @property
    def has_ended(self) -> bool:
        """Whether the server has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def has_failed(self) -> bool:
        """Return whether the server has ended by itself; wait for the end of one that does not answer."""
        deadline = time.monotonic() + END_S
        while self._process is not None and not self.has_ended:
            if self._health() is not None or time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return self.has_ended

    def last_line(self) -> str:
        """Return the last line of the server's output, for an error."""
        with self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - TAIL_BYTES))
            lines = printable(file.read().decode("utf-8", "replace")).strip().splitlines()
        return one_line(lines[-1])[:MAX_LINE] if lines else "it printed nothing"

    def stop(self) -> None:
        """Stop the server with all of its processes: SIGTERM, then SIGKILL. Returns when they have ended."""
        process = self._process
        self._process = None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # which the supervisor waits for
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):  # ended meanwhile
                    each.kill()
            process.wait()

    def _start(self, port: int) -> None:
        settings = self._settings
        command = [*command_words(settings), *self._kind.arguments(settings, self._model, port)]
        watched = [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), str(GRACE_S), *command]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            log.write(f"$ {redact(' '.join(command))}\n".encode())
            log.flush()
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                watched,
                env=server_environment(settings),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        title, ready_s = self._kind.title, self._settings.ready_s
        deadline = time.monotonic() + ready_s
        while (answer := self._models()) is None:
            if self.has_ended:
                raise RunError(f"{title} ended before it was ready: {self.last_line()}; see {self._log}")
            if time.monotonic() > deadline:
                raise RunError(
                    f"{title} was not ready after {ready_s:g} s (ready_s), last output: {self.last_line()}; see "
                    f"{self._log}"
                )
            time.sleep(POLL_S)
        listed = listed_models(answer)
        if listed is None or self.name not in listed:
            shown = "no models" if not listed else ", ".join(map(repr, listed))
            raise RunError(f"{title} lists {shown} where {self.name!r} was to be served; see {self._log}")

    def _models(self) -> Answer | None:
        """Return the answer to a request for the models; None where the server is not ready, or too busy to answer."""
        health = self._health()
        return self._asked("/v1/models") if health is not None and health.status == OK else None

    def _health(self) -> Answer | None:
        return self._asked("/health")

    def _asked(self, path: str) -> Answer | None:
        """Return the answer of the server; None where none arrives in time."""
        with suppress(TransientError), Connection({}, ANSWER_S) as connection:
            return connection.request("GET", f"{self._root}{path}")
        return None


def free_port() -> int:
    """Return a port that no program listens on at the moment."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


def is_taken(port: int) -> bool:
    """Return whether a program listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are ending do not count
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False
