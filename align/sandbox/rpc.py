"""How the two processes of a test run talk: the program in one sandbox, the tests in another (`code_tests`).

The program is never asked whether it is right. The tests call it over a pipe, and what comes back is a plain value,
made anew from JSON: it has the standard library's own `==`, whatever the program did to its own. The program's process
holds no test, no expected value and no verdict: there is nothing in it to read, patch, print or end that would help.

What crosses: values of the classes in `PLAIN`. An object of any other class stays where it is and crosses as a
`RemoteObject`, which a test may call, read and walk through, but which equals no plain value and is added to none.
JSON and not pickle: unpickling lets the sender set attributes of the receiver's classes, `Counter.__eq__` among them.

What a test must see to, as in one process. Where it compares two objects of the program's own classes, their `__eq__`
decides. Where it uses a name that neither it nor Python defines, the program does. Where it derives the expected value
from an argument after the call, the program may have changed that. Where it looks at no value, whatever does not raise
passes. And a program that knows the tests by heart can answer them.
"""

from __future__ import annotations

import builtins
import importlib
import json
import operator
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST_BYTES = 64 << 20  # of one message
MOST_SHOWN = 160  # characters of a value, a test or an error in a reason
LENGTH = struct.Struct(">I")  # before each message

TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}

ITEMS = ("bytes", "bytearray", "list", "tuple", "set", "frozenset")
# Class -> the arguments that make an equal value. A value of a derived class crosses as its first base in here.
PLAIN: dict[str, Callable[[Any], list[Any]]] = {
    "builtins.int": lambda value: [hex(value), 16],
    "builtins.float": lambda value: [float.__repr__(value)],
    "builtins.complex": lambda value: [value.real, value.imag],
    "builtins.str": lambda value: [str.__str__(value)],
    "builtins.range": lambda value: [value.start, value.stop, value.step],
    "builtins.dict": lambda value: [[[key, item] for key, item in value.items()]],
    "collections.OrderedDict": lambda value: [[[key, item] for key, item in value.items()]],
    "collections.Counter": lambda value: [dict(value)],
    "collections.defaultdict": lambda value: [value.default_factory, dict(value)],
    "collections.deque": lambda value: [list(value), value.maxlen],
    "array.array": lambda value: [value.typecode, list(value)],
    "decimal.Decimal": lambda value: [str(value)],
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
    "datetime.date": lambda value: [value.year, value.month, value.day],
    "datetime.time": lambda value: [value.hour, value.minute, value.second, value.microsecond],
    "datetime.datetime": lambda value: [*value.timetuple()[:6], value.microsecond],
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
    **{f"builtins.{name}": lambda value: [list(value)] for name in ITEMS},
}


def _call(target: Any, /, *parts: Any, **named: Any) -> Any:  # noqa: ANN401 - any function
    return target(*parts, **named)


def _is_instance(target: Any, value: object) -> bool:  # noqa: ANN401 - any class
    return isinstance(value, target)


# What may be done to an object on the other side; in the second table only with another object from there.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "__call__": _call,
    "__instancecheck__": _is_instance,
    **{"__len__": len, "__iter__": iter, "__next__": next, "__bool__": bool, "__str__": str, "__repr__": repr},
    **{"__hash__": hash, "__getattr__": getattr, "__setattr__": setattr},
    **{name: getattr(operator, name) for name in ("__getitem__", "__setitem__", "__delitem__")},
}
TOGETHER = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
TOGETHER_OPERATIONS = {f"__{name}__": getattr(operator, f"__{name}__") for name in TOGETHER}


class Ended(BaseException):
    """The other process is gone, or what it sends is no message. No test catches it."""


class ProgramError(Exception):
    """An error that is none of Python's own."""


class RemoteObject:
    """An object of the other process."""

    __slots__ = ("_line", "_number")

    def __init__(self, line: Line, number: int) -> None:
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_number", number)


