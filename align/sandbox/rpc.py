"""Calls between the two processes of a test run: the program in one sandbox, the tests in another.

The program is never asked whether it is right. The tests call it over a pipe, and what comes back is a plain value
that is rebuilt from JSON (`serialization`): it has the standard library's own `==`, whatever the program did to its
own. The program's process holds no test, no expected value and no verdict, so that nothing it reads, patches or prints
can forge one, nor can an early exit.

Limits that a test has in a single process, too:
- Where it compares two objects of the program's classes, their `__eq__` decides.
- Where it uses a name that neither it nor Python defines, the program defines it.
- Where it derives the expected value from an argument after the call, the program may have changed that argument.
- Where it checks no value, every program passes that raises no error.
- A program that knows the tests can return the expected values without computing them.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.sandbox import framing
from align.sandbox.serialization import Serializer

READ_DESCRIPTOR, WRITE_DESCRIPTOR = 3, 4
MAX_SHOWN = 160  # characters of a value, a test or an error in a message


class Disconnected(BaseException):
    """The other process has ended, or has sent an invalid message. Not an `Exception`, so that no test catches it."""


class ProgramError(Exception):
    """An error of the program of a class that is not built into Python."""


class Connection:
    """Calls in both directions: a process that waits for a result serves the other one's calls meanwhile."""

    def __init__(self, operations: Callable[[str], Callable[..., Any]], *, trusted: bool) -> None:
        self._operations = operations  # returns what runs for the name of an operation
        self._serializer = Serializer(self, trusted=trusted)
        self.last_value: Any = None  # that a call returned
        self.closed = ""  # why there are no more calls: "ended", or "sent an invalid message"

    def call(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any object of the program
        """Return the result of an operation in the other process, or raise its error."""
        if self.closed:
            raise Disconnected(self.closed)
        encode, decode = self._serializer.encode, self._serializer.decode
        named = {name: encode(value) for name, value in kwargs.items()}
        self._send(framing.pack_json({"call": operation, "args": [encode(arg) for arg in args], "kwargs": named}))
        while "call" in (message := self.receive()):
            self.serve(message)
        if "error" in message:
            raise _as_exception(*message["error"], in_iteration=operation == "__next__")
        for index, changed in message["changed"]:
            _update(args[index], decode(changed))
        self.last_value = decode(message["value"])
        return self.last_value

    def serve(self, message: Mapping[str, Any]) -> None:
        """Run the operation that the other process calls; reply with its value or error and the changed arguments."""
        encode, decode = self._serializer.encode, self._serializer.decode
        try:
            args = [decode(arg) for arg in message["args"]]
            kwargs = {name: decode(value) for name, value in message["kwargs"].items()}
            value = encode(self._operations(message["call"])(*args, **kwargs))
            after = [
                encode(arg) if type(arg) in MUTABLE else sent for arg, sent in zip(args, message["args"], strict=True)
            ]
            changed = [[index, arg] for index, arg in enumerate(after) if arg != message["args"][index]]
            reply = framing.pack_json({"value": value, "changed": changed})
        except Disconnected:
            raise
        except BaseException as error:  # SystemExit is raised in the caller, too
            names = [kind.__name__ for kind in type(error).__mro__]
            reply = framing.pack_json({"error": [names, str(error)[:MAX_SHOWN]]})
        self._send(reply)

    def receive(self) -> dict[str, Any]:
        """Return the next message of the other process."""
        try:
            message = json.loads(framing.read_frame(READ_DESCRIPTOR))
        except (EOFError, OSError) as error:
            raise self._close("ended") from error
        except (ValueError, RecursionError):
            message = None
        if isinstance(message, dict):
            return message
        raise self._close("sent an invalid message")

    def _send(self, message: bytes) -> None:
        try:
            framing.write(WRITE_DESCRIPTOR, message)
        except OSError as error:  # a broken pipe
            raise self._close("ended") from error

    def _close(self, why: str) -> Disconnected:
        self.closed = why
        return Disconnected(why)


MUTABLE = (list, dict, set, bytearray)


def _update(old: Any, new: Any) -> None:  # noqa: ANN401 - any value
    """Give an argument of the caller the content that the callee has left in its copy."""
    if type(old) is not type(new) or type(old) not in MUTABLE:
        return
    old.clear()
    (old.extend if isinstance(old, list | bytearray) else old.update)(new)


def _as_exception(names: Sequence[str], text: str, *, in_iteration: bool) -> Exception:
    """Return an error of the first built-in class among `names`, or a `ProgramError`, as for SystemExit.

    A StopIteration outside of iteration is a `ProgramError`: it would silently end a loop of the test,
    `all(map(...))`.
    """
    for name in names[:-3]:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and (kind is not StopIteration or in_iteration):
            try:
                return kind(shorten(text))
            except TypeError:  # UnicodeDecodeError needs five arguments
                break
    return ProgramError(f"{names[0]}: {shorten(text)}")


def shorten(text: str) -> str:
    """Return a text on one line, cut to `MAX_SHOWN` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_SHOWN else line[:MAX_SHOWN] + "..."
