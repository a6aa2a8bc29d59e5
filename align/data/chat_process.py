"""Chat templates rendered by a process of their own, which is started once and restarted where a template ends it."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.data.chat_clock import template_time
from align.errors import InputError, LimitExceeded, RunError, one_line

WORKER = Path(__file__).with_name("chat_worker.py")
MAX_SECONDS = 10  # of processor time for one row; templates in use take milliseconds
MAX_BYTES = 1 << 30  # of address space
MAX_CHARACTERS = 32_000_000  # that a template writes


class Text(NamedTuple):
    """A rendered dialogue."""

    text: str
    blocks: list[tuple[int, int]]  # start and end of each generation block, in characters


class TemplateProcess:
    """The process that renders templates. It ends with this one, and is not shared with forked ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # process that started it
        self._numbers: dict[str, int] = {}  # of the templates that it knows

    def render(self, source: str, chats: Sequence[dict[str, Any]], variables: dict[str, Any]) -> list[Text]:
        """Return the text of each chat, given as what differs in the template's variables.

        Raise `InputError` if the template fails or exceeds a limit.
        """
        answer = self._answer(source, chats, variables, lenient=False)
        if "error" in answer:
            kind = LimitExceeded if answer.get("limit") else InputError
            raise kind(f"the chat template cannot render the dialogue: {one_line(answer['error'])}")
        return [Text(*text) for text in answer["texts"]]

    def render_all(self, source: str, chats: Sequence[dict[str, Any]], variables: dict[str, Any]) -> list[Text | None]:
        """Return the text of each chat, or None for one that has to be rendered alone to know its error."""
        answer = self._answer(source, chats, variables, lenient=True)
        if "error" in answer:
            return [None] * len(chats)
        return [None if text is None else Text(*text) for text in answer["texts"]]

    def _answer(
        self, source: str, chats: Sequence[dict[str, Any]], variables: dict[str, Any], *, lenient: bool
    ) -> dict[str, Any]:
        now = template_time().isoformat()
        with self._lock:
            return json.loads(
                self._ask(source, {"now": now, "chats": chats, "variables": variables, "lenient": lenient})
            )

    def close(self) -> None:
        """End the process."""
        process = self._process
        self._process = None
        self._numbers = {}
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _ask(self, source: str, request: dict[str, Any]) -> bytes:
        process = self._running()
        is_new = source not in self._numbers
        number = self._numbers.setdefault(source, len(self._numbers))
        message = {**request, "number": number, **({"source": source} if is_new else {})}
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer.endswith(b"\n"):
            return answer
        status = process.wait()
        self.close()
        return json.dumps({"error": _reason(status), "limit": True}).encode()

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the process, a new one if there is none that lives and belongs to this process."""
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.close()
        command = [sys.executable, "-P", str(WORKER), *map(str, (MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS))]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # signals to a terminal's group do not end it
            )
        except OSError as error:
            raise RunError(f"the process that renders chat templates cannot be started: {error}") from error
        self._owner = os.getpid()
        return self._process


def _reason(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it takes more than {MAX_SECONDS} s"
    return f"its process ended with status {status}"


TEMPLATES = TemplateProcess()
atexit.register(TEMPLATES.close)
