"""Chat lists, in OpenAI's or ShareGPT's form, and plain text to messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from align.data.readers.cells import as_list, as_object, as_text, shortened
from align.data.readers.markup import messages_from_markup, without_end_marker
from align.data.readers.roles import role_of
from align.errors import InputError
from align.records import Message

LOSS_FIELDS = ("loss_weight", "weight", "train")  # whether a turn is trained: LLaMA-Factory, OpenAI, Axolotl
UNSUPPORTED_FIELDS = (  # fields of a message with content that would be lost
    *("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "refusal", "function_call"),
    *("image", "images", "image_url", "audio", "audios", "video", "videos", "documents", "attachments"),
)

Messages = tuple[Message, ...]


def as_messages(value: Any, name: str) -> Messages:  # noqa: ANN401 - a cell of any type
    """Return the messages of a chat list."""
    return tuple(as_message(turn) for turn in as_list(value, name))


def as_message(turn: Any) -> Message:  # noqa: ANN401 - an item of a chat list
    """Return the message of `role` and `content`, or of `from` and `value`. Only text is supported.

    >>> as_message({"from": "human", "value": "Hello"})
    Message(role='user', content='Hello')
    """
    fields = as_object(turn, "a message")
    name = str(fields.get("role") or fields.get("from"))
    if fields.get("tool_calls") or name == "function_call":
        raise InputError("a message contains a tool call; only text is supported")
    unsupported = next((name for name in UNSUPPORTED_FIELDS if _is_filled(fields.get(name))), "")
    if unsupported:
        raise InputError(f"a message has {unsupported} besides its content; move it into the content, or remove it")
    content = fields["content"] if fields.get("content") is not None else fields.get("value")
    return Message(role_of(name), as_text(content, f"the content of a {name} message"))


def _is_filled(value: Any) -> bool:  # noqa: ANN401 - a cell of any type
    if isinstance(value, Mapping):
        return any(map(_is_filled, cast("Mapping[str, Any]", value).values()))
    return isinstance(value, str | bytes | list) and bool(cast("str | bytes | list[Any]", value))


def prompt_messages(value: Any, name: str) -> Messages:  # noqa: ANN401 - a cell of any type
    """Return the messages of a chat list or of text with markup; plain text is one user message."""
    if isinstance(value, list):
        return as_messages(cast(list[Any], value), name)
    text = as_text(value, name)
    return messages_from_markup(text) or (Message("user", text),)


def answer_messages(value: Any, name: str) -> Messages:  # noqa: ANN401 - a cell of any type
    """Return the messages of an answer, of which the last is the assistant's.

    An answer is plain text, text with markup, a message, or a chat list.
    """
    if isinstance(value, list | Mapping):
        turns = cast(list[Any], value) if isinstance(value, list) else [value]
        messages = as_messages(turns, name)
        check_trained(turns[-1:])
    else:
        text = as_text(value, name)
        messages = messages_from_markup(text) or (Message("assistant", without_end_marker(text)),)
    if not messages or messages[-1].role != "assistant":
        raise InputError(f"{name} does not end with an assistant message")
    return messages


def check_trained(turns: list[Any]) -> None:
    """Raise `InputError` if a row excludes an assistant message from training, which is not supported."""
    for turn in turns:
        marks = {name: turn[name] for name in LOSS_FIELDS if turn.get(name) is not None}
        partial = [f"{name} {shortened(value)}" for name, value in marks.items() if value != 1]
        if partial and as_message(turn).role == "assistant":
            raise InputError(
                f"an assistant message has {partial[0]}, and a demonstration trains every assistant message in full"
            )
