"""Messages to tokens, with a mask on what the assistant said. T tokens in a sequence, K responses to a prompt."""

from __future__ import annotations

import hashlib
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from align.data.templates import BREAK, Rendered, Renderer, Turn, adds_bos
from align.data.token_groups import Ids, Mask, TokenGroup, TokenSequence, common_prefix
from align.errors import InputError
from align.records import Comparison, Demonstration, Located, Message, at_place
from align.registry import pick

# NeMo-Aligner's default_chosen_reward and default_rejected_reward, for responses with a label and no rewards
CHOSEN_REWARD, REJECTED_REWARD = 1.0, 0.0
BY_LABEL = f"rewards {CHOSEN_REWARD:g} and {REJECTED_REWARD:g} by the label"  # key of `counts`

Trainable = Demonstration | Comparison
RECORDS_AT_ONCE = 256  # tokenized in one call, which spreads them over the cores


@dataclass(frozen=True, slots=True)
class _Size:
    """How long a row is, in tokens, and how long it may be."""

    prompt: int  # tokens before the first trained one of any response; all responses share them
    longest: int
    max_prompt: int
    max_length: int
    has_bos: bool


class ChatEncoder:
    """Records to token groups by the tokenizer's chat template; `counts` says what was read, dropped and cut.

    A response's tokens are what follows the longest common prefix of the rendered prompt and the rendered whole, to the
    end-of-turn token: the first control token after the response's own text, or an EOS where the template puts none.
    Special tokens that someone typed into a message become ordinary text. `overlong` names an entry of OVERLONG.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        overlong: str = "drop",
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._overlong = overlong
        self._shorten = pick(OVERLONG, overlong, "way with overlong rows")
        self._max_length = _limit("max_length", max_length)
        self._max_prompt = _limit("max_prompt_length", max_prompt_length)
        self._renderer = Renderer(tokenizer)
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise InputError(f"{type(tokenizer).__name__} is a slow tokenizer; one with a tokenizer.json is needed")
        self._control = {self._backend.token_to_id(token) for token in self._renderer.control}
        self._bos_id: Any = tokenizer.bos_token_id  # annotated by transformers as much more than an int or None
        self._eos_id: Any = tokenizer.eos_token_id
        self._adds_bos = adds_bos(tokenizer)

    def encode(self, record: Demonstration | Comparison, row: int) -> TokenGroup | None:
        """The record's token group, or None if it is dropped; `counts` says why."""
        return self._encode([Located(record, f"row {row + 1}", row)])[0]

    def encode_all(self, records: Iterable[Demonstration | Comparison]) -> Iterator[TokenGroup]:
        """Yield the token groups of the records that are kept, in order; faster than `encode` on each."""
        located = (Located(record, f"row {row + 1}", row) for row, record in enumerate(records))
        return (each.record for each in self.encode_located(located))

    def encode_located(self, records: Iterable[Located[Trainable]]) -> Iterator[Located[TokenGroup]]:
        """Yield the token groups of the records that are kept, each with its place; errors name the place."""
        located = iter(records)
        while batch := list(islice(located, RECORDS_AT_ONCE)):
            for each, group in zip(batch, self._encode(batch), strict=True):
                if group is not None:
                    yield Located(group, each.place, each.row, each.metadata)

    def prompt_ids(self, messages: Sequence[Message], row: int) -> Ids:
        """The tokens that a response to the messages follows; they are counted, dropped and cut nowhere."""
        with at_place(f"row {row + 1}"):
            text = self._renderer.prompt(messages)
        self._backend.no_truncation()
        self._backend.no_padding()
        tokens = self._backend.encode(text, add_special_tokens=False)
        ids = _ids(tokens)
        return _without_breaks(text, tokens, ids, np.zeros(len(ids), np.bool_))[0]

    def _encode(self, batch: Sequence[Located[Trainable]]) -> list[TokenGroup | None]:
        rendered = [self._render(located) for located in batch]
        texts = list(dict.fromkeys(text for whole in rendered for one in whole for text in one.texts()))
        self._backend.no_truncation()  # another user of this tokenizer may have left either on
        self._backend.no_padding()
        tokens = dict(zip(texts, self._backend.encode_batch(texts, add_special_tokens=False), strict=True))
        groups: list[TokenGroup | None] = []
        for located, whole in zip(batch, rendered, strict=True):
            with at_place(located.place):
                groups.append(self._group(located.record, located.row, whole, tokens))
        return groups

    def _render(self, located: Located[Trainable]) -> list[Rendered]:
        record = located.record
        with at_place(located.place):
            if isinstance(record, Demonstration):
                return [self._renderer.demonstration(record.messages)]
            return self._renderer.comparison(record.prompt, [response.content for response in record.responses])

    def _group(
        self, record: Trainable, row: int, rendered: list[Rendered], tokens: Mapping[str, Encoding]
    ) -> TokenGroup | None:
        self.counts["rows"] += 1
        if any(BREAK in one.head or BREAK in one.text for one in rendered):
            self.counts["special tokens in content"] += 1
        whole = [self._sequence(one, tokens) for one in rendered]
        sequences, asked = self._fit(whole), _prompt_hash(whole[0])
        if sequences is None:
            return None
        if isinstance(record, Demonstration):
            return TokenGroup(sequences, None, None, ({},), row, asked)
        attributes = tuple(dict(response.attributes) for response in record.responses)
        rewards = _rewards(record)
        if rewards is not None and record.responses[0].reward is None:
            self.counts[BY_LABEL] += 1
        return TokenGroup(sequences, rewards, record.chosen, attributes, row, asked)

    def _sequence(self, rendered: Rendered, encodings: Mapping[str, Encoding]) -> TokenSequence:
        """The rendered dialogue in tokens, cut after its last end of turn."""
        whole = encodings[rendered.text]
        ids = _ids(whole)
        trained = np.zeros(len(ids), dtype=np.bool_)
        end, closed = 0, False
        for turn in rendered.turns:
            seam = (whole.char_to_token(turn.seam) or 0) if turn.seam else 0
            asked = _ids(encodings[rendered.asked(turn)])
            shared = common_prefix(asked, ids[seam:])
            end, closed = self._end(turn, whole)
            trained[seam + shared : end] = True
            if shared < len(asked):  # trained on another context than generation meets
                self.counts["end of the prompt tokenized anew"] += 1
            if not closed:
                self.counts["no end of turn in the template"] += 1
        ids, trained = _without_breaks(rendered.text, whole, ids[:end], trained[:end])
        head = encodings[rendered.head]
        head_ids, untrained = _without_breaks(rendered.head, head, _ids(head), np.zeros(len(head), dtype=np.bool_))
        ids, trained = np.concatenate([head_ids, ids]), np.concatenate([untrained, trained])
        if not closed:
            ids, trained = np.append(ids, np.int32(self._eos())), np.append(trained, True)
        if self._adds_bos and ids[:1] != self._bos_id:
            ids, trained = np.insert(ids, 0, self._bos_id), np.insert(trained, 0, False)
        trained[:1] = False
        return TokenSequence(ids, trained)

    def _eos(self) -> int:
        if self._eos_id is None:
            raise InputError("the chat template ends no turn, and the tokenizer has no eos_token to do it")
        return self._eos_id

    def _end(self, turn: Turn, tokens: Encoding) -> tuple[int, bool]:
        """Index after the last token of a turn, and whether that token is an end of turn."""
        places, ids = tokens.offsets, tokens.ids
        after = bisect_left(places, (turn.end, -1))  # the first token that begins behind what was said
        for index in range(after, len(ids)):
            if places[index][0] > turn.bound:
                break
            if ids[index] in self._control:
                return index + 1, True
        return after, False

    def _fit(self, sequences: Sequence[TokenSequence]) -> tuple[TokenSequence, ...] | None:
        """The sequences within the limits, or None if the row is dropped."""
        if not all(sequence.loss_mask.any() for sequence in sequences):
            self.counts["dropped:nothing trained"] += 1
            return None
        size = _Size(
            prompt=min(int(sequence.loss_mask.argmax()) for sequence in sequences),
            longest=max(len(sequence.ids) for sequence in sequences),
            max_prompt=self._max_prompt,
            max_length=self._max_length,
            has_bos=self._bos_id is not None and sequences[0].ids[0] == self._bos_id,
        )
        if size.prompt <= size.max_prompt and size.longest <= size.max_length:
            return tuple(sequences)
        shorter = self._shorten(sequences, size)
        if shorter is None:
            self.counts["dropped:overlong"] += 1
            return None
        self.counts[self._overlong.replace("cut_", "cut:")] += 1
        self.counts["cut tokens"] += sum(len(one.ids) for one in sequences) - sum(len(one.ids) for one in shorter)
        return shorter


