"""Messages to text by a chat template: which template, and where in its text each response stands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.errors import InputError, one_line
from align.records import Message
from align.registry import suggest

# A Unicode noncharacter, put inside a special token that someone typed so that it is not read as the token
BREAK = "\ufdd0"

SEAM_REACH = 400  # characters before the end of a prompt in which its last control token is looked for

# What a template, which is a program of the user's own, may end with beside jinja's errors
OF_A_PROGRAM = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

Chat = list[dict[str, str]]


class BuiltIn(NamedTuple):
    """A chat template with the token that ends a turn, which its source calls `end_of_turn`; EOS stands in for it."""

    end_of_turn: str | None
    source: str


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant message in a rendered text; places count characters."""

    seam: int  # start of a control token in the prompt: what stands before and after it is tokenized independently
    start: int  # end of the prompt with its generation header
    end: int  # end of what was said
    bound: int  # a control token that begins behind this belongs to the next message


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue as text: a head that the other responses share, then the rest with the assistant's turns."""

    head: str
    text: str
    turns: tuple[Turn, ...]

    def asked(self, turn: Turn) -> str:
        """The end of the turn's prompt, from its seam."""
        return self.text[turn.seam : turn.start]

    def texts(self) -> Iterator[str]:
        """Everything that has to be tokenized."""
        yield self.head
        yield self.text
        yield from map(self.asked, self.turns)


class Renderer:
    """Dialogues to text by the tokenizer's chat template.

    A special token that someone typed into a message is broken by BREAK, so that every token that the text seems to
    contain was written by the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = apply_template(tokenizer)
        self._has_blocks = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", self._template) is not None
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        written = {token.content for token in added if token.content in self._template}
        self.control = {token for token in special | written if token.strip()}
        self._typed = _any_of(token for token in special if len(token.strip()) > 1)
        self._seams = _any_of(
            token.content
            for token in added
            if token.content in self.control and not (token.normalized or token.lstrip or token.single_word)
        )

    def prompt(self, messages: Sequence[Message]) -> str:
        """The messages with the header of the turn that answers them."""
        return self._render([self._chat(messages)], generation_prompt=True)[0]

    def comparison(self, prompt: Sequence[Message], responses: Sequence[str]) -> list[Rendered]:
        """The prompt with each of the responses."""
        chat = self._chat(prompt)
        said = self._chat(Message("assistant", response) for response in responses)
        asked = self._render([chat], generation_prompt=True)[0]
        texts = self._render([[*chat, message] for message in said])
        for text in texts:
            self._check_prefix(asked, text)
        turns = [
            self._turn([*chat, message], len(chat), text, span=(len(asked), len(text)))
            for message, text in zip(said, texts, strict=True)
        ]
        return [
            Rendered(
                text[: turn.seam],
                text[turn.seam :],
                (Turn(0, turn.start - turn.seam, turn.end - turn.seam, turn.bound - turn.seam),),
            )
            for turn, text in zip(turns, texts, strict=True)
        ]

    def demonstration(self, messages: Sequence[Message]) -> Rendered:
        """The whole dialogue with a turn for each assistant message."""
        chat = self._chat(messages)
        text = self._render([chat])[0]
        starts = self._starts(chat, text)
        stops = [*list(starts.values())[1:], len(text)]
        turns = [
            self._turn(chat, index, text, span=(start, stop))
            for (index, start), stop in zip(starts.items(), stops, strict=True)
        ]
        return Rendered("", text, tuple(turns))

    def _turn(self, chat: Chat, index: int, text: str, *, span: tuple[int, int]) -> Turn:
        """The places of the assistant message that `text` holds within the span."""
        start, stop = span
        content = chat[index]["content"].strip()
        place = stop - len(text[start:stop].lstrip())
        if not text.startswith(content, place):  # the template puts something first, such as an empty thought
            unsaid = self._unsaid(chat, index)
            place = text.find(content, start + len(commonprefix([text[start:stop], unsaid[start:]])), stop)
        if place < 0:
            raise InputError(
                f"the chat template alters an assistant message: it writes {text[start:stop][:40]!r} for "
                f"{content[:40]!r}; use a template that keeps all of it, or take out of the data what it drops",
            )
        end = place + len(content)
        following = chat[index + 1]["content"].strip() if index + 1 < len(chat) else ""
        bound = max(text.find(following, end), end) if following else len(text)
        return Turn(self._seam(text[:start]), start, end, bound)

    def _unsaid(self, chat: Chat, index: int) -> str:
        """The dialogue with BREAK for one message, which differs from the dialogue where that message begins."""
        return self._render([[*chat[:index], {**chat[index], "content": BREAK}, *chat[index + 1 :]]])[0]

    def _chat(self, messages: Iterable[Message]) -> Chat:
        def broken(typed: re.Match[str]) -> str:
            return typed[0][0] + BREAK + typed[0][1:]

        return [{"role": message.role, "content": self._typed.sub(broken, message.content)} for message in messages]

    def _render(self, chats: list[Chat], *, generation_prompt: bool = False) -> list[str]:
        try:
            texts: Any = self._tokenizer.apply_chat_template(
                chats, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, *OF_A_PROGRAM) as error:
            raise InputError(f"the chat template refuses the dialogue: {one_line(error)}") from error
        return texts

    def _starts(self, chat: Chat, text: str) -> dict[int, int]:
        """Where in `text` each assistant message starts: behind its prompt, and not before its generation block."""
        said = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
        starts = self._block_starts(chat, said) if self._has_blocks else dict.fromkeys(said, 0)
        for index in said:
            if index == 0:  # it has no prompt, so its own text is all that is its
                starts[index] = max(starts[index], len(commonprefix([text, self._unsaid(chat, index)])))
                continue
            asked = self._render([chat[:index]], generation_prompt=True)[0]
            if not self._has_blocks:
                self._check_prefix(asked, text)
            if text.startswith(asked):
                starts[index] = max(starts[index], len(asked))
        return starts

    def _block_starts(self, chat: Chat, said: Sequence[int]) -> dict[int, int]:
        """Where the generation block of each assistant message begins, as the template reports it."""
        settings: Any = self._tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(
            [chat], chat_template=self._template, return_assistant_tokens_mask=True, **settings
        )
        text, blocks = rendered[0][0], iter(rendered[1][0])
        starts: dict[int, int] = {}
        for index in said:
            content = chat[index]["content"].strip()
            start = next((start for start, end in blocks if content in text[start:end]), None)
            if start is None:
                raise InputError(
                    f"no generation block of the chat template holds {content[:40]!r}; "
                    "each assistant message needs a block around its whole text and its end of turn",
                )
            starts[index] = start
        return starts

    def _check_prefix(self, asked: str, text: str) -> None:
        if text.startswith(asked):
            return
        place = max(0, len(commonprefix([asked, text])) - 20)
        switch = (
            " ({% set enable_thinking = false %} at its head may do)" if "enable_thinking" in self._template else ""
        )
        raise InputError(
            f"the chat template rewrites the prompt once a response follows: "
            f"{asked[place : place + 60]!r} becomes {text[place : place + 60]!r}; "
            f"name a .jinja file that leaves what came before as it was{switch}",
        )

    def _seam(self, prompt: str) -> int:
        """Where the last control token of the prompt begins; 0 where its end has none."""
        seam = 0
        for found in self._seams.finditer(prompt, max(0, len(prompt) - SEAM_REACH)):
            seam = found.start()
        return seam


def apply_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    """The source of the chat template that the tokenizer has from now on.

    No name keeps the tokenizer's own; a name takes the built-in one; a path that ends in .jinja is read.
    """
    if name is None:
        if not tokenizer.chat_template:
            raise InputError(f"the tokenizer has no chat template; name a .jinja file or one of {', '.join(TEMPLATES)}")
        return tokenizer.get_chat_template()
    source = _read(Path(name)) if name.endswith(".jinja") else _built_in(tokenizer, name)
    tokenizer.chat_template = source
    return source


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS before plain text by itself."""
    with_bos: Any = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and with_bos[:1] == [tokenizer.bos_token_id]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat template {path} cannot be read: {one_line(error)}") from error


