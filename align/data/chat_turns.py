"""Dialogues to text, with the place of every assistant turn in it."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

from align.data.chat_rendering import Chat, ChatTemplate
from align.errors import InputError
from align.records import Comparison, Demonstration, Message, is_cut_off

# The end of a generation prompt that opens a thought, such as `<think>\n`, `[THINK]` or `<|START_THINKING|>`
OPEN_THOUGHT = re.compile(r"(?:<\|?|\[)(?:start_)?(?:think(?:ing)?|thought|reason(?:ing)?)(?:\|?>|\])\s*\Z", re.I)
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
    alters an assistant message, or rewrites the prompt once a response follows it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, closes_cut: bool = False) -> None:
        self._template = ChatTemplate(tokenizer)
        self._closes_cut = closes_cut
        self.control_tokens = self._template.control_tokens
        self.has_clock = self._template.has_clock

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """Return the messages as text, with the header of the assistant's turn."""
        ((text,), _) = self._template.render_prompts([self._template.chat(messages)])
        split = self._template.last_control_token(text)
        return Rendered(text[:split], text[split:])

    @contextmanager
    def rendered_together(self, records: Iterable[Demonstration | Comparison]) -> Generator[None]:
        """Render many records in one request, which the block then asks for one by one."""
        asked = [self._chats_of(record) for record in records]
        prompts, chats = ([chat for each in asked for chat in each[part]] for part in (0, 1))
        with self._template.rendered_together(prompts, chats):
            yield

    def _chats_of(self, record: Demonstration | Comparison) -> tuple[list[Chat], list[Chat]]:
        """Return the prompts of a record, and the dialogues that follow them."""
        if isinstance(record, Comparison):
            prompt = self._template.chat(record.prompt)
            answers = self._template.chat(Message("assistant", each.content) for each in record.responses)
            return [prompt], [[*prompt, answer] for answer in answers]
        chat = self._template.chat(record.messages)
        return [chat[:index] for index, one in enumerate(chat) if index and one["role"] == "assistant"], [chat]

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
        indices = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
        if indices == [len(chat) - 1] and prompts and OPEN_THOUGHT.search(prompts[0]):
            return self._answered(chat, prompts[0], text, is_cut=is_cut)
        starts = self._starts(chat, text, dict(zip([index for index in indices if index], prompts, strict=True)))
        stops = [*list(starts.values())[1:], len(text)]
        turns = [
            self._turn(chat, index, text, span=(start, stop))
            for (index, start), stop in zip(starts.items(), stops, strict=True)
        ]
        if is_cut:
            text, turns[-1] = _cut(text, turns[-1], chat[indices[-1]]["content"])
        return Rendered("", text, tuple(turns))

    def _ends_cut(self, finish: str | None) -> bool:
        return is_cut_off(finish) and not self._closes_cut

    def _answered(self, chat: Chat, prompt: str, text: str, *, is_cut: bool) -> Rendered:
        """Return a chat that ends with a response, whose prompt is given as text and which is rendered as `text`."""
        content = chat[-1]["content"]
        thought = _continued_thought(prompt, content, is_cut=is_cut)
        if thought is not None:  # templates keep, rewrite or drop a thought that the prompt has opened
            content, text = thought, prompt + thought + self._template.closing(chat[:-1])
        self._check_prefix(prompt, text)
        chat = [*chat[:-1], {**chat[-1], "content": content}]
        turn = self._turn(chat, len(chat) - 1, text, span=(len(prompt), len(text)))
        if is_cut:
            text, turn = _cut(text, turn, content)
        return Rendered(text[: turn.split], text[turn.split :], (_shifted(turn, -turn.split),))

    def _turn(self, chat: Chat, index: int, text: str, *, span: tuple[int, int]) -> Turn:
        """Return the places of the assistant message in this span of the text."""
        start, stop = span
        content = chat[index]["content"].strip()
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
        end = place + len(content)
        following = chat[index + 1]["content"].strip() if index + 1 < len(chat) else ""
        next_message = max(text.find(following, end), end) if following else len(text)
        return Turn(self._template.last_control_token(text[:start]), start, end, next_message)

    def _starts(self, chat: Chat, text: str, prompts: Mapping[int, str]) -> dict[int, int]:
        """Return where each assistant message starts: after its prompt, and not before its generation block."""
        indices = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
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
            content = chat[index]["content"].strip()
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
        hint = " (try {% set enable_thinking = false %} as its first line)" if has_switch else ""
        if OPEN_THOUGHT.search(prompt):
            hint += ", or give each response the thought that the prompt opens, and each answer a row of its own"
        raise InputError(
            f"the chat template rewrites the prompt when a response follows: "
            f"{prompt[place : place + 60]!r} becomes {text[place : place + 60]!r}; "
            f"name a .jinja file that leaves the earlier text unchanged{hint}"
        )


def _continued_thought(prompt: str, content: str, *, is_cut: bool) -> str | None:
    """Return a response that continues a thought which the prompt has opened, without the opening mark; else None."""
    opening = OPEN_THOUGHT.search(prompt)
    if opening is None:
        return None
    mark, text = opening[0].strip(), content.lstrip()
    if text.startswith(mark):
        return text.removeprefix(mark).removeprefix(opening[0].removeprefix(mark))
    return content if is_cut or CLOSED_THOUGHT.search(content) else None


def _cut(text: str, turn: Turn, content: str) -> tuple[str, Turn]:
    """Return a text that ends with its last turn, as the message does, and that turn."""
    text = text[: turn.end] + content[len(content.rstrip()) :]
    return text, replace(turn, end=len(text), next_message=len(text), is_cut=True)


def _shifted(turn: Turn, by: int) -> Turn:
    return replace(
        turn, split=turn.split + by, start=turn.start + by, end=turn.end + by, next_message=turn.next_message + by
    )
