"""The process that runs many programs of one function `f`, each in a child of its own (`code_calls`).

It holds no program and no answer: a child reads its own program, locks itself up and writes to a pipe of its own, and
the answers go on to the host unread. It is the first process of its namespace, to which no child can send a signal; no
child lives beside another, and nothing that one writes is left to the next.
"""

from __future__ import annotations

import ast
import fcntl
import os
import select
import signal
import struct
import termios
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

ORDERS, RESULTS = 3, 4  # descriptors; in a child the first is where its answers go
LENGTH = struct.Struct(">I")  # before each part of an order: the program, then its inputs, one a line
REPORT = struct.Struct(">?I")  # after each program: whether it ended in time and by itself, and the bytes that follow
MOST_ANSWER = 1000  # characters of one answer
MOST_ANSWERS = 1 << 15  # bytes of all answers of a program: less than a pipe holds
ERROR = "!"  # begins the line of an answer that is none: no value of Python is written so


def main(order: Mapping[str, Any], lock: Callable[[], None]) -> None:
    """Run as many programs as the order says, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would let a child's signal through
    for _ in range(order["num_programs"]):
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            _child(writes, lock)
        os.close(writes)
        ended = os.pidfd_open(child)
        on_time = bool(select.select([ended], [], [], order["wall_s"])[0])
        os.kill(child, signal.SIGKILL)  # one that has ended is still there until it is waited for
        sound = os.waitpid(child, 0)[1] == 0 and on_time
        _pass_on(reads, sound=sound)
        os.close(ended)
        os.close(reads)


def _pass_on(reads: int, *, sound: bool) -> None:
    """Report on a program that has ended and move what is in its pipe to the results."""
    size = struct.unpack("i", fcntl.ioctl(reads, termios.FIONREAD, bytes(4)))[0]
    size = size if size <= MOST_ANSWERS else 0  # a program may have widened its pipe
    os.write(RESULTS, REPORT.pack(sound, size))
    while size:
        size -= os.splice(reads, RESULTS, size)


def _child(writes: int, lock: Callable[[], None]) -> NoReturn:
    """The whole life of a program."""
    program, inputs = (_read(LENGTH.unpack(_read(LENGTH.size))[0]).decode() for _ in range(2))
    os.dup2(writes, ORDERS)
    os.closerange(RESULTS, 1 << 16)
    lock()
    left = MOST_ANSWERS
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(program, "<program>", "exec"), namespace)
        function = namespace["f"]
    except BaseException as error:  # SystemExit too
        os.write(ORDERS, f"{ERROR}{type(error).__name__[:MOST_ANSWER]}\n".encode())
        os._exit(0)
    for text in inputs.split("\n"):
        try:
            answer = repr(function(ast.literal_eval(text)))
        except BaseException as error:
            answer = f"{ERROR}{type(error).__name__}"
        line = answer[:MOST_ANSWER].replace("\n", " ").encode(errors="replace") + b"\n"
        left -= len(line)
        if left < 0:
            break
        os.write(ORDERS, line)
    os._exit(0)


def _read(size: int) -> bytes:
    """Exactly so many bytes of the orders: what follows is the next program's."""
    data = b""
    while len(data) < size:
        more = os.read(ORDERS, size - len(data))
        if not more:
            os._exit(1)  # whoever asked has gone
        data += more
    return data
