"""Rendered dialogues to token ids with a loss mask on the assistant's turns."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from align.data.chat_rendering import ESCAPE
from align.data.chat_templates import adds_bos
from align.data.chat_turns import Rendered, Turn
from align.data.token_groups import Ids, Mask, TokenSequence, common_prefix
from align.errors import InputError

# Keys of the counts
MERGED = "tokens merged across the prompt boundary"
NO_BOS = "sequences without the BOS that the tokenizer adds to plain text"
UNCLOSED = "no end-of-turn token in the template"


class Tokens(NamedTuple):
    """Token ids of a text, with the characters that each covers."""

    ids: Ids
    spans: list[tuple[int, int]]  # start and end


class RenderedTokenizer:
    """Tokenize rendered dialogues and mask what the assistant wrote.

    `control_tokens` are the tokens that can end a turn. `counts` receives the number of turns that have no end-of-turn
    token, of those whose first token would merge with the end of the prompt, and of sequences without the BOS that the
    tokenizer puts before plain text. Raise `InputError` for a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_tokens: Iterable[str], counts: Counter[str]) -> None:
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise InputError(f"{type(tokenizer).__name__} is a slow tokenizer; one with a tokenizer.json is needed")
        self._control_ids = {self._backend.token_to_id(token) for token in control_tokens}
        self.bos_id: Any = tokenizer.bos_token_id  # annotated by transformers as much more than an int or None
        self._eos_id: Any = tokenizer.eos_token_id
        self._adds_bos = adds_bos(tokenizer)
        self._counts = counts

    def encodings(self, texts: Iterable[str]) -> dict[str, Encoding]:
        """Return the encoding of each distinct text; all are tokenized in one call, which uses all cores."""
        distinct = list(dict.fromkeys(texts))
        self._backend.no_truncation()  # another user of this tokenizer may have turned either on
        self._backend.no_padding()
        return dict(zip(distinct, self._backend.encode_batch(distinct, add_special_tokens=False), strict=True))

    def prompt(self, dialogue: Rendered) -> Ids:
        """Return the token ids of a rendered prompt, int32 of shape [T]; a row with a response starts with them."""
        encodings = self.encodings(dialogue.texts())
        return np.concatenate([_unescaped_ids(text, encodings[text]) for text in (dialogue.head, dialogue.text)])

    def sequence(self, dialogue: Rendered, encodings: Mapping[str, Encoding]) -> TokenSequence:
        """Return the tokens of a rendered dialogue up to its last end-of-turn token."""
        encoding = encodings[dialogue.text]
        tokens = Tokens(_ids(encoding), encoding.offsets)
        mask = np.zeros(len(tokens.ids), dtype=np.bool_)
        end, closed = 0, False
        for turn in dialogue.turns:
            split = (encoding.char_to_token(turn.split) or 0) if turn.split else 0
            prompt = encodings[dialogue.prompt_end(turn)]
            shared = common_prefix(_ids(prompt), tokens.ids[split:])
            if shared < len(prompt):
                self._counts[MERGED] += 1
                if turn is dialogue.turns[-1]:  # sampling sees the earlier turns as they are tokenized here
                    tokens = self._parted(tokens, split, prompt, dialogue.text, turn)
                    mask = np.concatenate([mask[:split], np.zeros(len(tokens.ids) - split, dtype=np.bool_)])
                    shared = len(prompt)
            end, closed = self._end(turn, tokens)
            mask[split + shared : end] = True
            if not closed:
                self._counts[UNCLOSED] += 1
        ids, mask = _without_escapes(dialogue.text, tokens, mask, end)
        head = _unescaped_ids(dialogue.head, encodings[dialogue.head])
        ids, mask = np.concatenate([head, ids]), np.concatenate([np.zeros(len(head), dtype=np.bool_), mask])
        if not closed:
            ids, mask = np.append(ids, np.int32(self._eos())), np.append(mask, True)
        if self._adds_bos and ids[:1] != self.bos_id:
            self._counts[NO_BOS] += 1
        mask[:1] = False
        return TokenSequence(ids, mask, dialogue.turns[-1].is_cut)

    def _parted(self, tokens: Tokens, split: int, prompt: Encoding, text: str, turn: Turn) -> Tokens:
        """Return the tokens of a text with the turn's prompt as sampling sees it: no token crosses its end."""
        rest = self._continuation(text[turn.start :])
        return Tokens(
            np.concatenate([tokens.ids[:split], _ids(prompt), rest.ids]),
            [
                *tokens.spans[:split],
                *((start + turn.split, end + turn.split) for start, end in prompt.offsets),
                *((start + turn.start, end + turn.start) for start, end in rest.spans),
            ],
        )

    def _continuation(self, text: str) -> Tokens:
        """Return the tokens of a text that follows another one: without the space that starts a whole text."""
        marked = ESCAPE + text  # tokenizers add that space before ESCAPE
        encoding = self.encodings([marked])[marked]
        by = len(ESCAPE)
        first = next((index for index, (_, end) in enumerate(encoding.offsets) if end > by), len(encoding))
        if encoding.offsets[first:] and encoding.offsets[first][0] < by:  # a word tokenizer that adds no space
            encoding = self.encodings([text])[text]
            by = 0
            first = 0
        return Tokens(_ids(encoding)[first:], [(start - by, end - by) for start, end in encoding.offsets[first:]])

    def _eos(self) -> int:
        if self._eos_id is None:
            raise InputError("the chat template writes no end-of-turn token, and the tokenizer has no eos_token")
        return self._eos_id

    def _end(self, turn: Turn, tokens: Tokens) -> tuple[int, bool]:
        """Return the index after the last token of a turn, and whether that token ends the turn or the text is cut."""
        after = bisect_left(tokens.spans, (turn.end, -1))  # the first token that starts after the message's text
        for index in range(after, len(tokens.ids)):
            if tokens.spans[index][0] > turn.next_message:
                break
            if tokens.ids[index] in self._control_ids:
                return index + 1, True
        return after, turn.is_cut


def _ids(encoding: Encoding) -> Ids:
    return np.array(encoding.ids, dtype=np.int32)


def _unescaped_ids(text: str, encoding: Encoding) -> Ids:
    tokens = Tokens(_ids(encoding), encoding.offsets)
    return _without_escapes(text, tokens, np.zeros(len(encoding), dtype=np.bool_), len(encoding))[0]


def _without_escapes(text: str, tokens: Tokens, mask: Mask, end: int) -> tuple[Ids, Mask]:
    """Return the ids before `end` and their mask, without the tokens that encode nothing but ESCAPE."""
    ids, mask = tokens.ids[:end], mask[:end]
    if ESCAPE not in text:
        return ids, mask
    kept = np.array([text[start:stop] != ESCAPE for start, stop in tokens.spans[:end]], dtype=np.bool_)
    return ids[kept], mask[kept]
