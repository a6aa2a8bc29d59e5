"""How values travel between the program's process and the tests' process: as JSON, rebuilt by the receiver.

Values of the classes in `PLAIN` are copied. An object of any other class stays in its process; the other one gets a
`RemoteObject`, which a test may call, read and iterate over, but which is equal to no plain value and cannot be added
to one. JSON is used instead of pickle because unpickling lets the sender set attributes of the receiver's classes,
such as `Counter.__eq__`.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable
from typing import Any, Protocol

TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}

ITEMS = ("bytes", "bytearray", "list", "tuple", "set", "frozenset")
# Class -> the arguments that make an equal value. A value of a derived class is sent as its first base listed here.
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


def _call(target: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any function
    return target(*args, **kwargs)


def _is_instance(target: Any, value: object) -> bool:  # noqa: ANN401 - any class
    return isinstance(value, target)


# What may be done to an object of the other process
OPERATIONS: dict[str, Callable[..., Any]] = {
    "__call__": _call,
    "__instancecheck__": _is_instance,
    **{"__len__": len, "__iter__": iter, "__next__": next, "__bool__": bool, "__str__": str, "__repr__": repr},
    **{"__hash__": hash, "__getattr__": getattr, "__setattr__": setattr},
    **{name: getattr(operator, name) for name in ("__getitem__", "__setitem__", "__delitem__")},
}
# And only where the second operand is an object of the other process, too
BINARY = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
BINARY_OPERATIONS = {f"__{name}__": getattr(operator, f"__{name}__") for name in BINARY}


class Caller(Protocol):
    """The connection to the process that holds remote objects."""

    def call(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any value
        """Return the result of an operation in the other process."""
        ...


class RemoteObject:
    """Proxy for an object in the other process; each operation is a remote call."""

    __slots__ = ("_connection", "_number")

    def __init__(self, connection: Caller, number: int) -> None:
        object.__setattr__(self, "_connection", connection)
        object.__setattr__(self, "_number", number)


def _remote_method(name: str, *, binary: bool) -> Callable[..., Any]:
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any object of the program
        if binary and type(args[0]) is not RemoteObject:
            return NotImplemented
        return self._connection.call(name, self, *args, **kwargs)

    return method


for _name in OPERATIONS:
    setattr(RemoteObject, _name, _remote_method(_name, binary=False))
for _name in BINARY_OPERATIONS:
    setattr(RemoteObject, _name, _remote_method(_name, binary=True))


class Serializer:
    """One process's half of the exchange: the objects that it has sent, and proxies of those that it has received.

    The trusted process (the tests') sends functions of the standard library by name, and looks up no name that it
    receives. The untrusted one (the program's) does the opposite.
    """

    def __init__(self, connection: Caller, *, trusted: bool) -> None:
        self._connection = connection
        self._trusted = trusted
        self._sent: list[Any] = []
        self._sent_numbers: dict[int, int] = {}  # by id(object); `_sent` keeps the objects alive
        self._received: dict[int, RemoteObject] = {}

    def encode(self, value: Any) -> Any:  # noqa: ANN401 - any value
        """Return a value as JSON."""
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and value.bit_length() < 64):
            return value
        if kind is list:
            return [self.encode(item) for item in value]
        if kind is RemoteObject:
            return {"of receiver": value._number}
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return {"type": value.__name__}
        for base in kind.__mro__:
            if constructor_args := PLAIN.get(f"{base.__module__}.{base.__qualname__}"):
                args = [self.encode(arg) for arg in constructor_args(value)]
                return {f"{base.__module__}.{base.__qualname__}": args}
        if self._trusted and callable(value) and (name := _stdlib_name(value)):
            return {"stdlib": name}
        if id(value) not in self._sent_numbers:
            self._sent_numbers[id(value)] = len(self._sent)
            self._sent.append(value)
        return {"of sender": self._sent_numbers[id(value)]}

    def decode(self, value: Any) -> Any:  # noqa: ANN401 - any value
        """Return the value that was sent as this JSON."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag == "of sender":
            return self._received.setdefault(content, RemoteObject(self._connection, content))
        if tag == "of receiver":
            return self._sent[content]
        if tag == "type":
            return TYPES[content]
        if tag == "stdlib" and not self._trusted:
            return getattr(importlib.import_module(content[0]), content[1])
        if tag not in PLAIN:
            raise ValueError(f"values of kind {tag!r} are not accepted")
        module, _, name = tag.partition(".")
        return getattr(importlib.import_module(module), name)(*[self.decode(arg) for arg in content])


def _stdlib_name(value: Any) -> list[str] | None:  # noqa: ANN401 - any callable
    """Return (module, name) of a function or class of the standard library, None for any other."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if isinstance(module, str) and isinstance(name, str) and module.partition(".")[0] in sys.stdlib_module_names:
        return [module, name] if getattr(sys.modules.get(module), name, None) is value else None
    return None
