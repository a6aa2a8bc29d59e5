"""Messages to text with a tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.chat_process import TEMPLATES, Text
from align.data.chat_templates import apply_template
from align.errors import InputError
from align.records import Message

# A Unicode noncharacter, inserted into a special token inside a message so that it is not encoded as that token
ESCAPE = "\ufdd0"

# How many characters before the end of a prompt its last control token is searched for
SPLIT_SEARCH = 400

# Special tokens that a response writes itself, around its thought: `<think>`, `[/THINK]`, `<|START_THINKING|>` ...
THOUGHT_MARK = re.compile(r"[<\[]\|?/?(?:start_|end_)?(?:think(?:ing)?|thought|reason(?:ing)?)\|?[>\]]", re.I)

Chat = list[dict[str, str]]
Key = tuple[bool, tuple[tuple[str, str], ...]]


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
        self._special = _any_of(token for token in special if len(token.strip()) > 1)
        self._splits = _any_of(
            token.content
            for token in added
            if token.content in self.control_tokens and not (token.normalized or token.lstrip or token.single_word)
        )

    def chat(self, messages: Iterable[Message]) -> Chat:
        """Return the messages as a chat list, with special tokens in their content escaped.

        The marks around the thoughts of an assistant's message stay special tokens.
        """

        def escaped(match: re.Match[str]) -> str:
            return match[0][0] + ESCAPE + match[0][1:]

        def without_marks(match: re.Match[str]) -> str:
            return match[0] if THOUGHT_MARK.fullmatch(match[0]) else escaped(match)

        return [
            {
                "role": message.role,
                "content": self._special.sub(
                    without_marks if message.role == "assistant" else escaped, message.content
                ),
            }
            for message in messages
        ]

    def render(self, *chats: Chat) -> list[str]:
        """Return each chat as text. Raise `InputError` where the template fails or exceeds a limit."""
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
        return self.render([*chat[:index], {**chat[index], "content": ESCAPE}, *chat[index + 1 :]])[0]

    def closing(self, chat: Chat) -> str:
        """Return what the template writes after the content of an assistant message that ends the chat."""
        text = self.render([*chat, {"role": "assistant", "content": ESCAPE}])[0]
        _, found, closing = text.rpartition(ESCAPE)
        if not found:
            raise InputError("the chat template drops the assistant's message; use a template that keeps it")
        return closing

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
    """Return what differs in the template's variables from chat to chat."""
    asked = [{"messages": chat, "add_generation_prompt": True} for chat in prompts]
    return [*asked, *({"messages": chat, "add_generation_prompt": False} for chat in chats)]


def _key(asked: dict[str, Any]) -> Key:
    messages = ((message["role"], message["content"]) for message in asked["messages"])
    return asked["add_generation_prompt"], tuple(messages)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, longest first, or nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
