"""Rows to demonstrations and prompts: chat lists in either dialect, SteerLM and Human/Assistant markup, plain text."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from align.data.rows import Row
from align.errors import InputError, one_line
from align.records import Demonstration, Message, Prompt, Record

SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
TRAINED_FIELDS = ("loss_weight", "weight", "train")  # how LLaMA-Factory, OpenAI and Axolotl say that a turn is trained
SAID_BESIDE = (  # fields of a message that hold something said or shown, under which nothing is trained
    *("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "refusal", "function_call"),
    *("image", "images", "image_url", "audio", "audios", "video", "videos", "documents", "attachments"),
)
STEERLM = re.compile(r"(?:\A|\n)<extra_id_[01]>(System|User|Assistant)\n")
STEERLM_END = re.compile(r"\n?<extra_id_[12]>\s*\Z")
HUMAN_ASSISTANT = re.compile(r"\n\n(Human|Assistant):")  # Bai et al. 2022 (HH-RLHF)

PROMPT_COLUMNS = (
    *("prompt", "conversations", "context_messages", "raw_text"),
    *("instruction", "question", "query", "problem", "input", "context"),
)
SYSTEM_COLUMNS = ("system", "system_prompt", "system_instruction")
BESIDE = ("input", "context")  # what an instruction or a question is about
DIALOGUES = ("messages", "conversations", "conversation", "conversation_json")
ANSWERS = {  # column of the request -> columns of the answer to it
    "prompt": ("completion", "response", "output", "code"),
    "instruction": ("output", "response"),
    "input": ("output",),
    "question": ("answer",),
    "problem": ("solution",),
    "query": ("response",),
    "text": ("code",),
}
HALVES_OF_A_PAIR = ("chosen", "rejected", "chosen_response", "rejected_response")

Messages = tuple[Message, ...]


def listed(value: Any, what: str) -> list[Any]:  # noqa: ANN401 - a cell of whatever type
    """The list that `value` is, or that it spells as JSON or as a Python literal (a CSV holds nothing but text)."""
    for _ in range(3):  # text within text: a literal may itself have been written as a JSON string
        if not isinstance(value, str):
            break
        value = _unquoted(value, what)
    if not isinstance(value, list):
        raise InputError(f"{what} is {shortened(value)}; a list is needed")
    return cast(list[Any], value)


def _unquoted(text: str, what: str) -> Any:  # noqa: ANN401 - whatever the text spells
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        with_commas = re.sub(r"\}\s*\n\s*\{", "}, {", text)  # NumPy prints the items of an array without commas
    try:
        return ast.literal_eval(with_commas)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(f"{what} is {shortened(text)}; a list is needed, as JSON or as a Python literal") from error


def mapped(value: Any, what: str) -> Row:  # noqa: ANN401 - a cell of whatever type
    """The object that `value` is."""
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is {shortened(value)}; an object with named fields is needed")
    return cast(Row, value)


def messages(value: Any, what: str) -> Messages:  # noqa: ANN401 - a cell of whatever type
    """The messages of a chat list."""
    return tuple(message(turn) for turn in listed(value, what))


def _holds_something(value: Any) -> bool:  # noqa: ANN401 - a cell of whatever type the file has
    if isinstance(value, Mapping):
        return any(map(_holds_something, cast("Mapping[str, Any]", value).values()))
    return isinstance(value, str | bytes | list) and bool(cast("str | bytes | list[Any]", value))


def message(turn: Any) -> Message:  # noqa: ANN401 - a turn as it stands in the file
    """The message of `role` and `content`, or of `from` and `value`; a turn that holds more than text is refused."""
    fields = mapped(turn, "a message")
    name = str(fields.get("role") or fields.get("from"))
    if fields.get("tool_calls") or name == "function_call":
        raise InputError("a message calls a tool; records hold text only")
    beside = next((name for name in SAID_BESIDE if _holds_something(fields.get(name))), "")
    if beside:
        raise InputError(f"a message has {beside} beside its content; write it into the content, or take it out")
    content = fields["content"] if fields.get("content") is not None else fields.get("value")
    return Message(speaker(name), spoken(content, f"the content of a {name} message"))


def speaker(name: str) -> str:
    """The role that a file's `name` for it means."""
    if name.lower() not in SPEAKERS:
        raise InputError(f"a message's role is {shortened(name)}; known are {', '.join(SPEAKERS)}")
    return SPEAKERS[name.lower()]


