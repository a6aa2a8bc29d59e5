"""Rendered dialogues to token ids with a loss mask on the assistant's turns."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

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
UNCLOSED = "no end-of-turn token in the template"


class RenderedTokenizer:
    """Tokenize rendered dialogues and mask what the assistant wrote.

    `control_tokens` are the tokens that can end a turn. `counts` receives the number of turns that have no end-of-turn
    token, and of those whose first token merges with the end of the prompt. Raise `InputError` for a slow tokenizer.
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

    def ids(self, text: str) -> Ids:
        """Return the token ids of a rendered prompt, int32 of shape [T]."""
        encoding = self.encodings([text])[text]
        return _without_escapes(text, encoding, _ids(encoding), _no_loss(encoding))[0]

    def sequence(self, dialogue: Rendered, encodings: Mapping[str, Encoding]) -> TokenSequence:
        """Return the tokens of a rendered dialogue up to its last end-of-turn token."""
        encoding = encodings[dialogue.text]
        ids, mask = _ids(encoding), _no_loss(encoding)
        end, closed = 0, False
        for turn in dialogue.turns:
            split = (encoding.char_to_token(turn.split) or 0) if turn.split else 0
            prompt_ids = _ids(encodings[dialogue.prompt_end(turn)])
            shared = common_prefix(prompt_ids, ids[split:])
            end, closed = self._end(turn, encoding)
            mask[split + shared : end] = True
            if shared < len(prompt_ids):  # generation sees another context than training
                self._counts[MERGED] += 1
            if not closed:
                self._counts[UNCLOSED] += 1
        ids, mask = _without_escapes(dialogue.text, encoding, ids[:end], mask[:end])
        head = encodings[dialogue.head]
        head_ids, head_mask = _without_escapes(dialogue.head, head, _ids(head), _no_loss(head))
        ids, mask = np.concatenate([head_ids, ids]), np.concatenate([head_mask, mask])
        if not closed:
            ids, mask = np.append(ids, np.int32(self._eos())), np.append(mask, True)
        if self._adds_bos and ids[:1] != self.bos_id:
            ids, mask = np.insert(ids, 0, self.bos_id), np.insert(mask, 0, False)
        mask[:1] = False
        return TokenSequence(ids, mask)

    def _eos(self) -> int:
        if self._eos_id is None:
            raise InputError("the chat template writes no end-of-turn token, and the tokenizer has no eos_token")
        return self._eos_id

    def _end(self, turn: Turn, encoding: Encoding) -> tuple[int, bool]:
        """Return the index after the last token of a turn, and whether that token ends the turn."""
        offsets, ids = encoding.offsets, encoding.ids
        after = bisect_left(offsets, (turn.end, -1))  # the first token that starts after the message's text
        for index in range(after, len(ids)):
            if offsets[index][0] > turn.next_message:
                break
            if ids[index] in self._control_ids:
                return index + 1, True
        return after, False


def _ids(encoding: Encoding) -> Ids:
    return np.array(encoding.ids, dtype=np.int32)


def _no_loss(encoding: Encoding) -> Mask:
    return np.zeros(len(encoding), dtype=np.bool_)


def _without_escapes(text: str, encoding: Encoding, ids: Ids, mask: Mask) -> tuple[Ids, Mask]:
    """Remove the tokens that encode nothing but ESCAPE."""
    if ESCAPE not in text:
        return ids, mask
    kept = np.array([text[start:end] != ESCAPE for start, end in encoding.offsets[: len(ids)]], dtype=np.bool_)
    return ids[kept], mask[kept]
