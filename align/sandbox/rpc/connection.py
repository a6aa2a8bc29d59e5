"""Messages between the two processes: a process that waits for a result serves the other one's calls meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from align.sandbox import framing
from align.sandbox.rpc.operations import ITERATION
from align.sandbox.rpc.proxies import Handle
from align.sandbox.rpc.serialization import Serializer
from align.sandbox.rpc.streams import Streams, replaced

READ_DESCRIPTOR, WRITE_DESCRIPTOR = 3, 4
MAX_SHOWN = 160  # characters of a value, a test or an error in a message


class Disconnected(BaseException):
    """The other process has ended, or has sent an invalid message. Not an `Exception`, so that no test catches it."""


class ProgramError(Exception):
    """An error of the program that would not be seen as one where it is raised."""


class Connection:
    """Calls in both directions."""

    def __init__(self, operations: Callable[[str], Callable[..., Any]], *, trusted: bool) -> None:
        self._operations = operations  # returns what runs for the name of an operation
        self._serializer = Serializer(self, trusted=trusted)
        self._lock = threading.RLock()
        self._streams = Streams() if trusted else None
        self.trusted = trusted
        self.busy = False
        self.last_value: Any = None  # that a call returned
        self.closed = ""  # why there are no more calls: "ended", or "sent an invalid message"

    def call(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any object of the program
        """Return the result of an operation in the other process, or raise its error."""
        with self._lock:
            reply = self._exchange(operation, args, kwargs)
            if "error" in reply:
                raise self._received(reply["error"], as_error_of=operation)
            self.last_value = reply["value"]
            return self.last_value

    def derive(self, kind: type, bases: list[type], namespace: dict[str, Any], named: dict[str, Any]) -> Handle:
        """Create a class in the other process; return the handle that makes `kind` its mirror."""
        number = self.call("derive", kind.__name__, bases, namespace, **named)
        self._serializer.adopt(number, kind)
        return Handle(self, number)

    def number_of(self, value: object) -> int:
        """Return the number by which the other process knows an object of this one."""
        return self._serializer.number_of(value)

    def _exchange(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Send a call and return the reply, with its value or error decoded."""
        if self.closed:
            raise Disconnected(self.closed)
        busy_before = self.busy
        self.busy = True
        try:
            encode = self._serializer.encode
            message: dict[str, Any] = {"call": operation, "args": [encode(arg) for arg in args]}
            if kwargs:
                message["kwargs"] = {name: encode(value) for name, value in kwargs.items()}
            if self._streams and (names := self._streams.replaced()):
                message["streams"] = names
            self._send(message)
            while "call" in (reply := self.receive()):
                self.serve(reply)
            content = "error" if "error" in reply else "value"
            return {content: self._decode(reply, reply[content])}
        finally:
            self.busy = busy_before

    def _received(self, error: object, *, as_error_of: str) -> BaseException:
        """Return the error to raise here.

        One that would silently end a loop or a generator of the test, `all(map(...))`, becomes a `ProgramError`.
        """
        ends_anext = isinstance(error, StopAsyncIteration) and as_error_of == "result"
        if isinstance(error, ENDING) and as_error_of not in ITERATION and not ends_anext:
            return ProgramError(f"{type(error).__name__}: {shorten(safe_text(error))}")
        return error if isinstance(error, BaseException) else ProgramError("an invalid exception")

    def serve(self, message: Mapping[str, Any]) -> None:
        """Run the operation that the other process calls; reply with its value or error."""
        busy_before = self.busy
        self.busy = False
        try:
            reply = self._run(message)
        finally:
            self.busy = busy_before
        try:
            self._send(reply)
        except (ValueError, RecursionError, MemoryError) as error:  # too large
            text = f"{type(error).__name__}: {shorten(safe_text(error))}"
            self._send({"error": {"exception": [["builtins.RuntimeError"], [text], None]}})

    def _run(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to a call. No reference to the arguments is left, so that unused containers are released."""
        try:
            named = message.get("kwargs", {})
            args, values = self._decode(message, [message["args"], list(named.values())])
            kwargs = dict(zip(named, values, strict=True))
            with replaced(message.get("streams", ()), self.call):
                operation = self._operation(message["call"])
                value = operation(*args, **kwargs)
            return {"value": self._serializer.encode(value)}
        except Disconnected:
            raise
        except BaseException as error:  # SystemExit is raised in the caller, too
            return {"error": self._encode_error(error)}

    def _operation(self, name: str) -> Callable[..., Any]:
        return self._streams.call if name == "stream" and self._streams else self._operations(name)

    def _encode_error(self, error: BaseException) -> Any:  # noqa: ANN401 - JSON
        part: BaseException | None = error
        while part is not None:  # the frames hold on to arguments
            part.__traceback__ = None
            part = part.__context__
        try:
            return self._serializer.encode(error)
        except Exception as failure:  # its arguments are too deep
            text = f"{type(error).__name__}: {type(failure).__name__}"
            return {"exception": [["builtins.RuntimeError"], [text], None]}

    def _decode(self, message: Mapping[str, Any], content: object) -> Any:  # noqa: ANN401 - any value
        decode, containers = self._serializer.decode, self._serializer.containers
        containers.create(message, decode)
        value = decode(content)
        containers.update(message, decode)
        return value

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

    def _send(self, message: dict[str, Any]) -> None:
        data = framing.pack_json(message | self._serializer.containers.outgoing(self._serializer.encode))
        try:
            framing.write(WRITE_DESCRIPTOR, data)
        except OSError as error:  # a broken pipe
            raise self._close("ended") from error

    def _close(self, why: str) -> Disconnected:
        self.closed = why
        return Disconnected(why)


ENDING = (StopIteration, StopAsyncIteration, GeneratorExit)


def safe_text(value: object) -> str:
    """Return `str(value)`; of an object that raises an error there, that it does."""
    try:
        return str(value)
    except BaseException as error:  # of a class of the program, which may have ended
        return f"({type(error).__name__} in its __str__)"


def shorten(text: str) -> str:
    """Return a text on one line, cut to `MAX_SHOWN` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_SHOWN else line[:MAX_SHOWN] + "..."
