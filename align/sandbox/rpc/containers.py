"""Mutable containers that both processes hold: each message carries what its sender has changed in them.

Only one process runs at a time, and a container is looked at whenever the other one is about to run, so that both
always see the same content: under every alias, inside other containers, and long after the call that it came with.
A container that either process no longer refers to is released by both.
"""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from align.sandbox.rpc.values import KNOWN, SHARED, Shared, make_shared, name_of

Codec = Callable[[Any], Any]


class _Entry:
    """A container, and its items when the processes last agreed on them."""

    __slots__ = ("row", "seen", "value")

    def __init__(self, value: Any, row: Shared) -> None:  # noqa: ANN401 - any container
        self.value = value
        self.row = row
        self.seen: list[Any] = []


class SharedContainers:
    """One process's table of the shared containers, by number; the two processes number theirs odd and even."""

    def __init__(self, *, trusted: bool) -> None:
        self._entries: dict[int, _Entry] = {}
        self._numbers: dict[int, int] = {}  # by id(value)
        self._parity = 0 if trusted else 1
        self._num_created = 0
        self._new: list[list[Any]] = []
        self._unsent: deque[int] = deque()  # numbers of new containers whose items have not been encoded

    def number(self, value: Any, row: Shared, *, make_args: Callable[[], list[Any]] | None) -> int:  # noqa: ANN401
        """Return the number of a container; a new one is created in the other process by the next message.

        With `make_args` None, the other process creates it as an object of a derived class.
        """
        if (number := self._numbers.get(id(value))) is not None:
            return number
        number = 2 * self._num_created + self._parity
        self._num_created += 1
        self._add(number, value, row)
        self._unsent.append(number)
        if make_args is not None:
            self._new.append([number, name_of(type(value)), make_args()])
        return number

    def value(self, number: int) -> Any:  # noqa: ANN401 - any container
        """Return the container of a number."""
        return self._entries[number].value

    def adopt(self, number: int, value: Any, row: Shared) -> None:  # noqa: ANN401 - any container
        """Enter a container that the other process has created."""
        if number in self._entries or number % 2 == self._parity:
            raise ValueError(f"containers of number {number!r} are not accepted")
        self._add(number, value, row)

    def _add(self, number: int, value: Any, row: Shared) -> None:  # noqa: ANN401 - any container
        self._entries[number] = _Entry(value, row)
        self._numbers[id(value)] = number

    def outgoing(self, encode: Codec) -> dict[str, Any]:
        """Return the part of a message that describes new and changed containers and those no longer used here."""
        if not self._entries:
            return {}
        changed: list[list[Any]] = []
        unsent = {*self._unsent}
        for number, entry in [*self._entries.items()]:
            if number not in unsent and not _same(items := entry.row.read(entry.value), entry.seen):
                entry.seen = items
                changed.append([number, [encode(item) for item in items]])
        items = entry = None
        while self._unsent:
            number = self._unsent.popleft()
            entry = self._entries[number]
            entry.seen = entry.row.read(entry.value)
            changed.append([number, [encode(item) for item in entry.seen]])
            entry = None
        new = self._new
        self._new = []
        parts = {"new": new, "changed": changed, "released": self._release_unused()}
        return {name: part for name, part in parts.items() if part}

    def _release_unused(self) -> list[int]:
        released: list[int] = []
        for number in [*self._entries]:
            if _num_references(self._entries[number]) == UNUSED:
                self._forget(number)
                released.append(number)
        return released

    def _forget(self, number: int) -> None:
        entry = self._entries.pop(number)
        del self._numbers[id(entry.value)]

    def create(self, message: Mapping[str, Any], decode: Codec) -> None:
        """Create the new containers of a message, empty."""
        for number, name, args in message.get("new", ()):
            kind = KNOWN[name]
            self.adopt(number, make_shared(kind, [decode(arg) for arg in args], kind), SHARED[kind])

    def update(self, message: Mapping[str, Any], decode: Codec) -> None:
        """Fill the new and changed containers of a message, and release those that its sender has released."""
        for number, items in message.get("changed", ()):
            entry = self._entries[number]
            entry.row.write(entry.value, [decode(item) for item in items])
            entry.seen = entry.row.read(entry.value)
        for number in message.get("released", ()):
            self._forget(number)


def _same(items: list[Any], seen: list[Any]) -> bool:
    """Return whether two lists hold the same objects; `==` might call methods of the other process."""
    return len(items) == len(seen) and all(map(operator.is_, items, seen))


def _num_references(entry: _Entry) -> int:
    return sys.getrefcount(entry.value)


UNUSED = _num_references(_Entry([], SHARED[list]))  # references to a container that only its entry holds
