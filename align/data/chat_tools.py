"""Tools and tool calls in the form that chat templates expect, and the marks that show what a template leaves out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from align.errors import InputError
from align.records import Message, ToolCall

ID_LENGTH = 9  # characters of a generated id, as the templates of Mistral require
TOOL_NAME, CALL, RESULT = "tool", "tool call", "result of a tool"
# Tokens inside an assistant's message around its tool calls: `</tool_call>`, `[TOOL_CALLS]`, `<|python_tag|>` ...
CALL_MARK = re.compile(
    r"tool[_▁ ]?(?:calls?|sep)|function[_▁ ]?calls?|\[(?:args|call_id)\]|arg_(?:key|value)|python_tag|_action", re.I
)
MARK = "\ufdd1"  # a Unicode noncharacter

ChatMessage = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages and the tools of a dialogue as variables of a chat template."""

    messages: list[ChatMessage]
    tools: list[Any] | None = None

    @property
    def uses_tools(self) -> bool:
        """Whether a template could leave out a tool, a tool call or a result."""
        return bool(self.tools) or any(one["role"] == "tool" or "tool_calls" in one for one in self.messages)

    def before(self, index: int) -> Chat:
        """Return the chat up to a message, without it."""
        return replace(self, messages=self.messages[:index])

    def followed_by(self, *messages: ChatMessage) -> Chat:
        """Return the chat with more messages at its end."""
        return replace(self, messages=[*self.messages, *messages])

    def updated(self, index: int, **fields: Any) -> Chat:  # noqa: ANN401 - JSON holds any type
        """Return the chat with other values of a message's fields."""
        changed = {**self.messages[index], **fields}
        return replace(self, messages=[*self.messages[:index], changed, *self.messages[index + 1 :]])


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template takes tool calls: their arguments as an object or as text, and an empty content as "" or None."""

    arguments_as_text: bool = False
    empty_content: str | None = ""

    def call(self, name: str, arguments: str, call_id: str) -> ChatMessage:
        """Return a call as a template has it; `arguments` is JSON."""
        value = arguments if self.arguments_as_text else json.loads(arguments)
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": value}}

    def content(self, text: str) -> str | None:
        """Return the content of a message with tool calls."""
        return text or self.empty_content


FORMS = [CallForm(as_text, empty) for empty in ("", None) for as_text in (False, True)]  # the most usual one first
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A key."}}},
    },
}


def probes() -> list[Chat]:
    """Return one dialogue with a tool call in each of the `FORMS`."""
    call = [form.call("probe", '{"probe_key": "probe_value"}', "probe0000") for form in FORMS]
    return [
        Chat([{"role": "user", "content": "Probe."}, _calling(form.content(""), [one])], [PROBE_TOOL])
        for form, one in zip(FORMS, call, strict=True)
    ]


def _calling(content: str | None, calls: list[ChatMessage]) -> ChatMessage:
    return {"role": "assistant", "content": content, "tool_calls": calls}


def best_form(rendered: Sequence[str | None]) -> CallForm:
    """Return the first form in which a template writes the call of `probes`; `rendered` has None if it failed."""
    fitting = [form for form, text in zip(FORMS, rendered, strict=True) if text is not None and _writes_probe(text)]
    return fitting[0] if fitting else FORMS[0]


def _writes_probe(text: str) -> bool:
    """Return whether a call is written, and neither as Python's dict nor as JSON inside JSON."""
    own = text.rpartition("Probe.")[2]  # after the user's message
    return "probe_value" in own and "'probe_key'" not in own and '\\"probe_key' not in own


def chat_messages(
    messages: Sequence[Message],
    form: Callable[[], CallForm],
    escape: Callable[[str], str],
    content: Callable[[Message], str],
) -> list[ChatMessage]:
    """Return messages as a template has them.

    Every call has an id and every result the id and the name of its call: where the rows have none, a call gets nine
    characters that depend on its place and content, and results belong to the latest calls in order.
    """
    found: list[ChatMessage] = []
    open_calls: list[tuple[str, str]] = []  # id and name of calls without a result
    for place, message in enumerate(messages):
        fields: ChatMessage = {"role": message.role, "content": content(message)}
        if message.tool_calls:
            ids = [call.id or _generated_id(place, number, call) for number, call in enumerate(message.tool_calls)]
            open_calls = [(call_id, call.name) for call_id, call in zip(ids, message.tool_calls, strict=True)]
            calls = [
                form().call(escape(call.name), escape(call.arguments), escape(call_id))
                for call_id, call in zip(ids, message.tool_calls, strict=True)
            ]
            fields = _calling(form().content(fields["content"]), calls)
        elif message.role == "tool":
            call_id, name = _answered(message, open_calls)
            fields |= {"tool_call_id": escape(call_id)} if call_id else {}
            fields |= {"name": escape(name)} if name else {}
        found.append(fields)
    return found


def _generated_id(place: int, number: int, call: ToolCall) -> str:
    return hashlib.sha256(repr((place, number, call.name, call.arguments)).encode()).hexdigest()[:ID_LENGTH]


def _answered(message: Message, open_calls: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Return the id and the name of the call that a result answers, and remove it from the open ones."""
    matching = (one for one in open_calls if message.tool_call_id in (None, one[0]) and message.name in (None, one[1]))
    match = next(matching, None)
    if match is None:
        return message.tool_call_id, message.name
    open_calls.remove(match)
    return match


def marked(chat: Chat, form: CallForm) -> tuple[Chat, dict[str, str]]:
    """Return the chat with a mark for each tool's name, call and result, and what each mark stands for."""
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        text = f"{MARK}{len(marks)}{MARK}"
        marks[text] = what
        return text

    tools = [{**tool, "function": {**tool["function"], "name": mark(TOOL_NAME)}} for tool in chat.tools or ()]
    messages: list[ChatMessage] = []
    for message in chat.messages:
        if "tool_calls" in message:
            calls = [
                form.call(mark(CALL), json.dumps({mark(CALL): mark(CALL)}, ensure_ascii=False), call["id"])
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            message = {**message, "content": mark(RESULT)}
        messages.append(message)
    return Chat(messages, tools or None), marks


def check_marks(text: str, marks: dict[str, str]) -> None:
    """Raise `InputError` for the first mark that a template does not write."""
    lost = next((what for mark, what in marks.items() if mark not in text), None)
    if lost is not None:
        raise InputError(
            f"the chat template leaves out a {lost} of the row; set chat_template to one that writes tools, or remove "
            "them from the data"
        )


def last_call_marked(chat: Chat, index: int, form: CallForm) -> Chat:
    """Return the chat with a mark and a number as the arguments of the last call of a message."""
    *others, last = chat.messages[index]["tool_calls"]
    changed = form.call(last["function"]["name"], json.dumps({MARK: 1}, ensure_ascii=False), last["id"])
    return chat.updated(index, tool_calls=[*others, changed])


def closing_of_call(text: str, changed: str, alone: str) -> tuple[int, int]:
    """Return where the arguments of a message's last call end in a text, and where the message ends.

    `changed` is the text with the arguments of `last_call_marked`, `alone` the same up to this message. What follows
    the arguments is the same in all three.
    """
    end = len(text) - len(commonprefix([text[::-1], changed[::-1]]))
    after, own = (each[each.rfind(MARK) :] for each in (changed, alone))
    return end, len(text) - len(after) + len(commonprefix([after, own]))


def calling(chat: Chat) -> Iterator[int]:
    """Yield the index of each message with tool calls."""
    return (index for index, message in enumerate(chat.messages) if "tool_calls" in message)
