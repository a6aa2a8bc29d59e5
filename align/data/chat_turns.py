"""Dialogues to text, with the place of every assistant turn in it."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat_rendering import ChatTemplate
from align.data.chat_tools import Chat, calling, closing_of_call, last_call_marked, marked
from align.errors import InputError
from align.records import Comparison, Demonstration, Message, Tools, is_cut_off

# The end of a generation prompt that opens a thought, such as `<think>\n`, `[THINK]` or `<|START_THINKING|>`
OPEN_THOUGHT = re.compile(r"(?:<\|?|\[)(?:start_)?(?:think(?:ing)?|thought|reason(?:ing)?)(?:\|?>|\])\s*\Z", re.I)
SLOT = "TEXT_OF_THE_USER"  # stands for a message that the model writes
LONGEST_MARK = 64  # characters, with the whitespace after it
CLOSED_THOUGHT = re.compile(r"(?:</|\[/|<\|/|<\|end_)(?:think(?:ing)?|thought|reason(?:ing)?)", re.I)


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant message in rendered text. Places count characters."""

    split: int  # start of the prompt's last control token; the text before it and after it is tokenized independently
    start: int  # end of the prompt with its generation header
    end: int  # end of the message's content
    next_message: int  # a control token that starts after this belongs to the next message
    is_cut: bool = False  # the message was cut off: the text ends with it


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue as text: a head shared with the other responses, then the rest with the assistant's turns.

    A prompt has no turns.
    """

    head: str
    text: str
    turns: tuple[Turn, ...] = ()

    def prompt_end(self, turn: Turn) -> str:
        """Return the end of the turn's prompt, from its last control token on."""
        return self.text[turn.split : turn.start]

    def texts(self) -> Iterator[str]:
        """Yield every text that has to be tokenized."""
        yield self.head
        yield self.text
        yield from map(self.prompt_end, self.turns)