def _forward(name: str, *, together: bool) -> Callable[..., Any]:
    def method(self: Any, /, *parts: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the program makes
        if together and type(parts[0]) is not RemoteObject:
            return NotImplemented
        return self._line.ask(name, self, *parts, **named)

    return method


for _name in OPERATIONS:
    setattr(RemoteObject, _name, _forward(_name, together=False))
for _name in TOGETHER_OPERATIONS:
    setattr(RemoteObject, _name, _forward(_name, together=True))


class Line:
    """Calls from one process to the other; while one waits for its answer, it answers the other's calls."""

    def __init__(self, operations: Callable[[str], Callable[..., Any]], *, lends: bool) -> None:
        self.reads, self.writes = os.fdopen(3, "rb"), os.fdopen(4, "wb")
        self.operations = operations
        self.lends = lends  # functions of the standard library cross by name
        self.mine: list[Any] = []  # objects that the other side holds on to
        self.numbers: dict[int, int] = {}
        self.theirs: dict[int, RemoteObject] = {}
        self.last: Any = None
        self.over = ""

    def ask(self, operation: str, /, *parts: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever the program makes
        """What the other side's `operation` gives, or the error that it raises."""
        if self.over:
            raise Ended(self.over)
        sent = {name: self.out(part) for name, part in named.items()}
        self.send(_packed({"ask": operation, "parts": [self.out(part) for part in parts], "named": sent}))
        while "ask" in (message := self.receive()):
            self.answer(message)
        if "error" in message:
            raise _error(*message["error"], ends_a_loop=operation == "__next__")
        for place, after in message["changed"]:
            _refill(parts[place], self.into(after))
        self.last = self.into(message["value"])
        return self.last

    def answer(self, message: Mapping[str, Any]) -> None:
        """Do what the other side asks for and tell it the value, or the error, and which of its arguments changed."""
        try:
            parts = [self.into(part) for part in message["parts"]]
            named = {name: self.into(part) for name, part in message["named"].items()}
            value = self.out(self.operations(message["ask"])(*parts, **named))
            after = [
                self.out(part) if type(part) in REFILLED else before
                for part, before in zip(parts, message["parts"], strict=True)
            ]
            changed = [[i, part] for i, part in enumerate(after) if part != message["parts"][i]]
            reply = _packed({"value": value, "changed": changed})
        except Ended:
            raise
        except BaseException as error:  # SystemExit too goes to the caller
            reply = _packed({"error": [[kind.__name__ for kind in type(error).__mro__], str(error)[:MOST_SHOWN]]})
        self.send(reply)

    def send(self, message: bytes) -> None:
        """Write one message."""
        try:
            self.writes.write(message)
            self.writes.flush()
        except OSError as error:  # a broken pipe
            raise self.end("ended") from error

    def receive(self) -> dict[str, Any]:
        """Read one message."""
        header = self.reads.read(LENGTH.size)
        length = LENGTH.unpack(header)[0] if len(header) == LENGTH.size else 0
        data = self.reads.read(length) if 0 < length <= MOST_BYTES else b""
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            message = None
        if isinstance(message, dict):
            return message
        raise self.end("sent what is no message" if header else "ended")

    def end(self, why: str) -> Ended:
        """Give the other side up."""
        self.over = why
        return Ended(why)

    def out(self, value: Any) -> Any:  # noqa: ANN401 - any value
        """The JSON that a value crosses as."""
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and value.bit_length() < 64):
            return value
        if kind is list:
            return [self.out(item) for item in value]
        if kind is RemoteObject:
            return {"yours": value._number}
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return {"type": value.__name__}
        for base in kind.__mro__:
            if apart := PLAIN.get(f"{base.__module__}.{base.__qualname__}"):
                return {f"{base.__module__}.{base.__qualname__}": [self.out(part) for part in apart(value)]}
        if self.lends and callable(value) and (name := _library_name(value)):
            return {"library": name}
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.mine)
            self.mine.append(value)
        return {"mine": self.numbers[id(value)]}

    def into(self, value: Any) -> Any:  # noqa: ANN401 - any value
        """The value that crossed as this JSON."""
        if isinstance(value, list):
            return [self.into(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag == "mine":
            return self.theirs.setdefault(content, RemoteObject(self, content))
        if tag == "yours":
            return self.mine[content]
        if tag == "type":
            return TYPES[content]
        if tag == "library" and not self.lends:
            return getattr(importlib.import_module(content[0]), content[1])
        if tag not in PLAIN:
            raise ValueError(f"{tag!r} crosses to no one")
        module, _, name = tag.partition(".")
        return getattr(importlib.import_module(module), name)(*[self.into(part) for part in content])


def _packed(message: object) -> bytes:
    """A message with its length before it."""
    data = json.dumps(message).encode()
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MB at once")
    return LENGTH.pack(len(data)) + data


REFILLED = (list, dict, set, bytearray)


def _refill(old: Any, new: Any) -> None:  # noqa: ANN401 - any value
    """An argument that the callee changed is changed for the caller too."""
    if type(old) is not type(new) or type(old) not in REFILLED:
        return
    old.clear()
    (old.extend if isinstance(old, list | bytearray) else old.update)(new)


def _library_name(value: Any) -> list[str] | None:  # noqa: ANN401 - any callable
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if isinstance(module, str) and isinstance(name, str) and module.partition(".")[0] in sys.stdlib_module_names:
        return [module, name] if getattr(sys.modules.get(module), name, None) is value else None
    return None


def _error(names: Sequence[str], text: str, *, ends_a_loop: bool) -> Exception:
    """An error of the nearest of Python's own classes; what is none, such as SystemExit, is a `ProgramError`.

    So is a StopIteration that ends no loop of the program's: it would end the test's, `all(map(...))`, before its time.
    """
    for name in names[:-3]:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and (kind is not StopIteration or ends_a_loop):
            try:
                return kind(shown(text))
            except TypeError:  # UnicodeDecodeError needs five arguments
                break
    return ProgramError(f"{names[0]}: {shown(text)}")


def shown(text: str) -> str:
    """A text as part of a one-line reason."""
    line = " ".join(str(text).split())
    return line if len(line) <= MOST_SHOWN else line[:MOST_SHOWN] + "..."
