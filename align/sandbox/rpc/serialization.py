"""How values travel between the program's process and the tests' process: as JSON, rebuilt by the receiver.

Values of the classes in `values` are copied or shared. An object of any other class stays in its process; the other
one gets a proxy. JSON is used instead of pickle because unpickling lets the sender set attributes of the receiver's
classes, such as `Counter.__eq__`.
"""

from __future__ import annotations

import importlib
import sys
from types import CoroutineType, GeneratorType, MethodType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from align.sandbox.rpc import awaitables
from align.sandbox.rpc.containers import SharedContainers
from align.sandbox.rpc.descriptions import payload_base, special_methods, visible_bases
from align.sandbox.rpc.proxies import (
    HANDLE,
    PLAIN_OBJECT,
    Caller,
    Handle,
    RemoteMethod,
    RemoteType,
    handle_of,
    make_mirror,
)
from align.sandbox.rpc.values import (
    KNOWN,
    PLAIN,
    SHARED,
    Plain,
    Shared,
    is_known,
    known_class,
    make_shared,
    name_of,
    names_of,
)

STEPPED = {GeneratorType: "generator", CoroutineType: "coroutine"}
TAGS = ("type", "class", "object", "exception", "method", "stdlib")
LOCAL_VERSIONS = {"generator": awaitables.generator, "coroutine": awaitables.coroutine}


