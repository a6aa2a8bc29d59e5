"""The interface of an engine, and its samples: their seeds, their throughput and their journal."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol, Self

from align.accounting.flops import Work
from align.config import stable_hash
from align.data.readers.tool_calls import as_calls
from align.distributed.journal import Journal
from align.inference.settings import SamplingSettings
from align.records import Prompt, ToolCall, message_key, with_calls

SEED_BITS = 31  # servers take a seed as a signed 32-bit integer
TOO_LONG = "prompt too long"  # finish reason of a prompt that was not answered
REFUSED = "refused"  # begins the finish reason of a prompt that a server refused; what it said follows
GIVEN = "given"  # finish reason, and policy, of a response that was not sampled here


@dataclass(frozen=True, slots=True)
class Sample:
    """One response of a policy. Its text may be empty and contains no special tokens and no stop string."""

    key: str  # `prompt_key` of its prompt
    number: int  # index among the K responses to the prompt
    policy: str
    text: str
    num_tokens: int | None  # sampled tokens, including the end of turn; None if a server does not report it
    finish: str  # "stop" (end of turn or stop string), "length" (max_new_tokens), TOO_LONG, or a server's own reason
    seed: int
    tool_calls: tuple[ToolCall, ...] = ()  # that a server returned besides the text

    @property
    def whole_text(self) -> str:
        """The text followed by the tool calls, for readers without a chat template."""
        return with_calls(self.text, self.tool_calls)

    def to_json(self) -> dict[str, Any]:
        """Return the sample as a journal holds it."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "tool_calls"}
        return {**values, **({"tool_calls": [call.to_json() for call in self.tool_calls]} if self.tool_calls else {})}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the sample of a journal."""
        values = dict(value)
        calls = as_calls(values.pop("tool_calls", []))
        return cls(**values, tool_calls=calls)


@dataclass(slots=True)
class Throughput:
    """Speed of an engine, and the tokens that it processed.

    `new_tokens`, `seconds`, `requests` and `cost` cover this process only. The other numbers include samples that a
    journal already held, so that a resumed run reports the same totals.
    """

    new_tokens: int = 0  # sampled by this process
    seconds: float = 0.0  # during which a caller waited for samples
    processed_tokens: int = 0  # prompts, each counted once, and samples
    sampled_tokens: int = 0
    attended_pairs: int = 0  # (query, key) pairs in one layer
    requests: int = 0  # that a server has answered
    cost: float = 0.0  # of these requests, where a price is given

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens per second; 0 before the first.

        >>> Throughput(new_tokens=30, seconds=2.0).tokens_per_s
        15.0
        """
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def work(self) -> Work:
        """The forward passes of an engine in this process."""
        return Work(self.processed_tokens, self.attended_pairs, self.sampled_tokens)

    def merge(self, other: Throughput) -> Throughput:
        """Return the throughput of two engines that ran at the same time."""
        return Throughput(
            self.new_tokens + other.new_tokens,
            max(self.seconds, other.seconds),
            self.processed_tokens + other.processed_tokens,
            self.sampled_tokens + other.sampled_tokens,
            self.attended_pairs + other.attended_pairs,
            self.requests + other.requests,
            self.cost + other.cost,
        )

    def metrics(self) -> dict[str, float]:
        """Return what progress shows: requests and tokens per second, and the cost, as far as they are known."""
        found = {"requests_per_s": self.requests / self.seconds} if self.requests and self.seconds else {}
        found |= {"tokens_per_s": self.tokens_per_s} if self.seconds else {}
        return found | ({"cost": self.cost} if self.cost else {})

    @contextmanager
    def timed(self) -> Generator[None]:
        """Add the time spent in this block to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


# (prompt key, number) of finished samples -> their number of tokens, if known
Finished = Mapping[tuple[str, int], int | None]
NOTHING_FINISHED: Finished = MappingProxyType({})


class Engine(Protocol):
    """Samples responses of one policy: a model in this process, or a server."""

    name: str  # of the policy
    throughput: Throughput

    def sample(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, *, finished: Finished = NOTHING_FINISHED
    ) -> Iterator[Sample]:
        """Yield K samples of each distinct prompt in order of completion, except those in `finished`.

        Raises `RunError` if the policy fails while sampling.
        """
        ...


def prompt_key(prompt: Prompt) -> str:
    """Return 16 hex digits that identify the prompt's messages and tools; its metadata does not count.

    >>> from align.records import Message
    >>> prompt_key(Prompt((Message("user", "Hello."),)))
    '69dc22fd28d80aeb'
    """
    return stable_hash(message_key(prompt.messages, prompt.tools))


def unique_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the first of the prompts with equal messages, in order."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt_key(prompt), prompt)
    return list(found.values())


def sample_seed(settings: SamplingSettings, policy: str, key: str, number: int) -> int:
    """Return the seed of one sample, below 2 ** 31; it depends on the arguments only.

    The policy's name is included so that nearly equal policies do not give equal responses.
    """
    digest = hashlib.sha256(repr((settings.seed, policy, key, number)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> (64 - SEED_BITS)


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first stop string, and whether there is one.

    >>> cut_at_stop("one. two. three", [". t", "two"])
    ('one', True)
    >>> cut_at_stop("one", ["two"])
    ('one', False)
    """
    places = [place for place in (text.find(each) for each in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def journal_samples(journal: Journal, policy: str, prompts: Sequence[Prompt]) -> list[Sample]:
    """Return the policy's samples of the prompts that the journal holds."""
    keys = {prompt_key(prompt) for prompt in prompts}
    samples = [Sample.from_json(value) for value in journal.done.values()]
    return [sample for sample in samples if sample.policy == policy and sample.key in keys]


def sample_with_journal(
    engine: Engine, prompts: Sequence[Prompt], settings: SamplingSettings, journal: Journal
) -> Iterator[Sample]:
    """Yield the samples that the journal holds, then sample the missing ones and append each to the journal.

    The journal must have been started with the same settings.
    """
    known = journal_samples(journal, engine.name, prompts)
    yield from known
    finished = {(sample.key, sample.number): sample.num_tokens for sample in known}
    for sample in engine.sample(prompts, settings, finished=finished):
        journal.add(f"{sample.policy}/{sample.key}/{sample.number}", sample.to_json())
        yield sample


def respond(engine: Engine, prompts: Sequence[Prompt], settings: SamplingSettings) -> Iterator[Sample]:
    """Yield one response to each prompt, in the order of the prompts, while the engine works on all of them."""
    single = settings.model_copy(update={"num_responses": 1})
    responses: dict[str, Sample] = {}
    samples = engine.sample(prompts, single)
    for prompt in prompts:
        key = prompt_key(prompt)
        while key not in responses:
            sample = next(samples)
            responses[sample.key] = sample
        yield responses[key]