def _prompt_hash(sequence: TokenSequence) -> int:
    prompt = sequence.ids[: int(sequence.loss_mask.argmax())]
    return int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:4], "big")


def _limit(name: str, value: int | None) -> int:
    if value is not None and value < 2:
        raise InputError(f"{name} is {value}; at least 2 tokens are needed, one to be given and one to be predicted")
    return sys.maxsize if value is None else value


def _ids(tokens: Encoding) -> Ids:
    return np.array(tokens.ids, dtype=np.int32)


def _without_breaks(text: str, tokens: Encoding, ids: Ids, trained: Mask) -> tuple[Ids, Mask]:
    """The tokens without those that only stand for BREAK."""
    if BREAK not in text:
        return ids, trained
    kept = np.array([text[start:end] != BREAK for start, end in tokens.offsets[: len(ids)]], dtype=np.bool_)
    return ids[kept], trained[kept]


def _rewards(comparison: Comparison) -> tuple[float, ...] | None:
    rewards = tuple(response.reward for response in comparison.responses if response.reward is not None)
    if rewards:
        return rewards
    if comparison.chosen is None:
        return None
    return tuple(CHOSEN_REWARD if k == comparison.chosen else REJECTED_REWARD for k in range(len(comparison.responses)))


def _drop(sequences: Sequence[TokenSequence], size: _Size) -> None:
    """Nothing: the row is not used."""