def spoken(content: Any, what: str) -> str:  # noqa: ANN401 - text, or parts of text
    """The text of `content`: a string, or the joined parts of a list that holds nothing but text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{what} is {shortened(content)}; text is needed")
    parts = cast(list[Any], content)
    others = [part for part in parts if not isinstance(part, Mapping) or part.get("type") != "text"]
    if others:
        raise InputError(f"{what} has a part that is not text: {shortened(others[0])}")
    return "".join(spoken(part.get("text", part.get("value")), what) for part in parts)


def prompt_messages(value: Any, what: str) -> Messages:  # noqa: ANN401 - a cell of whatever type
    """The messages of a chat list, of marked-up text, or one user message of plain text."""
    if isinstance(value, list):
        return messages(cast(list[Any], value), what)
    text = spoken(value, what)
    return from_markup(text) or (Message("user", text),)


def from_markup(text: str) -> Messages:
    """The messages of a text in SteerLM or Human/Assistant markup; none where it has no such markup.

    The opening of an unwritten answer at the end is left out, and so is an empty system message.
    """
    before, *turns = STEERLM.split(STEERLM_END.sub("", text) if STEERLM.search(text) else text)
    if not turns:
        before, *turns = HUMAN_ASSISTANT.split(text)
        if before or not turns:
            return ()
        turns = [turn.strip() for turn in turns]
    said = [Message(speaker(name), content) for name, content in zip(turns[::2], turns[1::2], strict=True)]
    if before:
        said.insert(0, Message("user", before))
    if said[0] == Message("system", ""):
        said.pop(0)
    if said and said[-1] == Message("assistant", ""):
        said.pop()
    return tuple(said)


def reply_messages(value: Any, what: str) -> Messages:  # noqa: ANN401 - a cell of whatever type
    """The messages of an answer, to the assistant's last: of text, a dialogue in markup, a message or a list."""
    if isinstance(value, list | Mapping):
        turns = cast(list[Any], value) if isinstance(value, list) else [value]
        said = messages(turns, what)
        refuse_untrained(turns[-1:])
    else:
        text = spoken(value, what)
        said = from_markup(text) or (Message("assistant", STEERLM_END.sub("", text)),)
    if not said or said[-1].role != "assistant":
        raise InputError(f"{what} does not end with an answer of the assistant")
    return said


def refuse_untrained(turns: list[Any]) -> None:
    """Raise where an assistant message is marked as not to be trained, for a demonstration trains them all."""
    for turn in turns:
        marks = {name: turn[name] for name in TRAINED_FIELDS if turn.get(name) is not None}
        partial = [f"{name} {shortened(value)}" for name, value in marks.items() if value != 1]
        if partial and message(turn).role == "assistant":
            raise InputError(f"an assistant message carries {partial[0]}, and a demonstration trains every one in full")


