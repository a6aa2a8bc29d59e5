"""Length limits of a row, and the table `OVERLONG` of what happens to a row that exceeds them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.data.token_groups import TokenSequence
from align.errors import InputError
from align.records import Message, Tools

MIN_LENGTH = 2  # tokens: one as context, one to predict
# A sequence with more characters is overlong whatever its tokens are. Tokenizers take 300 bytes of memory a character.
MIN_CHARACTERS, UNLIMITED_CHARACTERS = 1_000_000, 4_000_000  # the least limit, and the one without a limit in tokens
CHARACTERS_PER_TOKEN = 16  # several times as many as in any language


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Lengths of a row in tokens, with its limits."""

    prompt: int  # tokens before the first response token; all responses share them
    longest: int  # tokens of the longest sequence
    max_prompt: int
    max_length: int
    has_bos: bool

    @property
    def fit(self) -> bool:
        """Whether the row is within both limits."""
        return self.prompt <= self.max_prompt and self.longest <= self.max_length


def length_limit(name: str, value: int | None) -> int:
    """Return a limit in tokens, or the largest integer for None. Raise `InputError` for a limit below 2."""
    if value is not None and value < MIN_LENGTH:
        raise InputError(f"{name} is {value}; it must be at least {MIN_LENGTH}: one token of context, one to predict")
    return sys.maxsize if value is None else value


def character_limit(max_tokens: int | None) -> int:
    """Return the most characters of a sequence that are tokenized, given its limit in tokens."""
    if max_tokens is None:
        return UNLIMITED_CHARACTERS
    return max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * max_tokens)


def num_characters(messages: Iterable[Message], tools: Tools = ()) -> int:
    """Return the characters of messages with their tool calls, and of the definitions of tools as JSON."""
    texts = (
        text
        for message in messages
        for text in (message.content, *(part for call in message.tool_calls for part in (call.name, call.arguments)))
    )
    return sum(map(len, texts)) + sum(len(json.dumps(tool, ensure_ascii=False)) for tool in tools)


Sequences = tuple[TokenSequence, ...]


def _drop(sequences: Sequence[TokenSequence], lengths: RowLengths) -> Sequences | None:
    """Drop the row."""
    return None


def _error(sequences: Sequence[TokenSequence], lengths: RowLengths) -> Sequences | None:
    """Raise `InputError` with the length of the row."""
    exceeded = [
        f"a {part} has {tokens} tokens, but {name} is {limit}; raise {name}"
        for part, tokens, name, limit in (
            ("prompt", lengths.prompt, "max_prompt_length", lengths.max_prompt),
            ("sequence", lengths.longest, "max_length", lengths.max_length),
        )
        if tokens > limit
    ]
    raise InputError(f"{exceeded[0]}, or set overlong to drop, cut_prompt or cut_response")


def _cut_prompt(sequences: Sequence[TokenSequence], lengths: RowLengths) -> Sequences | None:
    """Remove the same tokens from the left of every prompt, after BOS. Drop the row if no prompt token would remain."""
    excess = max(lengths.prompt - lengths.max_prompt, lengths.longest - lengths.max_length)
    first = int(lengths.has_bos)
    if excess >= lengths.prompt - first:
        return None
    cut = slice(first, first + excess)
    return tuple(
        replace(one, ids=np.delete(one.ids, cut), loss_mask=np.delete(one.loss_mask, cut)) for one in sequences
    )


def _cut_response(sequences: Sequence[TokenSequence], lengths: RowLengths) -> Sequences | None:
    """Truncate every sequence to `max_length` tokens, even its end-of-turn token. Drop a row with too long a prompt."""
    if lengths.prompt > lengths.max_prompt:
        return None
    limit = lengths.max_length
    cut = tuple(
        TokenSequence(one.ids[:limit], one.loss_mask[:limit], one.is_cut or len(one.ids) > limit) for one in sequences
    )
    return cut if all(one.loss_mask.any() for one in cut) else None


OVERLONG: dict[str, Callable[[Sequence[TokenSequence], RowLengths], Sequences | None]] = {
    "drop": _drop,
    "cut_prompt": _cut_prompt,
    "cut_response": _cut_response,
    "error": _error,
}
