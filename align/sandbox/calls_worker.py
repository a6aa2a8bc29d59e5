"""The worker that runs many programs of one function `f`, each in a child process (`function_calls`).

It holds no program and no answer: a child reads its program, isolates itself and writes to its own pipe, and the
answers are forwarded to the host unread. The worker is the first process of its namespace, to which no child can send
a signal. No two children run at the same time, and none can leave anything to the next.
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

from align.sandbox import framing

REQUESTS, RESULTS = 3, 4  # descriptors; in a child, REQUESTS becomes the pipe of its answers
ANSWERS = 3
MAX_ANSWER = 1000  # characters of one answer
MAX_ANSWERS = 1 << 15  # bytes of all answers of a program: less than a pipe holds
ERROR = "!"  # first character of an answer that is an error: no repr of a literal starts with it


def main(request: Mapping[str, Any], filter_syscalls: Callable[[], None]) -> None:
    """Run `num_programs` programs, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would let a child's signal through
    for _ in range(request["num_programs"]):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _run_program(writer, filter_syscalls)
        os.close(writer)
        ended = os.pidfd_open(child)
        on_time = bool(select.select([ended], [], [], request["wall_s"])[0])
        os.kill(child, signal.SIGKILL)  # a child that has ended keeps its process ID until it is waited for
        completed = os.waitpid(child, 0)[1] == 0 and on_time
        _forward(reader, completed=completed)
        os.close(ended)
        os.close(reader)


def _forward(reader: int, *, completed: bool) -> None:
    """Send one message about a program that has ended: whether it completed, then the content of its pipe."""
    size = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, bytes(4)))[0]
    size = size if size <= MAX_ANSWERS else 0  # a program may have enlarged its pipe
    framing.write(RESULTS, framing.LENGTH.pack(1 + size) + bytes([completed]))
    while size:
        size -= os.splice(reader, RESULTS, size)


def _run_program(writer: int, filter_syscalls: Callable[[], None]) -> NoReturn:
    """Read one program and its inputs, isolate this process, run the program and write its answers."""
    try:
        program, inputs = (framing.read_frame(REQUESTS).decode() for _ in range(2))
    except (EOFError, framing.InvalidFrame):
        os._exit(1)  # the process that asked has ended
    os.dup2(writer, ANSWERS)
    os.closerange(ANSWERS + 1, 1 << 16)
    filter_syscalls()
    left = MAX_ANSWERS
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(program, "<program>", "exec"), namespace)
        function = namespace["f"]
    except BaseException as error:  # SystemExit too
        os.write(ANSWERS, f"{ERROR}{type(error).__name__[:MAX_ANSWER]}\n".encode())
        os._exit(0)
    for text in inputs.split("\n"):
        try:
            answer = repr(function(ast.literal_eval(text)))
        except BaseException as error:
            answer = f"{ERROR}{type(error).__name__}"
        line = answer[:MAX_ANSWER].replace("\n", " ").encode(errors="replace") + b"\n"
        left -= len(line)
        if left < 0:
            break
        os.write(ANSWERS, line)
    os._exit(0)
