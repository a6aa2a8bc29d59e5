"""What every engine takes and gives: how to sample, a sample, and the address that the randomness of each has."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Protocol

from align.config import stable_hash
from align.distributed.journal import Journal
from align.inference.settings import SamplingSettings
from align.records import Prompt

SEED_BITS = 31  # servers take a seed as a signed 32-bit integer
TOO_LONG = "prompt too long"  # how a sample ended that was never begun


@dataclass(frozen=True, slots=True)
class Sample:
    """One response of a policy; its text may be empty, and holds neither special tokens nor a stop string."""

    key: str  # of its prompt: `prompt_key`
    number: int  # which of the K
    policy: str
    text: str
    num_tokens: int | None  # drawn, the end of the turn included; None where a server does not say
    finish: str  # stop (by itself or by a stop string), length (cut at max_new_tokens), TOO_LONG, or a server's word
    seed: int


@dataclass(slots=True)
class Speed:
    """How fast an engine has been so far, while somebody waited for it, and what its samples have taken."""

    tokens: int = 0  # drawn
    seconds: float = 0.0
    computed: int = 0  # tokens of the prompts, each once, and of all samples, those of earlier lives among them
    drawn: int = 0  # of these the samples'
    pairs_attended: int = 0  # (query, key) pairs of them in one layer

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def beside(self, other: Speed) -> Speed:
        """The speed of both, which ran at the same time."""
        return Speed(
            self.tokens + other.tokens,
            max(self.seconds, other.seconds),
            self.computed + other.computed,
            self.drawn + other.drawn,
            self.pairs_attended + other.pairs_attended,
        )

    @contextmanager
    def timed(self) -> Generator[None]:
        """A block whose time counts."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


# Samples that an earlier life has drawn, by their prompt's key and number: the tokens of each, where they are known
Done = Mapping[tuple[str, int], int | None]
NONE: Done = MappingProxyType({})


class Engine(Protocol):
    """Something that answers prompts: a model in this process, or a server."""

    name: str  # of the policy
    speed: Speed

    def sample(self, prompts: Sequence[Prompt], settings: SamplingSettings, *, done: Done = NONE) -> Iterator[Sample]:
        """K samples of each prompt, as soon as each is known: the order is that of completion.

        A prompt that is given twice is answered once. The samples in `done` are left out.
        """
        ...


def prompt_key(prompt: Prompt) -> str:
    """Sixteen hex digits that depend on the messages only."""
    return stable_hash([[message.role, message.content] for message in prompt.messages])


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without those that ask what one before them asks."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt_key(prompt), prompt)
    return list(found.values())


def sample_seed(settings: SamplingSettings, policy: str, key: str, number: int) -> int:
    """The seed of one sample, which depends on nothing but what the sample is of; below 2 ** 31.

    The policy's name counts, so that two nearly equal policies do not give the same responses.
    """
    digest = hashlib.sha256(repr((settings.seed, policy, key, number)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> (64 - SEED_BITS)


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    places = [place for place in (text.find(each) for each in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def kept(journal: Journal, policy: str, prompts: Sequence[Prompt]) -> list[Sample]:
    """The policy's samples of the prompts that the journal holds."""
    keys = {prompt_key(prompt) for prompt in prompts}
    known = [Sample(**value) for value in journal.done.values()]
    return [one for one in known if one.policy == policy and one.key in keys]


def resumed(
    engine: Engine, prompts: Sequence[Prompt], settings: SamplingSettings, journal: Journal
) -> Iterator[Sample]:
    """The engine's samples of the prompts: first those that the journal holds, then the missing, each written down.

    The journal is one of these settings, this policy and these prompts.
    """
    there = kept(journal, engine.name, prompts)
    yield from there
    for one in engine.sample(prompts, settings, done={(one.key, one.number): one.num_tokens for one in there}):
        journal.add(f"{one.policy}/{one.key}/{one.number}", asdict(one))
        yield one


def ask(engine: Engine, prompts: Sequence[Prompt], settings: SamplingSettings) -> Iterator[str]:
    """One answer to each prompt, in their order; many are under way at once. What a judge that is a model uses."""
    single = settings.model_copy(update={"num_responses": 1})
    answers: dict[str, str] = {}
    coming = engine.sample(prompts, single)
    for prompt in prompts:
        key = prompt_key(prompt)
        while key not in answers:
            one = next(coming)
            answers[one.key] = one.text
        yield answers[key]
