"""Proxies of the other process's objects: instances of classes that mirror the objects' own.

A mirror has the name, the base classes and the special methods of the class that it stands for, so that `isinstance`,
`except`, `len`, `with` and all operators work as they do there. What Python looks up on a class without asking it
(special methods) is a function that makes a remote call; every other attribute is read remotely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from align.sandbox.rpc.awaitables import Driven, Steps
from align.sandbox.rpc.operations import BINARY, CLOSED, COMPARISONS, OPERATIONS
from align.sandbox.rpc.values import is_standard

HANDLE = "__handle__"  # entry of a proxy's or mirror's own __dict__
PLAIN_OBJECT, OPERAND, MADE_BY_TEST = range(3)  # levels of trust of the tests in an object's operators
LOCAL = {  # attributes of any proxy that are not remote
    *("__class__", "__traceback__", "__cause__", "__context__", "__suppress_context__", "with_traceback", "add_note")
}
LOCAL_OF_CLASS = {
    *("__mro__", "__bases__", "__base__", "__name__", "__qualname__", "__module__", "__class__", "__dict__"),
    *("__subclasses__", "mro", "__flags__", "__instancecheck__", "__subclasscheck__"),
}


class Caller(Protocol):
    """The connection to the process that holds remote objects."""

    trusted: bool  # whether this is the tests' process
    busy: bool  # whether a call is under way

    def call(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any value
        """Return the result of an operation in the other process."""
        ...

    def derive(self, kind: type, bases: list[type], namespace: dict[str, Any], named: dict[str, Any]) -> Handle:
        """Create a class in the other process; return the handle that makes `kind` its mirror."""
        ...


class Handle:
    """The number of an object in the other process."""

    def __init__(self, connection: Caller, number: int) -> None:
        self.connection = connection
        self.number = number
        self.level = PLAIN_OBJECT
        self.made_level = PLAIN_OBJECT  # of a class: of the objects that the tests make by calling it
        self.derived = False  # of a class: it is defined in this process
        self.super_provided = False  # of a class: its mirror has the attributes that `super()` looks up

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self.connection.busy

    def call(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any value
        """Return the result of an operation on the object."""
        return self.connection.call(operation, self, *args, **kwargs)


def handle_of(value: Any) -> Handle | None:  # noqa: ANN401 - any value
    """Return the handle of a proxy or a mirror, None for any other value."""
    if isinstance(type(value), RemoteType):
        return object.__getattribute__(value, "__dict__").get(HANDLE)
    if type(value) is RemoteType:
        return type.__getattribute__(value, "__dict__").get(HANDLE)
    return None


def _handle(value: Any) -> Handle:  # noqa: ANN401 - a proxy or mirror
    handle = handle_of(value)
    if handle is None:
        raise TypeError(f"{type(value).__name__!r} object has no counterpart in the other process")
    return handle


class RemoteType(type):
    """The class of mirrors; a class derived from one in the tests is created in the program, too."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], /, **named: Any) -> RemoteType:  # noqa: ANN401
        """Create a mirror, or a class that is derived from mirrors."""
        cls = super().__new__(mcs, name, bases, namespace)
        if HANDLE not in namespace:
            mirrors = [base for base in cls.__mro__[1:] if type(base) is RemoteType]
            for mirror in mirrors:
                _provide_super(mirror)
            mixins = [base for base in cls.__mro__[1:] if base not in mirrors and not is_standard(base)]
            merged = {key: value for base in (*mixins[::-1], cls) for key, value in _own(base).items()}
            sent = {key: value for key, value in merged.items() if key not in NOT_SENT}
            handle = _handle(mirrors[0]).connection.derive(
                cls, [base for base in bases if base in mirrors], sent, named
            )
            handle.made_level = MADE_BY_TEST
            handle.derived = True
            type.__setattr__(cls, HANDLE, handle)
        return cls

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], /, **_: Any) -> None:  # noqa: ANN401
        super().__init__(name, bases, namespace)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any object
        """Create an object in the other process."""
        handle = _handle(cls)
        made = handle.call("__call__", *args, **kwargs)
        if handle.made_level and (made_handle := handle_of(made)):
            made_handle.level = handle.made_level
        return made

    def __getattribute__(cls, name: str) -> Any:  # noqa: ANN401 - any value
        if name in LOCAL_OF_CLASS:
            return type.__getattribute__(cls, name)
        if name in OPERATIONS:
            try:
                return type.__getattribute__(cls, name)
            except AttributeError:
                pass
        return _handle(cls).call("__getattr__", name)

    def __setattr__(cls, name: str, value: object) -> None:
        _handle(cls).call("__setattr__", name, value)

    def __delattr__(cls, name: str) -> None:
        _handle(cls).call("__delattr__", name)

    def __instancecheck__(cls, instance: object) -> bool:
        return type.__instancecheck__(cls, instance) or (
            handle_of(instance) is not None and bool(_handle(cls).call("__instancecheck__", instance))
        )

    def __contains__(cls, value: object) -> bool:
        handle = _handle(cls)
        if handle.made_level or not handle.connection.trusted or handle_of(value):
            return bool(handle.call("__contains__", value))
        return any(value is item or value == item for item in cls)

    def __iter__(cls) -> Iterator[Any]:
        return _handle(cls).call("__iter__")

    def __reversed__(cls) -> Iterator[Any]:
        return _handle(cls).call("__reversed__")

    def __len__(cls) -> int:
        return _handle(cls).call("__len__")

    def __bool__(cls) -> bool:
        return True

    def __getitem__(cls, key: object) -> Any:  # noqa: ANN401 - any value
        return _handle(cls).call("__getitem__", key)

    def __dir__(cls) -> list[str]:
        return _handle(cls).call("__dir__")


