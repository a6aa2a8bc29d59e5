"""Requests to a server that is not trusted: bounded in time and size, whatever it sends."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
import zlib
from collections.abc import Coroutine, Mapping
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import httpx2

from align.errors import one_line
from align.inference.requests.retries import TransientError
from align.redaction import printable

CONNECT_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 32 << 20  # of an answer, decompressed; a million tokens take less
WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's, by content encoding
PLAIN = ("", "identity")
LOCAL = ("all://127.0.0.1", "all://localhost")  # addresses that no proxy of the environment could reach
MAX_SHOWN = 300  # characters of a server's answer in an error

T = TypeVar("T")


class Answer(NamedTuple):
    """A complete answer of a server."""

    status: int
    retry_after: str | None  # header
    body: bytes

    @property
    def shown(self) -> str:
        """The body as text for an error."""
        return printable(one_line(self.body[: 8 * MAX_SHOWN].decode("utf-8", "replace")))[:MAX_SHOWN]


class Connection:
    """Sends requests, one at a time, for the thread that uses it; also one in which an event loop runs, as in Jupyter.

    A request ends after `timeout_s` at the latest, also where the server sends a byte from time to time. Redirects are
    not followed.
    """

    def __init__(self, headers: Mapping[str, str], timeout_s: float) -> None:
        timeout = httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        # Uncompressed: a small compressed answer can be a large one
        self._client = httpx2.AsyncClient(
            headers={"Accept-Encoding": "identity", **headers},
            timeout=timeout,
            verify=_certificates(),
            mounts=dict.fromkeys(LOCAL),
        )
        self._loop = _event_loop(os.getpid())
        self._timeout_s = timeout_s

    def request(self, method: str, url: str, content: Any = None) -> Answer:  # noqa: ANN401 - any JSON
        """Return the answer to a request with JSON content.

        Raises `TransientError` if none arrives in time, or one that is too large or cannot be decoded.
        """
        try:
            return self._run(self._request(method, url, content))
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise TransientError(f"no complete answer in {self._timeout_s:g} s ({type(error).__name__})") from error
        except httpx2.RequestError as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the coroutine returns; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    async def _request(self, method: str, url: str, content: Any) -> Answer:  # noqa: ANN401 - any JSON
        async with (
            asyncio.timeout(self._timeout_s),
            self._client.stream(method, url, json=content) as response,
        ):
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                _check_size(body)
        encoding = response.headers.get("content-encoding", "").strip().lower()
        return Answer(response.status_code, response.headers.get("retry-after"), _decoded(bytes(body), encoding))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._run(self._client.aclose())


@cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """Return a loop that runs in a thread of this process for all of its connections; a fork has no threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"requests of process {process}", daemon=True).start()
    return loop


@cache
def _certificates() -> ssl.SSLContext:
    """Return the context of all connections: reading the certificates takes longer than a request."""
    return httpx2.create_ssl_context()


def _check_size(body: bytes | bytearray) -> None:
    if len(body) > MAX_BODY_BYTES:
        raise TransientError(f"an answer of more than {MAX_BODY_BYTES >> 20} MiB")


def _decoded(body: bytes, encoding: str) -> bytes:
    """Return the decompressed body, or as much of it as shows that it is too large."""
    if encoding in PLAIN:
        return body
    if encoding not in WINDOW_BITS:
        raise TransientError(f"an answer with the content encoding {encoding[:40]!r}, which was not asked for")
    try:
        content = zlib.decompressobj(WINDOW_BITS[encoding]).decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error as error:
        raise TransientError(f"an answer that is not valid {encoding}: {error}") from error
    _check_size(content)
    return content