def shortened(value: object) -> str:
    """`value` on one line, cut to what an error can show."""
    text = one_line(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


class Asked(NamedTuple):
    """What a row asks, and the columns that say it."""

    messages: Messages
    columns: tuple[str, ...]


def asked(row: Row, columns: Sequence[str] = PROMPT_COLUMNS) -> Asked:
    """The prompt under the first of `columns` that is there, after the row's system message and earlier turns.

    The material of an instruction or a question (`input`, `context`) follows it after a blank line.
    """
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        return Asked((), ())
    beside = BESIDE if column in ("instruction", "question") else ()
    material, *unused = [name for name in beside if row.get(name)] or [""]
    value = row[column]
    if material:
        value = f"{spoken(value, column)}\n\n{spoken(row[material], material)}".lstrip("\n")
    said = prompt_messages(value, column)
    if not any(one.content.strip() for one in said):
        raise InputError(f"{column} is empty")
    earlier: list[Message] = []
    for turn in listed(row.get("history") or [], "history"):
        pair = [spoken(text, "a text of the history") for text in listed(turn, "a turn of the history")]
        if len(pair) != 2:
            raise InputError(f"a turn of the history has {len(pair)} texts; a question and its answer are needed")
        earlier += (Message("user", pair[0]), Message("assistant", pair[1]))
    used = (name for name in beside if name not in unused)
    return Asked(with_system(row, (*earlier, *said)), (column, *used, "history", *SYSTEM_COLUMNS))


def with_system(row: Row, said: Messages) -> Messages:
    """The messages after the row's own system text, where it has one; they may repeat it and have no other."""
    texts = {spoken(row[name], "the system message") for name in SYSTEM_COLUMNS if row.get(name)}
    own = {one.content for one in said if one.role == "system"}
    if texts and len({text.strip() for text in texts | own}) > 1:
        raise InputError("the row has two system messages; one is needed, in a column or as the first message")
    return (Message("system", texts.pop()), *said) if texts and not own else said


def rest(row: Row, used: Iterable[str]) -> dict[str, Any]:
    """The columns that are not used, with the content of `metadata` among them."""
    inner = row.get("metadata")
    taken = {*used, "metadata"} if isinstance(inner, Mapping) else {*used}
    outer = {name: value for name, value in row.items() if name not in taken}
    return {**outer, **cast(Row, inner)} if isinstance(inner, Mapping) else outer


def dialogue(row: Row) -> Iterator[Record]:
    """A demonstration, or a prompt where the dialogue still waits for an answer."""
    refuse_half_a_pair(row)
    column = next(name for name in DIALOGUES if name in row)
    turns = listed(row[column], column)
    said = with_system(row, messages(turns, column))
    metadata = rest(row, {column, "mask", *SYSTEM_COLUMNS})
    if not said or said[-1].role != "assistant":
        yield Prompt(said, metadata)
        return
    refuse_untrained(turns)
    if row.get("mask") and speaker(str(row["mask"])) == "assistant":  # NeMo-Aligner's name for who is not trained
        raise InputError(f"mask is {shortened(row['mask'])}, and a demonstration trains what the assistant says")
    yield Demonstration(said, metadata)


def demonstration(row: Row) -> Iterator[Record]:
    """A request and its answer."""
    pairs = [(name, key) for name, keys in ANSWERS.items() for key in keys if {name, key} <= row.keys()]
    if not pairs:
        raise InputError(f"there is no answer among {shortened(list(row))}")
    request, reply = pairs[0]
    prompt = asked(row, (request,))
    if not row.get("history") and any(one.role == "assistant" for one in prompt.messages):
        raise InputError("the prompt holds answers, which a demonstration would train; give the whole as messages")
    said = reply_messages(row[reply], reply)
    if isinstance(row[reply], list):
        refuse_untrained(cast(list[Any], row[reply]))
    yield Demonstration((*prompt.messages, *said), rest(row, {*prompt.columns, reply}))


def refuse_half_a_pair(row: Row) -> None:
    """Raise where the row would have been a pair, had it both halves."""
    half = next((name for name in HALVES_OF_A_PAIR if name in row), None)
    if half:
        raise InputError(f"there is a column {half}, and its other half is missing")


def seed_tasks(row: Row) -> Iterator[Record]:
    """A demonstration for each instance of an instruction; Wang et al. 2022 (Self-Instruct)."""
    metadata = rest(row, {"instances"})
    for instance in listed(row["instances"], "instances"):
        yield from demonstration({**metadata, **mapped(instance, "an instance")})


def prompt_only(row: Row) -> Iterator[Record]:
    """A prompt; what a checker of its answers needs is in the metadata."""
    refuse_half_a_pair(row)
    prompt = asked(row, ("prompt",))
    yield Prompt(prompt.messages, rest(row, prompt.columns))
