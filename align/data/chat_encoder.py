"""Encode records as token ids with a loss mask on the assistant's messages.

Shape legend: T tokens of a sequence, K responses to a prompt.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from align.data.chat_rendering import ESCAPE
from align.data.chat_turns import Rendered, Renderer
from align.data.overlong import OVERLONG, RowLengths, character_limit, length_limit, num_characters
from align.data.rejections import Rejections
from align.data.rendered_tokens import RenderedTokenizer
from align.data.token_groups import Ids, TokenGroup, TokenSequence
from align.errors import InputError
from align.records import Comparison, Demonstration, Located, Message, Prompt, Tools, at_place, message_key
from align.registry import pick

# NeMo-Aligner's default_chosen_reward and default_rejected_reward, for responses with a label and no rewards
CHOSEN_REWARD, REJECTED_REWARD = 1.0, 0.0
# Records tokenized in one call, which uses all cores, and their characters, which take memory
BATCH_SIZE, BATCH_CHARACTERS = 256, 1_000_000

# Keys of `ChatEncoder.counts`
ROWS = "rows"
ESCAPED = "special tokens in content"
FROM_LABEL = f"rewards {CHOSEN_REWARD:g} and {REJECTED_REWARD:g} from the label"
NO_LOSS_TOKENS = "dropped:no response tokens"
DROPPED = "dropped:overlong"
CUT_TOKENS = "cut tokens"

Trainable = Demonstration | Comparison


class ChatEncoder:
    """Encode records as token groups with the tokenizer's chat template.

    The tokens of a response follow the longest common prefix of the rendered prompt and the rendered dialogue, up to
    and including the end-of-turn token: the first control token after the response's text, or EOS if the template
    writes none. A response that was cut off has no end-of-turn token, unless `closes_cut`, for models that read a
    reward at it. Special tokens inside a message are encoded as ordinary text. A row starts with the `prompt_ids` of
    its prompt, so that training and sampling see the same context.

    `max_length` limits the tokens of a sequence, `max_prompt_length` those before the response. `overlong` is `drop`,
    `cut_prompt` (from the left), `cut_response` (from the right) or `error`. `counts` holds the number of rows read,
    dropped (`dropped:REASON`) and cut (`cut:prompt`, `cut:response`). Raise `InputError` for a slow tokenizer, a
    missing chat template, or a template that does not fit a row; with `on_error="skip"` such a row is dropped.

    >>> from align.data.chat_templates import apply_template
    >>> from align.data.tokenizer import train_tokenizer
    >>> from align.records import Response
    >>> tokenizer = train_tokenizer(["How far is the moon?"], vocab_size=300, chat_template="")
    >>> _ = apply_template(tokenizer, "chatml")
    >>> prompt = (Message("user", "How far is the moon?"),)
    >>> group = ChatEncoder(tokenizer).encode(Comparison(prompt, (Response("Far."), Response("Hm")), chosen=0), row=0)
    >>> [tokenizer.decode(sequence.ids[sequence.loss_mask]) for sequence in group.sequences]
    ['Far.<|im_end|>', 'Hm<|im_end|>']
    >>> group.rewards
    (1.0, 0.0)
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        overlong: str = "drop",
        on_error: str = "error",
        closes_cut: bool = False,
    ) -> None:
        self._rejections = Rejections(on_error)
        self.counts: Counter[str] = self._rejections.counts
        self._overlong = overlong
        self._shorten = pick(OVERLONG, overlong, "value of overlong")
        self._max_length = length_limit("max_length", max_length)
        self._max_characters = character_limit(max_length)
        self._max_prompt = length_limit("max_prompt_length", max_prompt_length)
        self._renderer = Renderer(tokenizer, closes_cut=closes_cut)
        self._tokenizer = RenderedTokenizer(tokenizer, self._renderer.control_tokens, self.counts)

    def encode(self, record: Trainable, row: int) -> TokenGroup | None:
        """Return the record's token group, or None if the row is dropped; `counts` holds the reason.

        `row` is the index of the record, from 0. Errors name the row, from 1.
        """
        return self._encode([Located(record, f"row {row + 1}", row)])[0]

    def encode_all(self, records: Iterable[Trainable]) -> Iterator[TokenGroup]:
        """Yield the token groups of the records that are kept, in order. Faster than `encode` on each record."""
        located = (Located(record, f"row {row + 1}", row) for row, record in enumerate(records))
        return (each.record for each in self.encode_located(located))

    def encode_located(self, records: Iterable[Located[Trainable]]) -> Iterator[Located[TokenGroup]]:
        """Yield the token groups of the records that are kept, each with its place. Errors name the place."""
        for batch in _batches(records):
            for located, group in zip(batch, self._encode(batch), strict=True):
                if group is not None:
                    yield Located(group, located.place, located.row, located.metadata)

    def prompt_ids(self, messages: Sequence[Message], row: int, tools: Tools = ()) -> Ids:
        """Return the token ids of a prompt with the header of the response, int32 of shape [T].

        Length limits do not apply, and `counts` does not change.
        """
        with at_place(f"row {row + 1}"):
            return self._tokenizer.prompt(self._renderer.prompt(messages, tools))

    def open_user_turn(self, before: Sequence[Message]) -> Ids:
        """Return the token ids of a dialogue up to where the user's next message begins, int32 of shape [T]."""
        return self._tokenizer.prompt(self._renderer.open_user_turn(before))

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise `InputError` if the chat template cannot render a prompt."""
        self._renderer.prompt(prompt.messages, prompt.tools)

    def _encode(self, batch: Sequence[Located[Trainable]]) -> list[TokenGroup | None]:
        self.counts[ROWS] += len(batch)
        records = [located.record for located in batch]
        short = [record for record in records if _characters(record, max) <= self._max_characters]
        with self._renderer.rendered_together(short):
            rendered = [self._render(located) for located in batch]
        encodings = self._tokenizer.encodings(text for row in rendered for each in row for text in each.texts())
        return [
            self._group(located, dialogues, encodings) if dialogues else None
            for located, dialogues in zip(batch, rendered, strict=True)
        ]

    def _render(self, located: Located[Trainable]) -> list[Rendered]:
        """Return the sequences of a row as text, or none if the row is dropped."""
        record = located.record
        with at_place(located.place):
            if self._has_too_many_characters(record):
                self.counts[DROPPED] += 1
                return []
        with self._rejections.at(located.place):
            if isinstance(record, Demonstration):
                return [self._renderer.demonstration(record)]
            return self._renderer.comparison(record)
        return []

    def _has_too_many_characters(self, record: Trainable) -> bool:
        """Return whether a row is overlong before it is tokenized, which would take a lot of memory."""
        longest = _characters(record, max)
        if longest > self._max_characters and self._overlong == "error":
            raise InputError(
                f"a sequence has {longest:,} characters, and at most {self._max_characters:,} are tokenized; raise "
                "max_length, or set overlong to drop"
            )
        return longest > self._max_characters

    def _group(
        self, located: Located[Trainable], dialogues: list[Rendered], encodings: Mapping[str, Encoding]
    ) -> TokenGroup | None:
        record, row = located.record, located.row
        if any(ESCAPE in dialogue.head or ESCAPE in dialogue.text for dialogue in dialogues):
            self.counts[ESCAPED] += 1
        with at_place(located.place):
            uncut = [self._tokenizer.sequence(dialogue, encodings) for dialogue in dialogues]
            sequences = self._within_limits(uncut)
        prompt_hash = _message_hash(record) if self._renderer.has_clock else _prompt_hash(uncut[0])
        if sequences is None:
            return None
        if isinstance(record, Demonstration):
            return TokenGroup(sequences, None, None, ({},), row, prompt_hash)
        attributes = tuple(dict(response.attributes) for response in record.responses)
        rewards = _rewards(record)
        if rewards is not None and record.responses[0].reward is None:
            self.counts[FROM_LABEL] += 1
        return TokenGroup(sequences, rewards, record.chosen, attributes, row, prompt_hash)

    def _within_limits(self, sequences: Sequence[TokenSequence]) -> tuple[TokenSequence, ...] | None:
        """Return the sequences, cut where a limit asks for it, or None if the row is dropped."""
        if not all(sequence.loss_mask.any() for sequence in sequences):
            self.counts[NO_LOSS_TOKENS] += 1
            return None
        lengths = RowLengths(
            prompt=min(int(sequence.loss_mask.argmax()) for sequence in sequences),
            longest=max(len(sequence.ids) for sequence in sequences),
            max_prompt=self._max_prompt,
            max_length=self._max_length,
            has_bos=self._tokenizer.bos_id is not None and sequences[0].ids[0] == self._tokenizer.bos_id,
        )
        if lengths.fit:
            return tuple(sequences)
        cut = self._shorten(sequences, lengths)
        if cut is None:
            self.counts[DROPPED] += 1
            return None
        self.counts[self._overlong.replace("cut_", "cut:")] += 1
        self.counts[CUT_TOKENS] += sum(len(one.ids) for one in sequences) - sum(len(one.ids) for one in cut)
        return cut


def _batches(records: Iterable[Located[Trainable]]) -> Iterator[list[Located[Trainable]]]:
    """Yield the records in batches that are tokenized at once."""
    batch = list[Located[Trainable]]()
    num_characters = 0
    for located in records:
        batch.append(located)
        num_characters += _characters(located.record, sum)
        if len(batch) == BATCH_SIZE or num_characters > BATCH_CHARACTERS:
            yield batch
            batch = []
            num_characters = 0
    if batch:
        yield batch


def _characters(record: Trainable, combine: Callable[[Iterable[int]], int]) -> int:
    """Return the characters of a record's messages and tools, with those of its responses combined."""
    if isinstance(record, Demonstration):
        return num_characters(record.messages, record.tools)
    prompt = num_characters(record.prompt, record.tools)
    return combine(prompt + num_characters([response.message]) for response in record.responses)


def _prompt_hash(sequence: TokenSequence) -> int:
    prompt = sequence.ids[: int(sequence.loss_mask.argmax())]
    return int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:4], "big")


def _message_hash(record: Trainable) -> int:
    """Return the hash of a prompt whose tokens differ from day to day."""
    if isinstance(record, Comparison):
        messages = record.prompt
    else:
        messages = tuple(takewhile(lambda message: message.role != "assistant", record.messages))
    prompt = list(map(_as_tuple, message_key(messages, record.tools)))
    return int.from_bytes(hashlib.sha256(repr(prompt).encode()).digest()[:4], "big")


def _as_tuple(key: Any) -> Any:  # noqa: ANN401 - an item of a message's key
    return tuple(key) if isinstance(key, list) else key


def _rewards(comparison: Comparison) -> tuple[float, ...] | None:
    """Return the rewards of the responses, those of the label if they have none, or None without a label."""
    rewards = tuple(response.reward for response in comparison.responses if response.reward is not None)
    if rewards:
        return rewards
    if comparison.chosen is None:
        return None
    return tuple(CHOSEN_REWARD if k == comparison.chosen else REJECTED_REWARD for k in range(len(comparison.responses)))
