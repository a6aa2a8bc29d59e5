"""Row types: messages, demonstrations, comparisons, prompts. Importing them does not import torch."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar, cast

from align.errors import InputError, RowOrigin

T_co = TypeVar("T_co", covariant=True)


@contextmanager
def at_place(place: str) -> Generator[None]:
    """Prefix the message of every `InputError` raised in this block with the place of a row."""
    try:
        yield
    except InputError as error:
        error.message = f"{place}: {error.message}"
        raise


def check_text(text: str) -> None:
    """Raise `InputError` for an unpaired surrogate, which JSON can contain and tokenizers reject."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        raise InputError(
            f"a text contains {surrogate!r}, an unpaired surrogate; write the whole character or remove it"
        ) from error


# Finish reasons of a response that ended before its end of turn, as engines and servers write them
CUT_OFF = ("length", "max_tokens", "max_length", "model_length", "content_filter", "abort")


def is_cut_off(finish: str | None) -> bool:
    """Return whether a response with this finish reason was cut off; one with an unknown reason was not.

    >>> is_cut_off("length"), is_cut_off("stop"), is_cut_off(None)
    (True, False, False)
    """
    return finish is not None and finish.lower() in CUT_OFF


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool in an assistant message. `arguments` is a JSON object, as text.

    Raise `InputError` for a call without a name and for arguments that are no JSON object.

    >>> ToolCall("weather", '{"city": "Oslo"}').to_json()
    {'type': 'function', 'function': {'name': 'weather', 'arguments': {'city': 'Oslo'}}}
    """

    name: str
    arguments: str = "{}"
    id: str | None = None  # what the message with its result refers to

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise InputError("a tool call has no name")
        for text in (self.name, self.arguments, self.id or ""):
            check_text(text)
        try:
            value = json.loads(self.arguments)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the arguments of a tool call are {self.arguments[:40]!r}; JSON is needed") from error
        if not isinstance(value, dict):
            raise InputError(f"the arguments of a tool call are {self.arguments[:40]!r}; a JSON object is needed")

    def to_json(self) -> dict[str, Any]:
        """Return the call as chat templates and the native form have it."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {**({} if self.id is None else {"id": self.id}), "type": "function", "function": function}


def with_calls(text: str, calls: Iterable[ToolCall]) -> str:
    """Return an assistant's text followed by its tool calls, in the form of Hermes, for readers without a template.

    >>> print(with_calls("I will look.", [ToolCall("weather", '{"city": "Oslo"}')]))
    I will look.
    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>
    """
    written = (
        f'<tool_call>\n{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {call.arguments}}}'
        "\n</tool_call>"
        for call in calls
    )
    return "\n".join(part for part in (text, *written) if part)


Tools = tuple[Mapping[str, Any], ...]  # definitions: {"type": "function", "function": {"name", "parameters", ...}}


def check_tools(tools: Tools) -> None:
    """Raise `InputError` for a tool that is not defined in OpenAI's form, or that JSON cannot represent."""
    for tool in tools:
        function: Any = tool.get("function")
        if not isinstance(function, Mapping) or not cast("Mapping[str, Any]", function).get("name"):
            raise InputError(
                "a tool has no function with a name; {'type': 'function', 'function': {'name': …}} is needed"
            )
        try:
            check_text(json.dumps(tool, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"a tool cannot be written as JSON: {type(error).__name__}") from error


ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue. `role` is one of `ROLES`.

    An assistant message may call tools; a `tool` message is a result: it may name the tool and the call.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"unknown role {self.role!r}; roles are: {', '.join(ROLES)}")
        if self.tool_calls and self.role != "assistant":
            raise InputError(f"a message of the {self.role} has tool calls; only the assistant's may")
        if (self.name is not None or self.tool_call_id is not None) and self.role != "tool":
            raise InputError(f"a message of the {self.role} has a name or tool_call_id; only a tool's may")
        for text in (self.content, self.name or "", self.tool_call_id or ""):
            check_text(text)

    @property
    def text(self) -> str:
        """The content followed by the tool calls, for readers without a chat template."""
        return with_calls(self.content, self.tool_calls)

    def to_json(self) -> dict[str, Any]:
        """Return the message as chat templates and the native form have it, without absent fields."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            fields["tool_calls"] = [call.to_json() for call in self.tool_calls]
        references = {"name": self.name, "tool_call_id": self.tool_call_id}
        return fields | {name: value for name, value in references.items() if value is not None}


def message_key(messages: Iterable[Message], tools: Tools = ()) -> list[Any]:
    """Return JSON values that identify messages and tools; those of messages without tools are roles and contents."""
    keys: list[Any] = []
    for message in messages:
        fields = message.to_json()
        more = {name: value for name, value in fields.items() if name not in ("role", "content")}
        keys.append([message.role, message.content, *([more] if more else [])])
    return [*keys, *([{"tools": list(tools)}] if tools else [])]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A dialogue to imitate. Every assistant message is trained, and nothing else.

    `finish` is why the last message ended, if it was sampled: one that was cut off is trained without an end of turn.
    `tools` are the tools that the assistant may call.

    Raise `InputError` without an assistant message, or if one is empty.
    """

    messages: tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    finish: str | None = None
    tools: Tools = field(default=(), hash=False)

    def __post_init__(self) -> None:
        check_tools(self.tools)
        answers = [message for message in self.messages if message.role == "assistant"]
        if not answers:
            raise InputError("a demonstration needs an assistant message")
        if not all(message.tool_calls or message.content.strip() for message in answers):
            raise InputError("an assistant message is empty")


