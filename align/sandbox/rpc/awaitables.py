"""Generators and coroutines of the other process, as generators and coroutines of this one.

A coroutine of the program runs in an event loop of the program's process, a few milliseconds at a time, in between
those of the test's event loop; so tasks of both make progress together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any, Protocol

SLICE_S = 0.005  # of the program's event loop at a time


class Remote(Protocol):
    """A generator, coroutine or task of the other process."""

    @property
    def busy(self) -> bool:
        """Whether a call is under way, so that no other can be made."""
        ...

    def call(self, operation: str, /, *args: Any) -> Any:  # noqa: ANN401 - any value
        """Return the result of an operation on it."""
        ...


class Steps:
    """The steps of a generator or coroutine of the other process, for `yield from`."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> Any:  # noqa: ANN401 - any value
        return self.send(None)

    def send(self, value: object) -> Any:  # noqa: ANN401 - any value
        """Continue with the value of a `yield`."""
        return self._remote.call("send", value)

    def throw(self, *error: Any) -> Any:  # noqa: ANN401 - any value
        """Continue with an exception."""
        return self._remote.call("throw", error[-1] if len(error) == 1 else (error[1] or error[0]))

    def close(self) -> None:
        """End the generator; one that is collected during a call is left alone."""
        if not self._remote.busy:
            self._remote.call("close")


def generator(remote: Remote) -> Generator[Any, Any, Any]:
    """Return a generator for one of the other process."""
    return (yield from Steps(remote))  # pyright: ignore[reportReturnType] - a duck-typed generator


async def coroutine(remote: Remote) -> Any:  # noqa: ANN401 - any value
    """Return the result of a coroutine of the program."""
    return await Driven(remote)


class Driven:
    """What the tests await: it runs an awaitable of the program in the program's event loop."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def __await__(self) -> Generator[None, None, Any]:
        task = self._remote.call("start")
        try:
            wait_s = 0.0  # let the other tasks of the test start before any waits
            while not self._remote.call("advance", task, wait_s):
                yield
                wait_s = SLICE_S
        except BaseException:  # cancelled
            self._remote.call("cancel", task)
            raise
        return self._remote.call("result", task)


class Tasks:
    """The program's event loop: operations on awaitables that the tests drive."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, awaitable: Awaitable[Any]) -> asyncio.Task[Any]:
        """Return a task that awaits something of the program."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()

        async def wait() -> Any:  # noqa: ANN401 - any value
            return await awaitable

        return self._loop.create_task(wait())

    def advance(self, _: object, task: asyncio.Task[Any], wait_s: float) -> bool:
        """Run the event loop until the task is done, or for `wait_s`; return whether it is."""
        assert self._loop is not None
        if not task.done():
            self._loop.run_until_complete(asyncio.wait({task}, timeout=wait_s))
        return task.done()

    def cancel(self, _: object, task: asyncio.Task[Any]) -> None:
        """Cancel a task and let it clean up."""
        if not task.done() and task.cancel():
            self.advance(None, task, SLICE_S)

    @staticmethod
    def result(_: object, task: asyncio.Task[Any]) -> Any:  # noqa: ANN401 - any value
        """Return the result of a task that is done."""
        return task.result()
