"""What decides which rows are equal, similar, and preferred."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from align.curate.ngrams import NUMBERS, normalized
from align.data.readers.pairs import LIKED
from align.records import Comparison, Demonstration, Message, Record, Response, message_key
from align.rewards.published_rows import ANSWER_KEYS, TEST_KEYS
from align.rewards.verifiers.same_task import task_features

# Metadata of the right answer: rows that differ in it are not duplicates
DECISIVE_METADATA = (*ANSWER_KEYS, *TEST_KEYS, "instructions", "instruction_id_list", "kwargs", LIKED)
DIGEST_BYTES = 16
GUARD_BYTES = 8


def digest(value: object, size: int = DIGEST_BYTES) -> bytes:
    """Return a hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return blake2b(text.encode(), digest_size=size).digest()


@dataclass(frozen=True, slots=True)
class RowKeys:
    """The keys of a row. Rows of different kinds of records have no key in common."""

    id: bytes  # of the whole row and its source
    exact: bytes  # equal for duplicates
    prompt: bytes | None  # equal for comparisons that can be one group; None if nothing compares the responses
    fields: tuple[str, ...]  # normalized: the prompt, and the responses
    num_compared: int  # fields that are compared with other rows: the prompt, or the whole dialogue of a demonstration
    guard: int  # 64 bits, equal where rows may be near-duplicates: kind, system messages, tools and known answers
    task: int  # 64 bits, equal where the prompts ask for one task; 0 where that was not asked
    reward: float  # of the best response; -inf without rewards
    length: int  # characters of prompt and responses

    @property
    def text(self) -> bytes:
        """The key of the compared text; rows of one key are compared once."""
        return digest([self.fields[: self.num_compared], self.guard, self.task])

    @property
    def rank(self) -> tuple[float, int, bytes]:
        """The place in the order of preference: higher reward, then longer, then by content."""
        return -self.reward, -self.length, self.id


def prompt_messages(record: Record) -> tuple[Message, ...]:
    """Return the messages before the responses; of a demonstration, those before the last assistant message."""
    if isinstance(record, Comparison):
        return record.prompt
    if isinstance(record, Demonstration):
        last = max(at for at, message in enumerate(record.messages) if message.role == "assistant")
        return record.messages[:last]
    return record.messages


def response_texts(record: Record) -> list[str]:
    """Return the responses of a record; of a demonstration, the last assistant message."""
    if isinstance(record, Comparison):
        return [response.message.text for response in record.responses]
    if isinstance(record, Demonstration):
        return [[message.text for message in record.messages if message.role == "assistant"][-1]]
    return []


def joined(messages: Iterable[Message]) -> str:
    """Return the texts of the messages, without those of the system, which many rows share."""
    return "\n".join(message.text for message in messages if message.role != "system")


def compared_text(record: Record) -> str:
    """Return the text that is compared with other rows: the prompt, or a demonstration's whole dialogue."""
    return joined(record.messages if isinstance(record, Demonstration) else prompt_messages(record))


def row_keys(record: Record, source: str, row: str, *, with_task: bool) -> RowKeys:
    """Return the keys of a record. `row` is its native form as JSON."""
    kind = type(record).__name__
    messages = record.messages if isinstance(record, Demonstration) else prompt_messages(record)
    known = {name: record.metadata[name] for name in DECISIVE_METADATA if record.metadata.get(name) is not None}
    chat = [kind, _normalized_chat(messages), list(record.tools), known]
    responses = record.responses if isinstance(record, Comparison) else ()
    rewards = [one.reward for one in responses if one.reward is not None]
    prompt = joined(prompt_messages(record))
    fields = tuple(normalized(text) for text in (prompt, *response_texts(record)))
    num_compared = len(fields) if isinstance(record, Demonstration) else 1
    label = _label(record)
    answers = sorted({response_key(one).hex() for one in responses})
    system = _normalized_chat(message for message in messages if message.role == "system")
    guard = _bits([kind, system, list(record.tools), known])
    task = 0
    if with_task:
        numbers = sorted(number for field in fields[:num_compared] for number in NUMBERS.findall(field))
        task = _bits([numbers, task_features(prompt)])
    is_compared = len(responses) > 1 or (bool(rewards or label) and LIKED not in record.metadata)
    scale = source if rewards else None  # rewards of two sources need not have one scale
    return RowKeys(
        id=blake2b(f"{source}\n{row}".encode(), digest_size=DIGEST_BYTES).digest(),
        exact=digest([*chat, answers, label]),
        prompt=digest([*chat, label, scale]) if is_compared else None,
        fields=fields,
        num_compared=num_compared,
        guard=guard,
        task=task,
        reward=max(rewards, default=-math.inf),
        length=sum(map(len, fields)),  # of a demonstration's dialogue, or of a prompt and its responses
    )


def response_key(response: Response) -> bytes:
    """Return the key of a response, equal for responses that are equal but for case, white space and Unicode form."""
    return digest([normalized(response.content), [_without_ids(call.to_json()) for call in response.tool_calls]])


def _bits(value: object) -> int:
    """Return a hash of a JSON value, 64 bits."""
    return int.from_bytes(digest(value, GUARD_BYTES), "little")


def _label(record: Record) -> str | None:
    """Return the key of the response that a comparison labels as preferred."""
    if not isinstance(record, Comparison) or record.chosen is None:
        return None
    return response_key(record.responses[record.chosen]).hex()


def _normalized_chat(messages: Iterable[Message]) -> list[Any]:
    """Return what identifies messages, with their contents normalized."""
    return [[role, normalized(content), *map(_without_ids, more)] for role, content, *more in message_key(messages)]


def _without_ids(value: Any) -> Any:  # noqa: ANN401 - fields of a message, or a call
    """Return a call, or the fields of a message, without the ids of calls, which are random."""
    kept = {name: each for name, each in value.items() if name not in ("id", "tool_call_id")}
    calls = kept.get("tool_calls")
    return kept if calls is None else {**kept, "tool_calls": [_without_ids(call) for call in calls]}
