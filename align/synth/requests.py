"""Requests to a teacher, each answered once: an answer is stored under its request.

The key of a request covers the content of the model, how it is run, the messages, the sampling settings and the seed of
the sample, and nothing else. So a kill, another parser, another family in the same step or one changed row asks nothing
again that has an answer. `Teachers.ask` returns the answers in the order of the requests, whichever came first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

from align.config import stable_hash
from align.distributed.journal import Journal, run_with_journal
from align.distributed.processes import Processes
from align.distributed.progress import Progress
from align.distributed.work_split import WorkShard
from align.errors import InputError, RowOrigin, RunError
from align.inference.samples import REFUSED, Engine, Sample, Throughput, prompt_key, sample_seed
from align.inference.settings import SamplingSettings
from align.inference.transformers_engine import TransformersEngine
from align.records import Message, Prompt, is_cut_off, message_key
from align.rewards.thoughts import THINK, ThoughtSettings, visible_text

STORE_FORMAT = {"responses": 1}  # what the first line of a store says of its items
WORK = "work"  # first part of the keys of what a batch of requests took


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a teacher. `number` tells samples of the same messages and settings apart."""

    messages: tuple[Message, ...]
    sampling: SamplingSettings
    number: int = 0
    opens: bool = False  # whether the model writes the last message, an empty one of the user, in place of an answer

    @property
    def prompt(self) -> Prompt:
        """The messages as a prompt. A server may refuse it, which is an answer too."""
        return Prompt(self.messages, origin=RowOrigin("a request", skips=True))


