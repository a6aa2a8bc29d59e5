"""Row types: messages, demonstrations, comparisons, prompts. Importing them does not import torch."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from align.errors import InputError

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


ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue. `role` is one of `ROLES`."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"unknown role {self.role!r}; roles are: {', '.join(ROLES)}")
        check_text(self.content)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A dialogue to imitate. Every assistant message is trained, and nothing else.

    `finish` is why the last message ended, if it was sampled: one that was cut off is trained without an end of turn.

    Raise `InputError` without an assistant message, or if one is empty.
    """

    messages: tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    finish: str | None = None

    def __post_init__(self) -> None:
        answers = [message for message in self.messages if message.role == "assistant"]
        if not answers:
            raise InputError("a demonstration needs an assistant message")
        if not all(message.content.strip() for message in answers):
            raise InputError("an assistant message is empty")


@dataclass(frozen=True, slots=True)
class Response:
    """One response to a prompt, with its reward and its rated attributes, if any.

    `finish` is why a sampled response ended, such as `stop` or `length`: one that was cut off is trained without an
    end of turn.

    Raise `InputError` for an empty response or a value that is not finite.
    """

    content: str
    reward: float | None = None
    attributes: Mapping[str, float] = field(default_factory=dict, hash=False)  # attributes without a rating are absent
    finish: str | None = None

    def __post_init__(self) -> None:
        if not self.content.strip():
            raise InputError("a response is empty")
        check_text(self.content)
        values = {"reward": self.reward, **self.attributes}
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                raise InputError(f"{name} is {value}; a finite number is needed; omit a missing one")


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

    def __post_init__(self) -> None:
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

    def __post_init__(self) -> None:
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
