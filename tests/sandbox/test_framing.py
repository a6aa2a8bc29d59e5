"""Messages over pipes: they arrive unchanged, and invalid ones raise an error in bounded time."""

import json
import os
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from threading import Thread

import pytest

from align.sandbox import framing

MESSAGES = [b"", b"x", bytes(range(256)), b"\n\n", b"y" * (3 * framing.CHUNK_BYTES + 1)]


@pytest.fixture
def ends():
    """Return the descriptors of a pipe: read end, write end."""
    with ExitStack() as stack:
        reader, writer = framing.pipe(stack)
        yield reader.fileno(), writer.fileno()


def test_messages_arrive_in_order_and_unchanged(ends):
    reader, writer = ends
    sending = Thread(target=lambda: [framing.write(writer, framing.pack(message)) for message in MESSAGES])
    sending.start()
    assert [framing.read_frame(reader) for _ in MESSAGES] == MESSAGES
    sending.join()


def test_json_messages_keep_lone_surrogates(ends):
    reader, writer = ends
    message = {"a": [1, None, 0.5, "\ud800", "ü"]}
    framing.write(writer, framing.pack_json(message))
    assert framing.read_json(reader) == message


def test_reading_a_message_leaves_the_next_one_in_the_pipe(ends):
    reader, writer = ends
    framing.write(writer, framing.pack(b"first") + framing.pack(b"second"))
    assert framing.read_frame(reader) == b"first"
    assert os.read(reader, 100) == framing.pack(b"second")


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", EOFError),
        (b"\0\0", framing.InvalidFrame),
        (b"\0\0\0\5abc", framing.InvalidFrame),
        (struct.pack(">I", framing.MAX_BYTES + 1), framing.InvalidFrame),
        (b"\xff\xff\xff\xff" + b"x" * 9, framing.InvalidFrame),
    ],
)
def test_invalid_messages_raise(sent, error):
    reader, writer = os.pipe()
    os.write(writer, sent)
    os.close(writer)
    with pytest.raises(error):
        framing.read_frame(reader)
    os.close(reader)


def test_a_message_longer_than_the_reader_accepts_raises(ends):
    reader, writer = ends
    framing.write(writer, framing.pack(b"12345"))
    with pytest.raises(framing.InvalidFrame, match="5 bytes; at most 4"):
        framing.read_frame(reader, max_bytes=4)


def test_a_message_of_too_many_bytes_is_not_sent():
    with pytest.raises(ValueError, match="more than 64 MiB"):
        framing.pack(bytes(framing.MAX_BYTES + 1))


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\0\0\5", b"\0\0\0\5abc"])
def test_the_deadline_holds_before_and_inside_a_message(ends, sent):
    reader, writer = ends
    os.write(writer, sent)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        framing.read_frame(reader, deadline=started + 0.05)
    assert 0.04 < time.monotonic() - started < 100


def test_framing_needs_the_standard_library_only():
    code = "import sys, json, align.sandbox.framing; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not {"pydantic", "torch", "numpy", "omegaconf"} & loaded
