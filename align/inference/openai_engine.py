"""Responses of an OpenAI-compatible server: vLLM, SGLang, NIM, `transformers serve` or any other."""

from __future__ import annotations

import email.utils
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import httpx2

from align.errors import InputError, RunError, one_line
from align.inference.samples import NONE, Done, Sample, Speed, before_stop, prompt_key, sample_seed
from align.inference.settings import SamplingSettings, ServerSettings
from align.records import Prompt

FIRST_WAIT_S = 0.5  # before the first repetition; each further wait is twice as long, less a share drawn at random
LONGEST_WAIT_S = 60.0
LONGEST_TOLD_WAIT_S = 300.0  # where the server itself says how long
CONNECT_S = 10.0
BUSY = {408, 409, 425, 429}  # the statuses below 500 that another try may cure
SHOWN = 300  # characters of a server's own words in an error


class Answer(NamedTuple):
    """What a server says to a request."""

    choice: Mapping[str, Any]
    usage: Mapping[str, Any]


Ask = Callable[[Mapping[str, Any]], Answer]


class _Passing(Exception):
    """A failure that another try may cure."""

    def __init__(self, what: str, told_s: float | None = None) -> None:
        super().__init__(what)
        self.told_s = told_s  # how long to wait, where the server says so


class OpenAIEngine:
    """Samples of a server's chat completions, one request a sample, many at once.

    The seed of a request depends on nothing but what is asked, so a repetition asks for the same sample; whether the
    same seed gives the same text, whatever else is asked at the time, is up to the server.
    """

    def __init__(self, model: str, settings: ServerSettings, *, name: str) -> None:
        self.name = name
        self._model = model
        self.speed = Speed()
        self._settings = settings
        self._url = settings.base_url.rstrip("/")
        self._headers = _authorization(settings.api_key_env)
        self._check_server()

    def sample(self, prompts: Sequence[Prompt], settings: SamplingSettings, *, done: Done = NONE) -> Iterator[Sample]:
        """K samples of each prompt, in the order that the server answers.

        When a request has failed for good no further one is sent; what is under way is still waited for and given,
        and then the failure is raised.
        """
        by_key = {prompt_key(prompt): prompt for prompt in prompts}
        numbers = range(settings.num_responses)
        wanted = iter([(key, number) for key in by_key for number in numbers if (key, number) not in done])
        answers: queue.Queue[Sample | BaseException | None] = queue.Queue()
        over = threading.Event()

        def work() -> None:
            try:
                with self._client() as client:
                    ask = partial(self._patiently, partial(self._post, client), over)
                    for key, number in wanted:  # which all workers take from
                        if over.is_set():
                            break
                        answers.put(self._one(by_key[key], number, settings, ask))
            except BaseException as error:  # raised in the caller's thread
                over.set()
                answers.put(error)
            answers.put(None)

        # Daemons: a program that is interrupted does not wait for the server.
        workers = [threading.Thread(target=work, daemon=True) for _ in range(self._settings.concurrency)]
        try:
            yield from self._gathered(answers, workers)
        finally:
            over.set()

    def _client(self) -> httpx2.Client:
        timeout_s = self._settings.timeout_s
        return httpx2.Client(
            headers=self._headers, timeout=httpx2.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))
        )

    def _gathered(
        self, answers: queue.Queue[Sample | BaseException | None], workers: Sequence[threading.Thread]
    ) -> Iterator[Sample]:
        """The workers' samples; then the first failure, if there was one."""
        failure: BaseException | None = None
        for each in workers:
            each.start()
        working = len(workers)
        while working:
            with self.speed.timed():
                answer = answers.get()
            if answer is None:
                working -= 1
            elif isinstance(answer, BaseException):
                failure = failure or answer
            else:
                self.speed.tokens += answer.num_tokens or 0
                yield answer
        if failure:
            raise failure

    def _one(self, prompt: Prompt, number: int, settings: SamplingSettings, ask: Ask) -> Sample:
        key = prompt_key(prompt)
        seed = sample_seed(settings, self.name, key, number)
        request = {
            **self._settings.body,
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": seed,
            **({"stop": settings.stop} if settings.stop else {}),
        }
        choice, usage = ask(request)
        text, stopped = before_stop(choice["message"]["content"] or "", settings.stop)
        finish = "stop" if stopped else str(choice.get("finish_reason"))
        return Sample(key, number, self.name, text, usage.get("completion_tokens"), finish, seed)

    def _patiently(self, ask: Ask, over: threading.Event, request: Mapping[str, Any]) -> Answer:
        """The answer, after as many tries as are allowed; none is begun once all is over."""
        tries = 0
        while True:
            tries += 1
            try:
                return ask(request)
            except _Passing as error:
                if tries > self._settings.retries or over.wait(_wait_s(tries, error.told_s)):
                    raise RunError(
                        f"{self._url}: a request failed {tries} times, at last with: {one_line(error)}; "
                        "what is done is kept, and the next call goes on from there"
                    ) from error

    def _post(self, client: httpx2.Client, request: Mapping[str, Any]) -> Answer:
        """The first choice of an answer, and what it cost."""
        try:
            response = client.post(f"{self._url}/chat/completions", json=request)
        except httpx2.TimeoutException as error:
            raise _Passing(f"no word in {self._settings.timeout_s:g} s ({type(error).__name__})") from error
        except httpx2.RequestError as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        status, said = response.status_code, one_line(response.text)[:SHOWN]
        if status in BUSY or status >= 500:
            raise _Passing(f"HTTP {status}: {said}", _told_s(response.headers.get("retry-after")))
        if status != 200:
            raise InputError(f"{self._url} refuses a request for {self._model!r} with HTTP {status}: {said}")
        try:
            answer = response.json()
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            if not isinstance(choice["message"]["content"], str | None):
                raise TypeError("its content is not text")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _Passing(f"{type(error).__name__} in the answer {said!r}") from error
        return Answer(choice, usage)

    def _check_server(self) -> None:
        """Stop at once where no request could succeed; a server need not list its models."""
        try:
            with self._client() as client:
                response = client.get(f"{self._url}/models")
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise InputError(
                f"no server answers at {self._settings.base_url!r} ({type(error).__name__}: {one_line(error)}): "
                "start it, or correct base_url"
            ) from error
        if response.status_code in (401, 403):
            where = (
                f"the key in ${self._settings.api_key_env}" if self._settings.api_key_env else "a call without a key"
            )
            raise InputError(f"{self._url} refuses {where} with HTTP {response.status_code}: set api_key_env")


def _authorization(name: str | None) -> dict[str, str]:
    """The header with the key that the environment holds under the name."""
    if name is None:
        return {}
    if not (key := os.environ.get(name)):
        raise InputError(f"api_key_env: the environment has no variable {name}")
    return {"Authorization": f"Bearer {key}"}


def _wait_s(tries: int, told_s: float | None) -> float:
    """How long to wait after so many tries; a share of it is left to chance, so that requests do not come together."""
    if told_s is not None:
        return min(LONGEST_TOLD_WAIT_S, told_s)
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.5, 1)


def _told_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None where it says nothing readable."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
