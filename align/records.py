"""What a row of data is once it has been read: messages, demonstrations, comparisons, prompts. No torch."""

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
    """Raise where the text holds half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f"a text holds {half!r}, half a character; put the whole there or leave it out") from error


ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"a message's role is one of {', '.join(ROLES)}, not {self.role!r}")
        check_text(self.content)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A dialogue to imitate: every assistant message is supervised and nothing else."""

    messages: tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        said = [message for message in self.messages if message.role == "assistant"]
        if not said:
            raise InputError("a demonstration needs an assistant message")
        if not all(message.content.strip() for message in said):
            raise InputError("an assistant message is empty")


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt, with what is known of its quality."""

    content: str
    reward: float | None = None
    attributes: Mapping[str, float] = field(default_factory=dict, hash=False)  # a missing label is left out

    def __post_init__(self) -> None:
        if not self.content.strip():
            raise InputError("a response is empty")
        check_text(self.content)
        values = {"reward": self.reward, **self.attributes}
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                raise InputError(f"{name} is {value}; a finite number is needed (leave a missing one out)")


@dataclass(frozen=True, slots=True)
class Comparison:
    """K >= 1 responses to one prompt.

    `chosen` is the index of the response that the data itself names as preferred, where it names one. Rewards
    may still disagree with it: losses of a label follow `chosen`, losses of a reward follow the rewards.
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
        known = {response.reward is None for response in self.responses}
        if len(known) > 1:
            raise InputError("some responses of a comparison have a reward and some have none")
        if self.chosen is not None and not 0 <= self.chosen < len(self.responses):
            raise InputError(f"chosen is {self.chosen}, and there are {len(self.responses)} responses")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue to be answered, with what a checker needs to know."""

    messages: tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role == "assistant":
            raise InputError("a prompt ends with a message that is to be answered")


Record = Demonstration | Comparison | Prompt


@dataclass(frozen=True, slots=True)
class Located(Generic[T_co]):
    """A record, or what was made from it, with its place in the data."""

    record: T_co
    place: str  # for error messages, as in "pairs.jsonl: row 12"
    row: int = 0  # index among the records of its source, from 0
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