def _built_in(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if name not in TEMPLATES:
        raise InputError(f"no chat template is called {name!r}; {suggest(name, TEMPLATES)}, or a path to a .jinja file")
    token, source = TEMPLATES[name]
    # A token that the vocabulary lacks would need a new, untrained embedding; EOS has one.
    known = token in {added.content for added in tokenizer.added_tokens_decoder.values()}
    if not known and tokenizer.eos_token is None:
        raise InputError(f"chat template {name!r} ends a turn with EOS, and the tokenizer has no eos_token")
    bos = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    return f"{{% set end_of_turn = {repr(token) if known else 'eos_token'} %}}{bos}{source}"


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the tokens, the longest first; it matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


TEMPLATES = {
    "chatml": BuiltIn(
        end_of_turn="<|im_end|>",
        source="{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + end_of_turn + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    # Text as it stands, for base models: contents joined, and EOS after a response.
    "plain": BuiltIn(
        end_of_turn=None,
        source="{% for message in messages %}"
        "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ end_of_turn }}{% endif %}"
        "{% endfor %}",
    ),
    # The form of Nemotron-4-340B-Instruct: a response ends where the mark of the next turn begins.
    "steerlm": BuiltIn(
        end_of_turn="<extra_id_1>",
        source="{{ '<extra_id_0>System\n' }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
        "{{ '\n<extra_id_1>' }}"
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ message['role'] | capitalize + '\n' + message['content'] }}"
        "{% if message['role'] == 'assistant' and end_of_turn != '<extra_id_1>' %}{{ end_of_turn }}{% endif %}"
        "{{ '\n<extra_id_1>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant\n' }}{% endif %}",
    ),
}
