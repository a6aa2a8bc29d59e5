"""Requests to a server that is not trusted: bounded in time and size, whatever it sends."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx2

from align.errors import one_line
from align.inference.retries import TransientError
from align.redaction import printable

CONNECT_TIMEOUT_S = 10.0
MAX_BODY_BYTES = 32 << 20  # of an answer, decompressed; a million tokens take less
WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's, by content encoding
PLAIN = ("", "identity")
MAX_SHOWN = 300  # characters of a server's answer in an error


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
    """Sends requests, one at a time, in the thread that uses it.

    A request ends after `timeout_s` at the latest, also where the server sends a byte from time to time. Redirects are
    not followed.
    """

    def __init__(self, headers: Mapping[str, str], timeout_s: float) -> None:
        timeout = httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        # Uncompressed: a small compressed answer can be a large one
        self._client = httpx2.AsyncClient(headers={"Accept-Encoding": "identity", **headers}, timeout=timeout)
        self._runner, self._timeout_s = asyncio.Runner(), timeout_s

    def request(self, method: str, url: str, content: Any = None) -> Answer:  # noqa: ANN401 - any JSON
        """Return the answer to a request with JSON content.

        Raises `TransientError` where none arrives in time, or one that is too large or cannot be decoded.
        """
        try:
            return self._runner.run(self._request(method, url, content))
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise TransientError(f"no complete answer in {self._timeout_s:g} s ({type(error).__name__})") from error
        except httpx2.RequestError as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error

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
        try:
            self._runner.run(self._client.aclose())
        finally:
            self._runner.close()


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