@dataclass(frozen=True, slots=True)
class Response:
    """One response to a prompt, with its reward and its rated attributes, if any.

    `finish` is why a sampled response ended, such as `stop` or `length`: one that was cut off is trained without an
    end of turn. `tool_calls` follow the content.

    Raise `InputError` for an empty response or a value that is not finite.
    """

    content: str
    reward: float | None = None
    attributes: Mapping[str, float] = field(default_factory=dict, hash=False)  # attributes without a rating are absent
    finish: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def __post_init__(self) -> None:
        if not self.tool_calls and not self.content.strip():
            raise InputError("a response is empty")
        check_text(self.content)
        values = {"reward": self.reward, **self.attributes}
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                raise InputError(f"{name} is {value}; a finite number is needed; omit a missing one")

    @classmethod
    def of(
        cls,
        message: Message,
        reward: float | None = None,
        attributes: Mapping[str, float] | None = None,
        finish: str | None = None,
    ) -> Self:
        """Return an assistant's message as a response."""
        return cls(message.content, reward, attributes or {}, finish, message.tool_calls)

    @property
    def message(self) -> Message:
        """The response as the assistant's message."""
        return Message("assistant", self.content, self.tool_calls)


@dataclass(frozen=True, slots=True)
class Comparison:
    """K >= 1 responses to one prompt, all with a reward or none.

    `chosen` is the index of the response that the data labels as preferred, if it has a label. Rewards may disagree
    with it: losses on labels follow `chosen`, losses on rewards follow the rewards.

    >>> prompt = (Message("user", "How far is the moon?"),)
    >>> Comparison(prompt, (Response("384,400 km"), Response("Far")), chosen=2)
    Traceback (most recent call last):
    align.errors.InputError: chosen is 2; it must be the index of a response, 0 to 1
    """

    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    chosen: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: Tools = field(default=(), hash=False)

    def __post_init__(self) -> None:
        check_tools(self.tools)
        if not self.prompt or not any(message.content.strip() for message in self.prompt):
            raise InputError("a comparison needs a prompt")
        if not self.responses:
            raise InputError("a comparison needs at least one response")
        if len({response.reward is None for response in self.responses}) > 1:
            raise InputError("some responses of a comparison have a reward and some have none")
        if self.chosen is not None and not 0 <= self.chosen < len(self.responses):
            last = len(self.responses) - 1
            raise InputError(f"chosen is {self.chosen}; it must be the index of a response, 0 to {last}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue that ends with a message to answer. `metadata` holds what a verifier of the answers needs."""

    messages: tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: Tools = field(default=(), hash=False)
    origin: RowOrigin = field(default=RowOrigin(), compare=False, repr=False)

    def __post_init__(self) -> None:
        check_tools(self.tools)
        if not self.messages or self.messages[-1].role == "assistant":
            raise InputError("a prompt must end with a message that is not the assistant's")


Record = Demonstration | Comparison | Prompt


@dataclass(frozen=True, slots=True)
class Located(Generic[T_co]):
    """A record, or what was made from it, with its place in the data."""

    record: T_co
    place: str  # for error messages, as in "pairs.jsonl: row 12"
    row: int = 0  # index among the records of its source, from 0
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
