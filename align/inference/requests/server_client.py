"""Concurrent requests about one model to a server; transient errors are retried."""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from pydantic import TypeAdapter, ValidationError

from align.errors import InputError, one_line
from align.inference.requests.concurrency import ConcurrencyLimit
from align.inference.requests.connection import Connection
from align.inference.requests.model_names import listed_models, name_at_server
from align.inference.requests.retries import TransientError, call_with_retries, parse_retry_after
from align.inference.settings import ServerSettings
from align.redaction import add_secret

OK, FIRST_SERVER_ERROR = 200, 500
REFUSALS = {400, 413, 422}  # of one request: its dialogue does not fit the chat template, or is too long
RETRIED_STATUSES = {408, 409, 425, 429}  # below 500
OVERLOADED = {429, 503}
BAD_REQUEST = 400
# In the answer to a prompt that leaves too little of the model's context, of vLLM, SGLang and OpenAI
OVERLONG = re.compile(r"context[ _]length", re.IGNORECASE)
UNAUTHORIZED = (401, 403)

I = TypeVar("I")  # noqa: E741 - what is asked about
O = TypeVar("O")  # noqa: E741 - what is found out
A = TypeVar("A")  # an answer of the server


class RefusedRequest(InputError):
    """A request that the server will not answer, whenever it is sent. `reason` is its status and answer."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Sender:
    """Sends one request after the other."""

    client: ServerClient
    connection: Connection
    stopped: threading.Event  # no further request is sent once it is set

    def post(self, url: str, content: Mapping[str, Any], answer: TypeAdapter[A]) -> A | None:
        """Return the answer to a request, retried after transient errors; None if its text is too long.

        Raises `RefusedRequest` for a request that the server rejects, `InputError` if it would reject any, and
        `RunError` after the last failure.
        """

        def send() -> A | None:
            with self.client.limit.slot(self.stopped):
                return self._send(url, content, answer)

        client = self.client
        return call_with_retries(send, retries=client.settings.retries, url=client.url, stopped=self.stopped)

    def _send(self, url: str, content: Mapping[str, Any], kind: TypeAdapter[A]) -> A | None:
        """Send a request once; raise `TransientError` where a retry may help."""
        answer = self.connection.request("POST", url, content)
        if answer.status in RETRIED_STATUSES or answer.status >= FIRST_SERVER_ERROR:
            retry_after_s = parse_retry_after(answer.retry_after)
            is_overload = answer.status in OVERLOADED
            raise TransientError(f"HTTP {answer.status}: {answer.shown}", retry_after_s, is_overload=is_overload)
        if answer.status == BAD_REQUEST and OVERLONG.search(answer.shown):
            return None
        if answer.status != OK:
            reason = f"HTTP {answer.status}: {answer.shown}"
            message = f"{self.client.url} rejects a request for {self.client.model!r} with {reason}"
            raise RefusedRequest(message, reason) if answer.status in REFUSALS else InputError(message)
        try:
            return kind.validate_json(answer.body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise TransientError(f"{place or 'body'}: {first['msg']}, in the response {answer.shown!r}") from error


class ServerClient:
    """Asks a server about one model.

    `model` is its folder or Hub ID and `name` its name here; `settings.models` may give the server's name for it.
    Raises `InputError` if no server answers at `settings.base_url`, if it rejects the API key, or if it lists its
    models and this one is not among them.
    """

    def __init__(self, model: str, settings: ServerSettings, *, name: str) -> None:
        self.settings = settings
        self.limit = ConcurrencyLimit(settings.concurrency)
        self.url = settings.base_url.rstrip("/")
        self._headers = _authorization(settings.api_key_env)
        self.model = name_at_server(model, name, settings, self._models())  # the server's name

    def ask_all(self, items: Sequence[I], ask: Callable[[Sender, I], O]) -> Generator[O]:
        """Yield `ask(sender, item)` for each item in order of completion, as many at a time as the settings allow.

        After one has raised, no further request is sent. What the others are about to find is yielded, then the error
        is raised.
        """
        wanted = iter(items)
        results: queue.Queue[tuple[O] | BaseException | None] = queue.Queue()
        stopped = threading.Event()

        def work() -> None:
            try:
                with self._connection() as connection:
                    sender = Sender(self, connection, stopped)
                    for item in wanted:  # shared by all workers
                        if stopped.is_set():
                            break
                        results.put((ask(sender, item),))
            except BaseException as error:  # raised in the caller's thread
                results.put(error)  # before other workers notice and report their own
                stopped.set()
            results.put(None)

        # Daemon threads: an interrupted program does not wait for the server.
        workers = [
            threading.Thread(target=work, daemon=True) for _ in range(min(self.settings.concurrency, len(items)))
        ]
        try:
            yield from _collected(results, workers)
        finally:
            stopped.set()

    def _connection(self) -> Connection:
        return Connection(self._headers, self.settings.timeout_s)

    def _models(self) -> list[str] | None:
        """Return the models that the server offers, None if it has no list; raise if no request can succeed."""
        try:
            with self._connection() as connection:
                answer = connection.request("GET", f"{self.url}/models")
        except (TransientError, httpx2.InvalidURL) as error:
            raise InputError(
                f"no server answers at {self.settings.base_url!r} ({_cause(error)}): start it, or correct base_url"
            ) from error
        if answer.status in UNAUTHORIZED:
            variable = self.settings.api_key_env
            key = f"the key in ${variable}" if variable else "a request without a key"
            raise InputError(f"{self.url} rejects {key} with HTTP {answer.status}: set api_key_env")
        return listed_models(answer)


def _collected(
    results: queue.Queue[tuple[O] | BaseException | None], workers: Sequence[threading.Thread]
) -> Iterator[O]:
    """Yield the results of the workers, then raise the first failure."""
    failure: BaseException | None = None
    for each in workers:
        each.start()
    num_working = len(workers)
    while num_working:
        result = results.get()
        if result is None:
            num_working -= 1
        elif isinstance(result, BaseException):
            failure = failure or result
        else:
            yield result[0]
    if failure:
        raise failure


def _cause(error: Exception) -> str:
    kind = "" if isinstance(error, TransientError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error)}"


def _authorization(variable: str | None) -> dict[str, str]:
    """Return the header with the API key in the environment variable; no header if `variable` is None.

    Spaces and line breaks around the key are left out. The key is never shown: messages and responses that contain it
    are redacted.
    """
    if variable is None:
        return {}
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"the environment variable {variable} is not set", ("api_key_env",))
    add_secret(key)
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the key in ${variable} contains a line break or another character that no HTTP header can hold",
            ("api_key_env",),
        )
    return {"Authorization": f"Bearer {key}"}