def ask_user(text: str, sampling: SamplingSettings, number: int = 0) -> Request:
    """Return a request that consists of one user message."""
    return Request((Message("user", text),), sampling, number)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request."""

    request: str  # key of the request
    model: str
    text: str  # without thoughts
    finish: str
    num_tokens: int | None

    @property
    def is_cut(self) -> bool:
        """Whether sampling ended before the answer did."""
        return is_cut_off(self.finish)


class Teacher(NamedTuple):
    """A model that can be asked."""

    name: str
    identity: Any  # JSON of everything that decides its samples: content of the model, and how it is run
    load: Callable[[], Engine]


class Teachers:
    """Models that answer requests, with one in memory at a time, and the store of their answers."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        store: Journal,
        processes: Processes,
        progress: Progress,
        thoughts: ThoughtSettings = THINK,
    ) -> None:
        self._thoughts = thoughts.model_copy(update={"strip": True})  # an answer never has them
        self._teachers = {teacher.name: teacher for teacher in teachers}
        self._identities = {teacher.name: stable_hash(teacher.identity) for teacher in teachers}
        self._store, self._processes, self._progress = store, processes, progress
        self._engine: Engine | None = None
        self.throughput: dict[str, Throughput] = {}  # of all requests of this step, those answered before included
        self.num_asked = self.num_new = 0  # requests; those that had no answer
        self._accepted: set[str] = set()  # models that have accepted a request of this step

    @property
    def default(self) -> str:
        """The first model."""
        return next(iter(self._teachers))

    def ask(self, requests: Sequence[Request], *, by: str | None = None, activity: str = "ask") -> list[Answer]:
        """Return the answer to each request, in order. Every process must ask the same.

        Requests with equal messages, sampling and number have one answer. Raises `RunError` if the engine fails;
        the answers that arrived until then are stored. Raises `InputError` if a server refuses all requests from the
        first one on, as it does if the settings are wrong; none of these is stored.
        """
        name = by or self.default
        keys = [self.key(request, name) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._store.done}
        self.num_asked += len(set(keys))
        self.num_new += len(missing)
        self._progress.phase(activity, len(set(keys)), len(set(keys)) - len(missing))
        self._note_accepted(name, keys)
        batch = f"{WORK}/{stable_hash(sorted(set(keys)))}"
        if missing:
            self._answer(name, dict(zip(keys, requests, strict=True)), batch)
        self._note_accepted(name, keys)
        self._add_work(name, self._store.done.get(batch))
        return [self._answer_of(key, name) for key in keys]

    def key(self, request: Request, name: str) -> str:
        """Return the key of a request to a model."""
        sampling = request.sampling.model_dump(mode="json", exclude={"num_responses", "seed"})
        seed = sample_seed(request.sampling, name, prompt_key(request.prompt), request.number)
        if request.sampling.temperature == 0:
            seed = 0  # decides nothing
        chat = message_key(request.messages)
        return stable_hash([self._identities[name], chat, sampling, seed, *(["opens"] if request.opens else [])])

    def score(self, requests: Sequence[Request], choices: Sequence[str], *, by: str | None = None) -> list[list[float]]:
        """Return the log-probabilities in nats of each choice as the answer to each request, by a local model.

        Only the first token of a choice counts. Each request is asked once.
        """
        name = by or self.default
        keys = [stable_hash([self.key(each, name), list(choices)]) for each in requests]
        missing = {key: each.prompt for key, each in zip(keys, requests, strict=True) if key not in self._store.done}
        own = WorkShard.of(self._processes).select(list(missing.items()))

        def work() -> None:
            logps = _local(self._loaded(name)).choice_logps([prompt for _, prompt in own], choices)
            for (key, _), values in zip(own, logps, strict=True):
                self._store.add(key, {"choices": list(choices), "logps": values})
                self._progress.advance(1)

        self._progress.phase("score", len(set(keys)), len(set(keys)) - len(missing))
        self.num_asked += len(set(keys))
        self.num_new += len(missing)
        if missing:
            run_with_journal(self._store, self._processes, work, "scoring")
        return [self._store.done[key]["logps"] for key in keys]

    def _answer(self, name: str, requests: Mapping[str, Request], batch: str) -> None:
        """Ask for the requests without an answer, each process for its own, and store what the batch took."""
        own = WorkShard.of(self._processes).select(list(requests.items()))

        def work() -> Throughput:
            engine = self._loaded(name)
            before = replace(engine.throughput)
            refused: list[tuple[str, Request, Sample]] = []
            is_accepted = name in self._accepted
            for found in self._samples(engine, dict(own)):
                if is_accepted or not found[2].finish.startswith(REFUSED):
                    is_accepted = True
                    self._add(*found)
                else:
                    refused.append(found)
            if refused and not is_accepted:
                raise InputError(f"{name}: the server refused every request, first with {refused[0][2].finish}")
            for found in refused:
                self._add(*found)
            return _difference(engine.throughput, before)

        spent = run_with_journal(self._store, self._processes, work, "asking")
        total = reduce(Throughput.merge, self._processes.all_gather_object(spent))

        def note_work() -> None:
            if self._processes.is_main and batch not in self._store.done:
                self._store.add(batch, asdict(total))

        run_with_journal(self._store, self._processes, note_work, "asking")

    def _add(self, key: str, request: Request, sample: Sample) -> None:
        shown = {"messages": [[each.role, each.content] for each in request.messages]}
        self._store.add(key, {**shown, "text": sample.text, "finish": sample.finish, "tokens": sample.num_tokens})
        self._progress.advance(1)

    def _note_accepted(self, name: str, keys: Sequence[str]) -> None:
        known = (self._store.done[key] for key in keys if key in self._store.done)
        if any(not each["finish"].startswith(REFUSED) for each in known):
            self._accepted.add(name)

    def _samples(self, engine: Engine, requests: Mapping[str, Request]) -> Iterator[tuple[str, Request, Sample]]:
        """Yield the missing samples; requests with equal sampling settings are sampled together."""
        together: dict[str, list[str]] = defaultdict(list)
        for key, request in requests.items():
            together[stable_hash([request.sampling.model_dump(), request.opens])].append(key)
        for keys in together.values():
            wanted = {(prompt_key(requests[key].prompt), requests[key].number): key for key in keys}
            prompts = {prompt: requests[key].prompt for (prompt, _), key in wanted.items()}
            last = max(number for _, number in wanted)
            sampling = requests[keys[0]].sampling.model_copy(update={"num_responses": last + 1})
            others = ((prompt, number) for prompt in prompts for number in range(last + 1))
            finished: dict[tuple[str, int], int | None] = {
                place: self._tokens(wanted.get(place))
                for place in others
                if place not in wanted or wanted[place] in self._store.done
            }
            asked = _local(engine).open_user_turns() if requests[keys[0]].opens else engine
            for sample in asked.sample(list(prompts.values()), sampling, finished=finished):
                key = wanted[sample.key, sample.number]
                yield key, requests[key], sample

    def _tokens(self, key: str | None) -> int | None:
        return None if key is None else self._store.done[key]["tokens"]

    def release(self) -> None:
        """Free the model in memory."""
        self._engine = None

    def _loaded(self, name: str) -> Engine:
        """Return the engine of a model; the one before it is released first."""
        if self._engine is None or self._engine.name != name:
            self._engine = None
            self._engine = self._teachers[name].load()
        return self._engine

    def _answer_of(self, key: str, name: str) -> Answer:
        if key not in self._store.done:
            raise RunError(f"{name} gave no answer to request {key}")
        stored = self._store.done[key]
        return Answer(key, name, visible_text(stored["text"], self._thoughts), stored["finish"], stored["tokens"])

    def _add_work(self, name: str, work: Mapping[str, Any] | None) -> None:
        if work is not None:
            self.throughput[name] = _sum(self.throughput.get(name, Throughput()), Throughput(**work))


def _local(engine: Engine) -> TransformersEngine:
    """Return an engine whose model runs in this process."""
    if not isinstance(engine, TransformersEngine):
        raise InputError(f"{engine.name}: likelihoods and open user turns need the engine local", ("engine",))
    return engine


def _sum(one: Throughput, other: Throughput) -> Throughput:
    """Return the throughput of two batches that ran one after the other."""
    return Throughput(**{name: value + getattr(other, name) for name, value in asdict(one).items()})


def _difference(after: Throughput, before: Throughput) -> Throughput:
    """Return what was processed between two states of an engine."""
    return Throughput(**{name: value - getattr(before, name) for name, value in asdict(after).items()})
