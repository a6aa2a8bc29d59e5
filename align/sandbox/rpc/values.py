"""The classes whose values travel between the processes: copies of immutable values, and shared containers."""
# pyright: reportUnknownLambdaType=false
# (the functions of the tables take values of any class)

from __future__ import annotations

import array
import collections
import dataclasses
import datetime
import decimal
import fractions
import ipaddress
import pathlib
import re
import sys
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


def _construct(base: Any, kind: type, /, *args: Any) -> Any:  # noqa: ANN401 - any value
    return base.__new__(kind, *args)


class Plain(NamedTuple):
    """A class of immutable values, which are copied."""

    args: Callable[[Any], list[Any]]  # the arguments that make an equal value
    make: Callable[..., Any] = _construct  # from the class, itself or one derived from it, and these arguments


def _construct_with_fold(base: Any, kind: type, /, *args: Any) -> Any:  # noqa: ANN401 - a date and time, or a time
    *positional, fold = args
    return base.__new__(kind, *positional, fold=fold)


def _read_datetime(value: datetime.datetime) -> list[Any]:
    names = "year month day hour minute second microsecond tzinfo fold"  # timetuple() would call methods of tzinfo
    return [getattr(value, name) for name in names.split()]


def _construct_by_call(_base: type, kind: type, /, *args: Any) -> Any:  # noqa: ANN401 - any value
    return kind(*args)


def _make_field(_base: type, _kind: type, /, kind: str, name: str, options: Any) -> Any:  # noqa: ANN401 - a Field
    field: Any = dataclasses.field(**dict(options))
    field.name = name
    field.type = object
    field._field_type = getattr(dataclasses, kind)
    return field