def _refuse(sequences: Sequence[TokenSequence], size: _Size) -> None:
    """An error that says how long the row is."""
    over = [
        f"{what} of {tokens} tokens, and {name} is {limit}"
        for what, tokens, name, limit in (
            ("a prompt", size.prompt, "max_prompt_length", size.max_prompt),
            ("a sequence", size.longest, "max_length", size.max_length),
        )
        if tokens > limit
    ]
    raise InputError(f"{over[0]}; raise it, or set overlong to drop, cut_prompt or cut_response")


def _cut_prompt(sequences: Sequence[TokenSequence], size: _Size) -> tuple[TokenSequence, ...] | None:
    """The same tokens taken from the left of every prompt, after its BOS; None if no prompt token would be left."""
    excess = max(size.prompt - size.max_prompt, size.longest - size.max_length)
    first = int(size.has_bos)
    if excess >= size.prompt - first:
        return None
    gone = slice(first, first + excess)
    return tuple(TokenSequence(np.delete(one.ids, gone), np.delete(one.loss_mask, gone)) for one in sequences)


def _cut_response(sequences: Sequence[TokenSequence], size: _Size) -> tuple[TokenSequence, ...] | None:
    """Every sequence to max_length tokens: what is cut loses its end of turn; None if a prompt is too long."""
    if size.prompt > size.max_prompt:
        return None
    cut = tuple(TokenSequence(one.ids[: size.max_length], one.loss_mask[: size.max_length]) for one in sequences)
    return cut if all(one.loss_mask.any() for one in cut) else None


OVERLONG = {"drop": _drop, "cut_prompt": _cut_prompt, "cut_response": _cut_response, "error": _refuse}
