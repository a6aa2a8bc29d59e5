"""Messages over pipes and sockets: four bytes of length, big-endian, then the message.

Every process of this project that talks to another one over a descriptor uses this framing. It needs the standard
library only, because workers import it inside their sandbox.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from contextlib import ExitStack
from typing import IO, Any

LENGTH = struct.Struct(">I")
MAX_BYTES = 64 << 20  # of one message
CHUNK_BYTES = 1 << 16  # of one read: what a pipe holds


class InvalidFrame(ValueError):
    """The bytes received are not a message: truncated or too long."""


def pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Return the read end and the write end of a new pipe, both closed with the stack."""
    read_end, write_end = os.pipe()
    files = open(read_end, "rb", buffering=0), open(write_end, "wb", buffering=0)  # noqa: SIM115 - closed by the stack
    return stack.enter_context(files[0]), stack.enter_context(files[1])


def pack(data: bytes) -> bytes:
    """Return a message with its length in front."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"a message of more than {MAX_BYTES >> 20} MiB")
    return LENGTH.pack(len(data)) + data


def pack_json(message: object) -> bytes:
    """Return a message as JSON with its length in front."""
    return pack(json.dumps(message).encode())


def write(descriptor: int, data: bytes) -> None:
    """Write all bytes; blocks while the pipe is full."""
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]


def read_frame(descriptor: int, *, deadline: float | None = None, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the next message, without its length.

    `deadline` is on the monotonic clock. Raises `TimeoutError` at the deadline, `EOFError` where the other end was
    closed before the message, and `InvalidFrame` for a message that is truncated or longer than `max_bytes`.
    """
    header = _read_exactly(descriptor, LENGTH.size, deadline)
    if not header:
        raise EOFError("the other end is closed")
    if len(header) < LENGTH.size:
        raise InvalidFrame("a truncated length")
    length = LENGTH.unpack(header)[0]
    if length > max_bytes:
        raise InvalidFrame(f"a message of {length} bytes; at most {max_bytes} are accepted")
    data = _read_exactly(descriptor, length, deadline)
    if len(data) < length:
        raise InvalidFrame(f"{len(data)} of {length} bytes")
    return data


def read_json(descriptor: int, *, deadline: float | None = None, max_bytes: int = MAX_BYTES) -> Any:  # noqa: ANN401
    """Return the next message from JSON; errors as for `read_frame`, and those of `json.loads`."""
    return json.loads(read_frame(descriptor, deadline=deadline, max_bytes=max_bytes))


def _read_exactly(descriptor: int, size: int, deadline: float | None) -> bytes:
    """Return `size` bytes, fewer only where the other end is closed. Reads nothing of what follows them."""
    chunks: list[bytes] = []
    missing = size
    while missing:
        if deadline is not None and not is_readable(descriptor, deadline=deadline):
            raise TimeoutError
        chunk = os.read(descriptor, min(missing, CHUNK_BYTES))
        if not chunk:
            break
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)


def is_readable(descriptor: int, *, deadline: float) -> bool:
    """Wait until there is something to read, or the other end is closed; return False at the deadline."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