NOT_SENT = {
    *("__module__", "__qualname__", "__classcell__", "__dict__", "__weakref__", "__firstlineno__"),
    *("__static_attributes__",),
}


def _own(kind: type) -> dict[str, Any]:
    return dict(type.__getattribute__(kind, "__dict__"))


class RemoteMethod:
    """A bound method of an object of the other process."""

    def __init__(self, owner: Any, name: str) -> None:  # noqa: ANN401 - a proxy or mirror
        self.__self__ = owner
        self.__name__ = name
        self._handle = _handle(owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any value
        """Call the method in the other process."""
        return self._handle.call("method", self.__name__, *args, **kwargs)

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 - any value
        try:
            return object.__getattribute__(self, name)
        except AttributeError:
            return self._handle.call("method attribute", self.__name__, name)

    def __eq__(self, other: object) -> bool:
        return type(other) is RemoteMethod and (self._handle, self.__name__) == (other._handle, other.__name__)

    def __hash__(self) -> int:
        return hash((self._handle, self.__name__))


def make_mirror(handle: Handle, name: str, bases: tuple[type, ...], special: dict[str, bool]) -> RemoteType:
    """Return the mirror of a class that defines these special methods, those with False as None."""
    namespace = {HANDLE: handle, "__module__": "program", "__doc__": None, "__getattribute__": _read_attribute}
    mirror = RemoteType(name, bases, namespace)
    for method in (*ALWAYS, *(name for name in special if name in SPECIAL_METHODS)):
        remote = _special_method(mirror, method) if special.get(method, True) else None
        type.__setattr__(mirror, method, remote)
    return mirror


ALWAYS = ("__setattr__", "__delattr__", "__dir__", "__copy__", "__deepcopy__")
SPECIAL_METHODS = {
    *(name for name in OPERATIONS if name.startswith("__")),
    "__await__",
} - {*ALWAYS, "__getattr__", "__instancecheck__"}


def _read_attribute(self: Any, name: str, /) -> Any:  # noqa: ANN401 - a proxy
    if name in LOCAL:
        return object.__getattribute__(self, name)
    if name in OPERATIONS and name.startswith("__"):
        try:
            return object.__getattribute__(self, name)
        except AttributeError:
            pass
    return _handle(self).call("__getattr__", name)


def _special_method(mirror: type, name: str) -> Callable[..., Any]:
    """Return the special method of a mirror: what its class does in the other process."""
    level = (
        MADE_BY_TEST if name in COMPARISONS else OPERAND if name in BINARY or name == "__contains__" else PLAIN_OBJECT
    )

    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a proxy
        handle = _handle(self)
        if handle.level < level and handle.connection.trusted and handle_of(args[0]) is None:
            return _local_result(mirror, name, self, args)
        if name == "__await__":
            return Driven(handle).__await__() if handle.connection.trusted else iter(Steps(handle))
        if name in LOCAL_SETTERS and args[0] in LOCAL:
            return getattr(object, name)(self, *args)
        if _handle(type(self)).derived:
            return handle.connection.call("super", mirror, handle, name)(*args, **kwargs)
        level_before = handle.level  # an operator that returns its own object lowers the level of that object
        result = handle.call(name, *args, **kwargs)
        if name in CLOSED and level_before and (result_handle := handle_of(result)):
            result_handle.level = OPERAND
        return result

    method.__name__ = name
    return method


LOCAL_SETTERS = ("__setattr__", "__delattr__")


def _local_result(mirror: type, name: str, proxy: Any, args: tuple[Any, ...]) -> Any:  # noqa: ANN401 - any value
    """Return what an operator means without the program: that of the built-in base class, if there is one."""
    inherited = getattr(super(mirror, proxy), name, None)
    if inherited is not None:
        return inherited(*args)
    if name == "__contains__":
        return any(args[0] is item or args[0] == item for item in iter(proxy))
    return NotImplemented


class _Super:
    """An attribute that `super()` finds on a mirror."""

    def __init__(self, mirror: type, name: str) -> None:
        self._mirror, self._name = mirror, name

    def __get__(self, instance: object, owner: type) -> Any:  # noqa: ANN401 - any value
        return _handle(self._mirror).connection.call("super", self._mirror, instance, self._name)


def _provide_super(mirror: type) -> None:
    """Give a mirror the attributes of its class, which `super()` looks up without calling `__getattribute__`."""
    handle = _handle(mirror)
    if handle.derived or handle.super_provided:
        return
    handle.super_provided = True
    for name in handle.call("names"):
        if name not in type.__getattribute__(mirror, "__dict__") and name not in NOT_SENT:
            type.__setattr__(mirror, name, _Super(mirror, name))
