"""The process that renders chat templates: untrusted code, run within limits of time, memory and output.

It reads one JSON request a line and answers each with one line. The environment of the templates is that of
transformers: jinja2's immutable sandbox with a few functions. Nothing of this project is imported, so that it starts
fast.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, ext, nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# What a template can raise besides jinja's own errors, because it is a program
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class TooLong(Exception):
    """A template writes too much."""


class GenerationBlocks(ext.Extension):
    """The tag `{% generation %}` around what the assistant wrote, whose places are recorded."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it
    found: list[tuple[int, int]] | None = None  # start and end in characters, where they are recorded
    before: list[str] = []  # noqa: RUF012 - replaced for each rendering

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block as a call of `record`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("record"), [], [], body).set_lineno(line)

    def record(self, caller: Callable[[], str]) -> str:
        """Return the content of a block and record its place."""
        content = caller()
        if self.found is not None:
            start = sum(map(len, self.before))
            self.found.append((start, start + len(content)))
        return content


class TemplateNamespace(Namespace):
    """A namespace without attributes that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401, N805 - so that a template can set `self`
        self, *others = args
        values = dict(*others, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class TemplateDict:
    """The function `dict` of templates."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # noqa: ANN401 - any values
        """Return a dictionary."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # noqa: ANN401 - any values
        """Return a dictionary with these keys."""
        return dict.fromkeys(*args)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"{name!r}: a namespace has no attributes that begin with an underscore")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **settings: Any) -> str:  # noqa: ANN401 - of json.dumps
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


@cache
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {"raise_exception": _raise, "dict": TemplateDict(), "namespace": TemplateNamespace}
    environment.globals |= functions
    return environment.from_string(source)


def answer(source: str, request: dict[str, Any], *, max_characters: int) -> str:
    """Return the answer to a request as JSON: of each chat the text and its generation blocks, or one error.

    A chat of a lenient request that cannot be rendered has null.
    """
    texts: list[tuple[str, list[Any]] | None] = []
    try:
        for chat in request["chats"]:
            try:
                texts.append(_render(source, request, chat, max_characters))
            except TEMPLATE_ERRORS:
                if not request["lenient"]:
                    raise
                texts.append(None)
        return json.dumps({"texts": texts})
    except MemoryError:
        return json.dumps({"error": "it needs too much memory", "limit": True})
    except TooLong as error:
        return json.dumps({"error": f"{error}", "limit": True})
    except TEMPLATE_ERRORS as error:
        return json.dumps({"error": f"{error}"})


def _render(source: str, request: dict[str, Any], chat: dict[str, Any], max_characters: int) -> tuple[str, list[Any]]:
    """Return the text of a chat, and the start and end of each generation block in it."""
    template = _compiled(source)
    parts = list[str]()
    length = 0
    blocks: Any = template.environment.extensions[GenerationBlocks.identifier]
    blocks.found = []
    blocks.before = parts
    now = datetime.fromisoformat(request["now"])
    variables = {"tools": None, "documents": None, "strftime_now": now.strftime, **request["variables"], **chat}
    for part in template.generate(variables):
        parts.append(part)
        length += len(part)
        if length > max_characters:
            raise TooLong(f"it writes more than {max_characters:,} characters")
    return "".join(parts), blocks.found


@contextmanager
def limited_time(seconds: float) -> Generator[None]:
    """End this process if the block takes more processor time: nothing else interrupts a loop in C."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(max_seconds: float, max_bytes: int, max_characters: int) -> None:
    """Answer requests until the input ends. A template's source is sent once and named by its number afterwards."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when to stop
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
    with suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sources: dict[int, str] = {}
    for message in sys.stdin.buffer:
        with limited_time(max_seconds):
            request = json.loads(message)
            if "source" in request:
                sources[request["number"]] = request["source"]
            line = answer(sources[request["number"]], request, max_characters=max_characters)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