class Renderer:
    """Render prompts, comparisons and demonstrations with the tokenizer's chat template.

    A response that was cut off gets no end of turn, unless `closes_cut`. Raise `InputError` for a template that fails,
    alters an assistant message, leaves out a tool, a tool call or its result, or rewrites the prompt once a response
    follows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, closes_cut: bool = False) -> None:
        self._template = ChatTemplate(tokenizer)
        self._closes_cut = closes_cut
        self.control_tokens = self._template.control_tokens
        self.has_clock = self._template.has_clock

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> Rendered:
        """Return the messages as text, with the header of the assistant's turn."""
        chat = self._template.chat(messages, tools)
        ((text,), _) = self._template.render_prompts([chat])
        self._template.check_tools(chat)
        return self._without_turns(text)

    def open_user_turn(self, before: Sequence[Message]) -> Rendered:
        """Return a dialogue as text up to where the content of the user's next message begins."""
        (text,) = self._template.render(self._template.chat([*before, Message("user", SLOT)]))
        opened, slot, _ = text.rpartition(SLOT)
        if not slot:
            raise InputError("the chat template alters a user's message, so no prompt can be made with it")
        return self._without_turns(opened)

    def _without_turns(self, text: str) -> Rendered:
        split = self._template.last_control_token(text)
        return Rendered(text[:split], text[split:])

    @contextmanager
    def rendered_together(self, records: Iterable[Demonstration | Comparison]) -> Generator[None]:
        """Render many records in one request, which the block then asks for one by one."""
        asked = [self._chats_of(record) for record in records]
        prompts, chats = ([chat for each in asked for chat in each[part]] for part in (0, 1))
        more = [each for chat in chats if chat.uses_tools for each in self._variants(chat)]
        with self._template.rendered_together(prompts, [*chats, *more]):
            yield

    def _chats_of(self, record: Demonstration | Comparison) -> tuple[list[Chat], list[Chat]]:
        """Return the prompts of a record, and the dialogues that follow them."""
        if isinstance(record, Comparison):
            return [self._template.chat(record.prompt, record.tools)], [
                self._template.chat((*record.prompt, each.message), record.tools) for each in record.responses
            ]
        chat = self._template.chat(record.messages, record.tools)
        return [chat.before(index) for index in _assistant(chat) if index], [chat]

    def _variants(self, chat: Chat) -> Iterator[Chat]:
        """Yield the chats whose texts show what the template makes of the chat's tools and tool calls."""
        form = self._template.call_form
        yield marked(chat, form)[0]
        for index in calling(chat):
            changed = last_call_marked(chat, index, form)
            yield changed
            if index + 1 < len(chat.messages):
                yield changed.before(index + 1)

    def comparison(self, record: Comparison) -> list[Rendered]:
        """Return the prompt with each of the responses."""
        prompts, chats = self._chats_of(record)
        ((prompt_text,), texts) = self._template.render_prompts(prompts, *chats)
        return [
            self._answered(whole, prompt_text, text, is_cut=self._ends_cut(response.finish))
            for whole, text, response in zip(chats, texts, record.responses, strict=True)
        ]

    def demonstration(self, record: Demonstration) -> Rendered:
        """Return the dialogue with a turn for each assistant message."""
        before, (chat,) = self._chats_of(record)
        prompts, (text,) = self._template.render_prompts(before, chat)
        is_cut = self._ends_cut(record.finish)
        indices = _assistant(chat)
        last = len(chat.messages) - 1
        if indices == [last] and prompts and OPEN_THOUGHT.search(prompts[0]):
            return self._answered(chat, prompts[0], text, is_cut=is_cut)
        self._template.check_tools(chat)
        starts = self._starts(chat, text, dict(zip([index for index in indices if index], prompts, strict=True)))
        stops = [*list(starts.values())[1:], len(text)]
        turns = [
            self._turn(chat, index, text, span=(start, stop))
            for (index, start), stop in zip(starts.items(), stops, strict=True)
        ]
        if is_cut:
            text, turns[-1] = _cut(text, turns[-1], chat.messages[indices[-1]])
        return Rendered("", text, tuple(turns))

    def _ends_cut(self, finish: str | None) -> bool:
        return is_cut_off(finish) and not self._closes_cut

    def _answered(self, chat: Chat, prompt: str, text: str, *, is_cut: bool) -> Rendered:
        """Return a chat that ends with a response, whose prompt is given as text and which is rendered as `text`."""
        self._template.check_tools(chat)
        last = len(chat.messages) - 1
        thought = _continued_thought(prompt, chat.messages[last]["content"] or "", is_cut=is_cut)
        if thought is not None:  # templates keep, rewrite or drop a thought that the prompt has opened
            text = prompt + thought + self._template.closing(chat)
            chat = chat.updated(last, content=thought)
        self._check_prefix(prompt, text)
        turn = self._turn(chat, last, text, span=(len(prompt), len(text)))
        if is_cut:
            text, turn = _cut(text, turn, chat.messages[last])
        return Rendered(text[: turn.split], text[turn.split :], (_shifted(turn, -turn.split),))

    def _turn(self, chat: Chat, index: int, text: str, *, span: tuple[int, int]) -> Turn:
        """Return the places of the assistant message in this span of the text."""
        start, stop = span
        message = chat.messages[index]
        content = (message["content"] or "").strip()
        place = stop - len(text[start:stop].lstrip())
        opening = OPEN_THOUGHT.search(text, max(0, start - LONGEST_MARK), start)
        if opening is not None and text.startswith(content, opening.start()):  # the prompt has opened its thought
            place = opening.start()
        if not text.startswith(content, place):  # the template writes something first, such as an empty thought
            other = self._template.render_without(chat, index)
            place = text.find(content, start + len(commonprefix([text[start:stop], other[start:]])), stop)
        if place < 0:
            raise InputError(
                f"the chat template alters an assistant message: {text[start:stop][:40]!r} is written for "
                f"{content[:40]!r}; use a template that keeps the message, or remove from the data what it drops"
            )
        split = self._template.last_control_token(text[:start])
        if "tool_calls" in message:
            end, stop = self._end_of_calls(chat, index, text)
            if place + len(content) > end:
                raise InputError("the chat template writes the content of a message after its tool calls")
            return Turn(split, start, end, stop)
        end = place + len(content)
        following = chat.messages[index + 1 : index + 2]
        content_after = (following[0]["content"] or "").strip() if following else ""
        next_message = max(text.find(content_after, end), end) if content_after else len(text)
        return Turn(split, start, end, next_message)

    def _end_of_calls(self, chat: Chat, index: int, text: str) -> tuple[int, int]:
        """Return where the tool calls of a message end in the text, and where the message ends."""
        changed = last_call_marked(chat, index, self._template.call_form)
        of_changed, alone = self._template.render(changed, changed.before(index + 1))
        end, stop = closing_of_call(text, of_changed, alone)
        return self._template.end_of_turn(text, end, stop), stop

    def _starts(self, chat: Chat, text: str, prompts: Mapping[int, str]) -> dict[int, int]:
        """Return where each assistant message starts: after its prompt, and not before its generation block."""
        indices = _assistant(chat)
        starts = self._block_starts(chat, indices) if self._template.has_blocks else dict.fromkeys(indices, 0)
        for index in indices:
            if index not in prompts:  # without a prompt, only the message's own text belongs to it
                other = self._template.render_without(chat, index)
                starts[index] = max(starts[index], len(commonprefix([text, other])))
                continue
            prompt = prompts[index]
            if not self._template.has_blocks:
                self._check_prefix(prompt, text)
            if text.startswith(prompt):
                starts[index] = max(starts[index], len(prompt))
        return starts

    def _block_starts(self, chat: Chat, indices: Sequence[int]) -> dict[int, int]:
        """Return where the generation block of each assistant message starts."""
        text, blocks = self._template.generation_blocks(chat)
        remaining = iter(blocks)
        starts: dict[int, int] = {}
        for index in indices:
            content = (chat.messages[index]["content"] or "").strip()
            start = next((start for start, end in remaining if content in text[start:end]), None)
            if start is None:
                raise InputError(
                    f"no generation block of the chat template contains {content[:40]!r}; "
                    "each assistant message needs a block around its whole text and its end-of-turn token"
                )
            starts[index] = start
        return starts

    def _check_prefix(self, prompt: str, text: str) -> None:
        """Raise `InputError` unless the text starts with its prompt."""
        if text.startswith(prompt):
            return
        place = max(0, len(commonprefix([prompt, text])) - 20)
        has_switch = "enable_thinking" in self._template.source
        hint = " (with {% set enable_thinking = false %} as its first line)" if has_switch else ""
        if OPEN_THOUGHT.search(prompt):
            hint += ", or begin each response with its <think> block and use one row per answer"
        raise InputError(
            f"the rendered prompt is not the beginning of prompt and response: "
            f"{prompt[place : place + 60]!r} becomes {text[place : place + 60]!r}; "
            f"use a chat template that leaves earlier text unchanged{hint}"
        )


def _continued_thought(prompt: str, content: str, *, is_cut: bool) -> str | None:
    """Return a response that continues a thought which the prompt has opened, without the opening mark; else None."""
    opening = OPEN_THOUGHT.search(prompt)
    if opening is None:
        return None
    mark = opening[0].strip()
    text = content.lstrip()
    if text.startswith(mark):
        return text.removeprefix(mark).removeprefix(opening[0].removeprefix(mark))
    return content if is_cut or CLOSED_THOUGHT.search(content) else None


def _assistant(chat: Chat) -> list[int]:
    """Return the index of each assistant message."""
    return [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]


def _cut(text: str, turn: Turn, message: Mapping[str, Any]) -> tuple[str, Turn]:
    """Return a text that ends with its last turn, as the message does, and that turn."""
    if "tool_calls" in message:
        raise InputError("a message with tool calls was cut off, and a tool call ends with its message")
    content: str = message["content"]
    text = text[: turn.end] + content[len(content.rstrip()) :]
    return text, replace(turn, end=len(text), next_message=len(text), is_cut=True)


def _shifted(turn: Turn, by: int) -> Turn:
    return replace(
        turn, split=turn.split + by, start=turn.start + by, end=turn.end + by, next_message=turn.next_message + by
    )
