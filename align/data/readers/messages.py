"""Chat lists, in OpenAI's or ShareGPT's form, and plain text to messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from align.data.readers.cells import as_list, as_object, as_text, shortened
from align.data.readers.markup import messages_from_markup, without_end_marker
from align.data.readers.roles import ROLES, role_of
from align.data.readers.tool_calls import THOUGHT_FIELDS, as_calls, calls_of, with_thought
from align.errors import InputError
from align.records import Message

# Whether a turn is trained: LLaMA-Factory, OpenAI, Axolotl (both names), ms-swift
LOSS_FIELDS = ("loss_weight", "weight", "train", "training", "loss")
OF_ANSWERS = (*THOUGHT_FIELDS, "tool_calls", "function_call")  # fields that only an assistant message has
CALLING_ROLES = ("function_call", "tool_call")
OF_RESULTS = ("name", "tool_call_id")  # fields that are read of a tool's message
UNSUPPORTED_FIELDS = (  # fields of a message with content that would be lost
    *("refusal", "image", "images", "image_url", "audio", "audios", "video", "videos", "documents", "attachments"),
)
LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{\s*['\"]\w+['\"]\s*:")  # how one begins as JSON or as a Python literal
TURN_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})  # of a message
READ_FIELDS = {"role", "from", "content", "value", *LOSS_FIELDS, *OF_ANSWERS}

Messages = tuple[Message, ...]


def as_messages(value: Any, name: str) -> Messages:  # noqa: ANN401 - a cell of any type
    """Return the messages of a chat list."""
    return tuple(as_message(turn) for turn in as_list(value, name))


def as_message(turn: Any) -> Message:  # noqa: ANN401 - an item of a chat list
    """Return the message of `role` and `content`, or of `from` and `value`. Only text and tool calls are supported.

    A thought becomes part of the text of an assistant message.

    >>> as_message({"from": "human", "value": "Hello"}) == Message("user", "Hello")
    True
    """
    fields = as_object(turn, "a message")
    role_name = str(fields.get("role") or fields.get("from"))
    content = fields["content"] if fields.get("content") is not None else fields.get("value")
    if role_name in CALLING_ROLES:  # a turn of ShareGPT's
        return Message("assistant", "", as_calls(content))
    role = role_of(role_name)
    filled = [field for field in fields if _is_filled(fields[field])]
    of_answers = [field for field in OF_ANSWERS if field in filled]
    unsupported = [field for field in UNSUPPORTED_FIELDS if field in filled] or of_answers
    if role != "assistant":
        _check_untrained(role, fields)
    if unsupported and (role != "assistant" or unsupported != of_answers):
        raise InputError(
            f"a message of the {role} has {unsupported[0]} besides its content; move it into the content, or remove it"
        )
    if role == "tool" and _is_json(content):
        content = json.dumps(content, ensure_ascii=False)
    if content is None and of_answers:
        content = ""
    text = as_text(content, f"the content of a {role_name} message")
    if role == "tool":
        name, call_id = (as_text(fields[field], field) if field in filled else None for field in OF_RESULTS)
        return Message(role, text, name=name, tool_call_id=call_id)
    return Message(role, with_thought(fields, text), calls_of(fields)) if of_answers else Message(role, text)


def _is_json(content: object) -> bool:
    """Return whether the result of a tool is an object, or a list that is not one of text parts."""
    if not isinstance(content, list):
        return isinstance(content, Mapping)
    parts = cast(list[Any], content)
    return not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts)


def unread_fields(turns: Any, column: str) -> set[str]:  # noqa: ANN401 - a cell of any type
    """Return the fields of messages that are not read, as in `messages.name`."""
    if not isinstance(turns, list):
        return set()
    objects = [cast("Mapping[str, Any]", turn) for turn in cast(list[Any], turns) if isinstance(turn, Mapping)]
    unread = ((turn, turn.keys() - READ_FIELDS - _of_results(turn)) for turn in objects)
    return {f"{column}.{field}" for turn, fields in unread for field in fields if _is_filled(turn[field])}


def _of_results(turn: Mapping[str, Any]) -> set[str]:
    """Return the fields that are read of a turn because it is a tool's result."""
    role = str(turn.get("role") or turn.get("from")).lower()
    return set(OF_RESULTS) if ROLES.get(role) == "tool" else set()


def _is_filled(value: Any) -> bool:  # noqa: ANN401 - a cell of any type
    if isinstance(value, Mapping):
        return any(map(_is_filled, cast("Mapping[str, Any]", value).values()))
    return isinstance(value, str | bytes | list) and bool(cast("str | bytes | list[Any]", value))


def prompt_messages(value: Any, name: str) -> Messages:  # noqa: ANN401 - a cell of any type
    """Return the messages of a chat list or of text with markup; plain text is one user message."""
    if (turns := chat_list(value, name)) is not None:
        return as_messages(turns, name)
    text = as_text(value, name)
    return messages_from_markup(text) or (Message("user", text),)


def chat_list(value: Any, name: str) -> list[Any] | None:  # noqa: ANN401 - a cell of any type
    """Return a chat list, also one that is written as JSON or as a Python literal, as in CSV files; None for others."""
    if isinstance(value, list):
        return cast(list[Any], value)
    if not isinstance(value, str) or not LIST_OF_OBJECTS.match(value):
        return None
    try:
        turns = as_list(value, name)
    except InputError:  # text that only begins like one
        return None
    are_messages = all(isinstance(turn, Mapping) and any(keys <= turn.keys() for keys in TURN_KEYS) for turn in turns)
    return turns if are_messages else None


def answer_messages(value: Any, name: str) -> Messages:  # noqa: ANN401 - a cell of any type
    """Return the messages of an answer, of which the last is the assistant's.

    An answer is plain text, text with markup, a message, or a chat list.
    """
    turns = [value] if isinstance(value, Mapping) else chat_list(value, name)
    if turns is not None:
        messages = as_messages(turns, name)
        check_trained(turns[-1:])
    else:
        text = as_text(value, name)
        messages = messages_from_markup(text) or (Message("assistant", without_end_marker(text)),)
    if not messages or messages[-1].role != "assistant":
        raise InputError(f"{name} does not end with an assistant message")
    return messages


def _check_untrained(role: str, fields: Mapping[str, Any]) -> None:
    """Raise `InputError` if a row asks to train a message that is not the assistant's, which is not supported."""
    asked = [f"{name} {shortened(value)}" for name, value in _loss_marks(fields).items() if value != 0]
    if asked:
        raise InputError(
            f"a message of the {role} has {asked[0]}, which is not supported: "
            "the loss is computed on assistant messages only; remove the field"
        )


def _loss_marks(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in LOSS_FIELDS if fields.get(name) is not None}


def check_trained(turns: list[Any]) -> None:
    """Raise `InputError` if a row excludes an assistant message from training, which is not supported."""
    for turn in turns:
        partial = [f"{name} {shortened(value)}" for name, value in _loss_marks(turn).items() if value != 1]
        if partial and as_message(turn).role == "assistant":
            raise InputError(
                f"an assistant message has {partial[0]}, which is not supported: "
                "the loss is computed on every assistant message"
            )