def _same(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _base, _kind, *args: make(*args)


def _items(value: Any) -> list[Any]:  # noqa: ANN401 - any sequence
    return [list(value)]


FIELD_OPTIONS = ("init", "repr", "hash", "compare", "kw_only")
PLAIN: dict[type, Plain] = {
    int: Plain(lambda value: [int.__format__(value, "x"), 16]),
    float: Plain(lambda value: [float.__repr__(value)]),
    complex: Plain(lambda value: [value.real, value.imag]),
    str: Plain(lambda value: [str.__str__(value)]),
    bytes: Plain(lambda value: [list(bytes.__iter__(value))]),
    tuple: Plain(lambda value: [list(tuple.__iter__(value))]),
    frozenset: Plain(lambda value: [list(frozenset.__iter__(value))]),
    range: Plain(lambda value: [value.start, value.stop, value.step]),
    slice: Plain(lambda value: [value.start, value.stop, value.step]),
    type(...): Plain(lambda _: []),
    type(NotImplemented): Plain(lambda _: []),
    **{
        type(make([]).keys()): Plain(_items, _same(lambda keys, make=make: make((key, None) for key in keys).keys()))
        for make in (dict[Any, Any], collections.OrderedDict[Any, Any])
    },
    **{
        type(make([]).values()): Plain(_items, _same(lambda values, make=make: make(enumerate(values)).values()))
        for make in (dict[Any, Any], collections.OrderedDict[Any, Any])
    },
    **{
        type(make([]).items()): Plain(_items, _same(lambda pairs, make=make: make(pairs).items()))
        for make in (dict[Any, Any], collections.OrderedDict[Any, Any])
    },
    decimal.Decimal: Plain(lambda value: [decimal.Decimal.__str__(value)]),
    fractions.Fraction: Plain(lambda value: [value.numerator, value.denominator]),
    datetime.timezone: Plain(
        lambda value: list(value.__getinitargs__()), _same(lambda *args: datetime.timezone(*args))
    ),
    datetime.tzinfo: Plain(lambda _: []),
    datetime.timedelta: Plain(lambda value: [value.days, value.seconds, value.microseconds]),
    datetime.datetime: Plain(_read_datetime, _construct_with_fold),
    datetime.date: Plain(lambda value: [value.year, value.month, value.day]),
    datetime.time: Plain(
        lambda value: [value.hour, value.minute, value.second, value.microsecond, value.tzinfo, value.fold],
        _construct_with_fold,
    ),
    uuid.UUID: Plain(lambda value: [value.hex], _construct_by_call),
    re.Pattern: Plain(lambda value: [value.pattern, value.flags], _same(re.compile)),
    dataclasses.Field: Plain(
        lambda value: [value._field_type.name, value.name, [(key, getattr(value, key)) for key in FIELD_OPTIONS]],
        _make_field,
    ),
    ipaddress.IPv4Address: Plain(lambda value: [str(value)], _construct_by_call),
    ipaddress.IPv6Address: Plain(lambda value: [str(value)], _construct_by_call),
    type(pathlib.Path()): Plain(lambda value: [str(value)], _construct_by_call),
    pathlib.PurePosixPath: Plain(lambda value: [str(value)], _construct_by_call),
}


class Shared(NamedTuple):
    """A class of mutable containers, which are kept equal in both processes.

    Methods are called on the class, as derived classes may override them.
    """

    args: Callable[[Any], list[Any]]  # the arguments that make an empty one
    read: Callable[[Any], list[Any]]  # its items; of a dict, the keys and then the values
    write: Callable[[Any, list[Any]], object]  # replace its items
    init: Callable[..., None] | None = None  # other than the class's own


def _sequence(kind: Any) -> Shared:  # noqa: ANN401 - a class with these methods
    def write(value: Any, items: list[Any]) -> None:  # noqa: ANN401
        kind.clear(value)
        kind.extend(value, items)

    return Shared(lambda _: [], lambda value: [*kind.__iter__(value)], write)


def _write_set(value: set[Any], items: Iterable[Any]) -> None:
    set[Any].clear(value)
    set[Any].update(value, items)


def _read_dict(value: dict[Any, Any]) -> list[Any]:
    return [*dict.keys(value), *dict.values(value)]


def _write_dict(value: dict[Any, Any], items: list[Any]) -> None:
    half = len(items) // 2
    dict.clear(value)
    dict.update(value, zip(items[:half], items[half:], strict=True))


def _read_ordered(value: collections.OrderedDict[Any, Any]) -> list[Any]:
    keys = [*collections.OrderedDict.keys(value)]
    return [*keys, *(dict.__getitem__(value, key) for key in keys)]


def _write_ordered(value: collections.OrderedDict[Any, Any], items: list[Any]) -> None:
    half = len(items) // 2
    collections.OrderedDict.clear(value)
    for key, item in zip(items[:half], items[half:], strict=True):
        collections.OrderedDict.__setitem__(value, key, item)


def _write_array(value: array.array[Any], items: list[Any]) -> None:
    del value[:]
    array.array.fromlist(value, items)


DICT = Shared(lambda _: [], _read_dict, _write_dict)
DEQUE = _sequence(collections.deque)
SHARED: dict[type, Shared] = {
    list: _sequence(list),
    bytearray: _sequence(bytearray),
    set: Shared(lambda _: [], lambda value: [*set.__iter__(value)], _write_set),
    dict: DICT,
    collections.Counter: DICT._replace(init=dict.__init__),
    collections.defaultdict: DICT._replace(args=lambda value: [value.default_factory]),
    collections.OrderedDict: Shared(lambda _: [], _read_ordered, _write_ordered),
    collections.deque: DEQUE._replace(args=lambda value: [[], value.maxlen]),
    array.array: Shared(lambda value: [value.typecode], array.array.tolist, _write_array),
}


def make_shared(kind: type, args: list[Any], base: Any) -> Any:  # noqa: ANN401 - any container
    """Return an empty container of a class that is or is derived from `base`, a class of `SHARED`."""
    value = base.__new__(kind, *args)
    (SHARED[base].init or base.__init__)(value, *args)
    return value


def can_be_derived_from(kind: type) -> bool:
    """Return whether Python allows classes derived from this one."""
    return bool(kind.__flags__ & 1 << 10)  # Py_TPFLAGS_BASETYPE


def name_of(kind: type) -> str:
    """Return the name of a class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


KNOWN = {name_of(kind): kind for kind in (*PLAIN, *SHARED, bool, type(None), object, type)}


def names_of(kind: type) -> list[str]:
    """Return the name of a known class and those of its base classes: the other process may not have imported it."""
    return [name_of(base) for base in kind.__mro__ if is_known(base)]


def known_class(name: str) -> type | None:
    """Return the class of this name if both processes may have it: of a plain value, or a standard exception.

    An exception is looked up in modules that have been imported; no module is imported.
    """
    if name in KNOWN:
        return KNOWN[name]
    module, _, attribute = name.rpartition(".")
    if module.partition(".")[0] in sys.stdlib_module_names and module in sys.modules:
        kind = sys.modules[module].__dict__.get(attribute)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            return kind
    return None


def is_known(kind: type) -> bool:
    """Return whether both processes may have this very class."""
    return known_class(name_of(kind)) is kind


def is_standard(kind: type) -> bool:
    """Return whether a class is of the standard library."""
    return type.__getattribute__(kind, "__module__").partition(".")[0] in sys.stdlib_module_names
