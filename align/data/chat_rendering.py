"""Messages to text with a tokenizer's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat_process import TEMPLATES, Text
from align.data.chat_templates import apply_template
from align.data.chat_tools import CALL_MARK, CallForm, Chat, best_form, chat_messages, check_marks, marked, probes
from align.errors import InputError
from align.records import Message, Tools

# A Unicode noncharacter, inserted into a special token inside a message so that it is not encoded as that token
ESCAPE = "\ufdd0"

# How many characters before the end of a prompt its last control token is searched for
SPLIT_SEARCH = 400

# Special tokens that a response writes itself, around its thought: `<think>`, `[/THINK]`, `<|START_THINKING|>` ...
THOUGHT_MARK = re.compile(r"[<\[]\|?/?(?:start_|end_)?(?:think(?:ing)?|thought|reason(?:ing)?)\|?[>\]]", re.I)

Key = tuple[bool, tuple[tuple[str, str], ...], str]


def is_written_mark(token: str) -> bool:
    """Return whether a special token is one that a response writes itself, around a thought or a tool call."""
    return THOUGHT_MARK.fullmatch(token) is not None or CALL_MARK.search(token) is not None


class ChatTemplate:
    """The chat template of a tokenizer.

    Special tokens inside a message are escaped with `ESCAPE`, so every control token in rendered text was written by
    the template. `control_tokens` are the special tokens and the added tokens that the template writes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.source = apply_template(tokenizer)
        self._known: dict[Key, Text] = {}
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.has_blocks = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self.source) is not None
        self.has_clock = "strftime_now" in self.source
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        written = {token.content for token in added if token.content in self.source}
        self.control_tokens = {token for token in special | written if token.strip()}
        self._ends = _any_of(token for token in self.control_tokens if not CALL_MARK.search(token))
        self._special = _any_of(token for token in special if len(token.strip()) > 1)
        self._splits = _any_of(
            token.content
            for token in added
            if token.content in self.control_tokens and not (token.normalized or token.lstrip or token.single_word)
        )

    @cached_property
    def call_form(self) -> CallForm:
        """The form in which the template takes tool calls."""
        asked = _asked((), probes())
        texts = TEMPLATES.render_all(self.source, asked, self._special_tokens)
        return best_form([None if text is None else text.text for text in texts])

    def chat(self, messages: Sequence[Message], tools: Tools = ()) -> Chat:
        """Return the messages and tools as a chat, with special tokens in their texts escaped.

        The marks around the thoughts and tool calls in the text of an assistant's message stay special tokens.
        """

        def escaped(match: re.Match[str]) -> str:
            return match[0][0] + ESCAPE + match[0][1:]

        def without_marks(match: re.Match[str]) -> str:
            return match[0] if is_written_mark(match[0]) else escaped(match)

        def content(message: Message) -> str:
            return self._special.sub(without_marks if message.role == "assistant" else escaped, message.content)

        def escape(text: str) -> str:
            return self._special.sub(escaped, text)

        defined = [json.loads(escape(json.dumps(tool, ensure_ascii=False))) for tool in tools]
        return Chat(chat_messages(messages, lambda: self.call_form, escape, content), defined or None)

    def check_tools(self, chat: Chat) -> None:
        """Raise `InputError` if the template leaves out a tool, a tool call or a result of the chat."""
        if chat.uses_tools:
            with_marks, marks = marked(chat, self.call_form)
            check_marks(self.render(with_marks)[0], marks)

    def render(self, *chats: Chat) -> list[str]:
        """Return each chat as text. Raise `InputError` if the template fails or exceeds a limit."""
        return [each.text for each in self._rendered(chats)]

    def render_prompts(self, prompts: Sequence[Chat], *chats: Chat) -> tuple[list[str], list[str]]:
        """Return prompts as text, with the header of the assistant's turn, and other chats."""
        texts = [each.text for each in self._rendered(chats, prompts)]
        return texts[: len(prompts)], texts[len(prompts) :]

    @contextmanager
    def rendered_together(self, prompts: Sequence[Chat], chats: Sequence[Chat]) -> Generator[None]:
        """Render prompts and chats in one request, which the block then asks for one by one."""
        asked = _asked(prompts, chats)
        texts = TEMPLATES.render_all(self.source, asked, self._special_tokens)
        self._known = {_key(one): text for one, text in zip(asked, texts, strict=True) if text is not None}
        try:
            yield
        finally:
            self._known = {}

    def _rendered(self, chats: Sequence[Chat], prompts: Sequence[Chat] = ()) -> list[Text]:
        """Return the texts of prompts, then of other chats."""
        asked = _asked(prompts, chats)
        known = [self._known.get(_key(one)) for one in asked] if self._known else []
        found = [text for text in known if text is not None]
        return found if len(found) == len(asked) else TEMPLATES.render(self.source, asked, self._special_tokens)

    def render_without(self, chat: Chat, index: int) -> str:
        """Return the chat as text with ESCAPE for one message: it differs from the chat where that message starts."""
        return self.render(chat.updated(index, content=ESCAPE))[0]

    def closing(self, chat: Chat) -> str:
        """Return what the template writes after the content of the assistant message that ends the chat."""
        text = self.render(chat.updated(len(chat.messages) - 1, content=ESCAPE))[0]
        _, found, closing = text.rpartition(ESCAPE)
        if not found:
            raise InputError("the chat template drops the assistant's message; use a template that keeps it")
        return closing

    def end_of_turn(self, text: str, start: int, stop: int) -> int:
        """Return where the control token starts that ends a turn, between two places of the text, or where it ends."""
        match = self._ends.search(text, start)
        return match.start() if match and match.start() <= stop else len(text[:stop].rstrip())

    def generation_blocks(self, chat: Chat) -> Text:
        """Return the chat as text, and where each generation block starts and ends in it, in characters."""
        return self._rendered([chat])[0]

    def last_control_token(self, prompt: str) -> int:
        """Return where the last control token of a prompt starts, or 0 if there is none near its end."""
        start = 0
        for match in self._splits.finditer(prompt, max(0, len(prompt) - SPLIT_SEARCH)):
            start = match.start()
        return start


def _asked(prompts: Sequence[Chat], chats: Sequence[Chat]) -> list[dict[str, Any]]:
    """Return the template variables of each chat."""
    return [*(_variables(chat, True) for chat in prompts), *(_variables(chat, False) for chat in chats)]


def _variables(chat: Chat, add_generation_prompt: bool) -> dict[str, Any]:
    tools = {"tools": chat.tools} if chat.tools else {}
    return {"messages": chat.messages, "add_generation_prompt": add_generation_prompt, **tools}


def _key(asked: dict[str, Any]) -> Key:
    messages = asked["messages"]
    has_more = "tools" in asked or any(len(message) > 2 for message in messages)  # noqa: PLR2004 - role and content
    texts = tuple((message["role"], message["content"]) for message in messages)
    return asked["add_generation_prompt"], texts, json.dumps([asked.get("tools"), messages]) if has_more else ""


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, longest first, or nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