class Serializer:
    """One process's half of the exchange: the objects that it has sent, and proxies of those that it has received.

    The trusted process (the tests') sends functions of the standard library by name, and looks up no name that it
    receives but those of known classes. The untrusted one (the program's) does the opposite.
    """

    def __init__(self, connection: Caller, *, trusted: bool) -> None:
        self._connection = connection
        self._trusted = trusted
        self._sent: list[Any] = []
        self._sent_numbers: dict[int, int] = {}  # by id(object); `_sent` keeps the objects alive
        self._received: dict[int, Any] = {}
        self._stepped: WeakKeyDictionary[Any, Handle] = WeakKeyDictionary()  # of local generators and coroutines
        self._live_stepped: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self.containers = SharedContainers(trusted=trusted)

    def encode(self, value: Any) -> Any:  # noqa: ANN401 - any value
        """Return a value as JSON."""
        kind = type(value)
        if value is None or kind in (bool, float, str) or (kind is int and value.bit_length() < 64):
            return value
        if shared := SHARED.get(kind):
            return {"shared": self.containers.number(value, shared, make_args=lambda: self._encode_args(shared, value))}
        if plain := PLAIN.get(kind):
            return {name_of(kind): self._encode_args(plain, value)}
        if handle := self._handle_of(value):
            return {"of receiver": handle.number}
        if kind is TracebackType:
            return None
        if isinstance(value, type):
            return self._encode_class(value)
        return self._encode_other(value)

    def _handle_of(self, value: Any) -> Handle | None:  # noqa: ANN401 - any value
        if type(value) is Handle:
            return value
        return self._stepped.get(value) if type(value) in STEPPED else handle_of(value)

    def _encode_other(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        """Return a method, an exception, a standard function or an object that stays here."""
        kind = type(value)
        if kind is RemoteMethod or (kind is MethodType and not self._trusted and _is_plain_method(value)):
            return {"method": [self.encode(value.__self__), value.__name__]}
        if isinstance(value, BaseException) and is_known(kind):
            return {"exception": [names_of(kind), *self._encode_exception(value)]}
        if self._trusted and callable(value) and (name := _stdlib_name(value)):
            return {"stdlib": name}
        return self._encode_object(value)

    def number_of(self, value: Any) -> int:  # noqa: ANN401 - any object of this process
        """Return the number of an object of this process that stays here."""
        if (number := self._sent_numbers.get(id(value))) is None:
            number = self._sent_numbers[id(value)] = len(self._sent)
            self._sent.append(value)
        return number

    def adopt(self, number: int, value: Any) -> None:  # noqa: ANN401 - a proxy or mirror
        """Let an object stand for the other process's object of this number."""
        self._received[number] = value

    def _encode_args(self, row: Plain | Shared, value: Any) -> list[Any]:  # noqa: ANN401 - any value
        return [self._encode_arg(arg) for arg in row.args(value)]

    def _encode_arg(self, arg: Any) -> Any:  # noqa: ANN401 - any value
        """Return an argument of a constructor; a list is a JSON list, as it must be there when it is called."""
        return [self.encode(item) for item in arg] if type(arg) is list else self.encode(arg)

    def _encode_class(self, kind: type) -> Any:  # noqa: ANN401 - JSON
        if is_known(kind):
            return {"type": names_of(kind)}
        if self._trusted and (name := _stdlib_name(kind)):
            return {"stdlib": name}
        return self._describe_class(kind)

    def _describe_class(self, kind: type) -> Any:  # noqa: ANN401 - JSON
        """Return a class that stays here: at its first time with what its mirror needs."""
        if id(kind) in self._sent_numbers:
            return {"class": [self._sent_numbers[id(kind)]]}
        number = self.number_of(kind)
        bases = visible_bases(kind)
        special = special_methods(kind)
        encoded = [{"type": names_of(base)} if is_known(base) else self._describe_class(base) for base in bases]
        return {"class": [number, kind.__name__, encoded, special]}

    def _encode_object(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        """Return an object that stays here: at its first time with its class and, if that is derived, its value."""
        kind = type(value)
        if kind in STEPPED and not self._trusted:
            return {STEPPED[kind]: self.number_of(value)}
        if id(value) in self._sent_numbers:
            return {"of sender": self._sent_numbers[id(value)]}
        number = self.number_of(value)
        base = payload_base(kind)
        payload = None
        if base in SHARED:
            args = self._encode_args(SHARED[base], value)
            payload = [self.containers.number(value, SHARED[base], make_args=None), args]
        elif base in PLAIN:
            payload = self._encode_args(PLAIN[base], value)
        elif base is not None:
            payload = self._encode_exception(value)
        return {"object": [number, self._describe_class(kind), payload]}

    def _encode_exception(self, error: BaseException) -> list[Any]:
        cause = None if error.__cause__ is None else self.encode(error.__cause__)
        return [[self._encode_arg(arg) for arg in error.args], cause]

    def decode(self, value: Any) -> Any:  # noqa: ANN401 - any value
        """Return the value that was sent as this JSON."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag == "shared":
            return self.containers.value(content)
        if tag == "of sender":
            return self._seen_again(content)
        if tag == "of receiver":
            return self._sent[content]
        if tag in TAGS:
            return getattr(self, f"_decode_{tag}")(content)
        if tag in LOCAL_VERSIONS and self._trusted:
            return self._local_version(tag, content)
        kind = KNOWN.get(tag)
        if kind not in PLAIN:
            raise ValueError(f"values of kind {tag!r} are not accepted")
        return PLAIN[kind].make(kind, kind, *(self.decode(arg) for arg in content))

    def _local_version(self, tag: str, number: int) -> Any:  # noqa: ANN401 - a generator or coroutine
        if (local := self._live_stepped.get(number)) is None:
            handle = Handle(self._connection, number)
            local = self._live_stepped[number] = LOCAL_VERSIONS[tag](handle)
            self._stepped[local] = handle
        return local

    def _seen_again(self, number: int) -> Any:  # noqa: ANN401 - any proxy
        """Return a proxy that the other process hands out again: the tests no longer trust its operators."""
        value = self._received[number]
        if (handle := handle_of(value)) and not isinstance(value, type):
            handle.level = PLAIN_OBJECT
        return value

    def _decode_type(self, names: list[str]) -> type:
        for name in names:
            if kind := known_class(name):
                return kind
        raise ValueError(f"class {names!r} is not accepted")

    def _decode_class(self, content: list[Any]) -> Any:  # noqa: ANN401 - a class
        number, *description = content
        if description and number not in self._received:
            name, bases, special = description
            kinds = tuple(dict.fromkeys(self.decode(base) for base in bases))
            if not all(type(base) is RemoteType or is_known(base) for base in kinds):
                raise ValueError(f"base classes of {name!r} are not accepted")
            self._received[number] = make_mirror(Handle(self._connection, number), str(name), kinds, special)
        return self._received[number]

    def _decode_object(self, content: list[Any]) -> Any:  # noqa: ANN401 - a proxy
        number, kind, payload = content
        mirror = self.decode(kind)
        if type(mirror) is not RemoteType:
            raise ValueError(f"objects of {mirror!r} are not accepted")
        if number in self._received:
            return self._seen_again(number)
        base = payload_base(mirror)
        handle = Handle(self._connection, number)
        if base in SHARED:
            container, args = payload
            value = make_shared(mirror, [self.decode(arg) for arg in args], base)
            self.containers.adopt(container, value, SHARED[base])
        elif base in PLAIN:
            value = PLAIN[base].make(base, mirror, *(self.decode(arg) for arg in payload))
        elif base is not None:
            value = self._make_exception(mirror, base, *payload)
        else:
            value = object.__new__(mirror)
        self._received[number] = value
        object.__getattribute__(value, "__dict__")[HANDLE] = handle
        return value

    def _decode_exception(self, content: list[Any]) -> BaseException:
        names, args, cause = content
        kind = self._decode_type(names)
        return self._make_exception(kind, kind, args, cause)

    def _make_exception(self, kind: type, base: Any, args: list[Any], cause: Any) -> BaseException:  # noqa: ANN401
        values = [self.decode(arg) for arg in args]
        try:
            error = kind(*values) if kind is base else base.__new__(kind, *values)
        except TypeError:  # the arguments of its constructor are others
            error = base.__new__(kind)
            object.__setattr__(error, "args", tuple(values))
        object.__setattr__(error, "__cause__", self.decode(cause))
        return error

    def _decode_method(self, content: list[Any]) -> Any:  # noqa: ANN401 - a bound method
        owner = self.decode(content[0])
        name = str(content[1])
        if handle_of(owner) is not None:
            return RemoteMethod(owner, name)
        if self._trusted:
            raise ValueError("methods of the tests' objects are not accepted")
        return getattr(owner, name)

    def _decode_stdlib(self, content: list[str]) -> Any:  # noqa: ANN401 - any function
        if self._trusted:
            raise ValueError("values of kind 'stdlib' are not accepted")
        module, name = content
        return getattr(importlib.import_module(module), name)


def _is_plain_method(method: MethodType) -> bool:
    """Return whether a bound method is what its class defines under its name."""
    owner, name = method.__self__, method.__name__
    bases = (owner if isinstance(owner, type) else type(owner)).__mro__
    found: Any = next((vars(base)[name] for base in bases if name in vars(base)), None)
    return (found.__func__ if type(found) in (classmethod, staticmethod) else found) is method.__func__


def _stdlib_name(value: Any) -> list[str] | None:  # noqa: ANN401 - any callable
    """Return (module, name) of a function or class of the standard library, None for any other."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if isinstance(module, str) and isinstance(name, str) and module.partition(".")[0] in sys.stdlib_module_names:
        return [module, name] if getattr(sys.modules.get(module), name, None) is value else None
    return None
