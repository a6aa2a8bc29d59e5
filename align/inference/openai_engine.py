"""Engine that samples from an OpenAI-compatible server: vLLM, SGLang, NIM, `transformers serve` or any other."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import httpx2
from pydantic import BaseModel, Field, ValidationError

from align.errors import InputError, one_line
from align.inference.connection import Connection
from align.inference.retries import TransientError, call_with_retries, parse_retry_after
from align.inference.samples import (
    NOTHING_FINISHED,
    Finished,
    Sample,
    Throughput,
    cut_at_stop,
    prompt_key,
    sample_seed,
)
from align.inference.settings import SamplingSettings, ServerSettings
from align.records import Prompt
from align.redaction import add_secret, redact

OK, FIRST_SERVER_ERROR = 200, 500
RETRIED_STATUSES = {408, 409, 425, 429}  # below 500
UNAUTHORIZED = (401, 403)
MIN_KEY = 8  # characters of an API key that is replaced in responses; a shorter one may be a word, such as EMPTY


class ChatMessage(BaseModel):
    """The message of a choice."""

    content: str | None = None


class Choice(BaseModel):
    """One response."""

    message: ChatMessage
    finish_reason: str | None = None


class Usage(BaseModel):
    """What a request took."""

    completion_tokens: int | None = Field(default=None, ge=0)


class Completion(BaseModel):
    """A chat completion, as far as it is used. Other fields are ignored."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None


class OpenAIEngine:
    """Samples from a server's chat completions: one request per sample, many at the same time.

    The seed of a request depends only on what is asked, so a retry asks for the same sample. Whether equal seeds give
    equal text is up to the server.

    `model` is the server's name for the model, `name` the policy's name in the samples. Raises `InputError` if no
    server answers at `settings.base_url` or if it rejects the API key.
    """

    def __init__(self, model: str, settings: ServerSettings, *, name: str) -> None:
        self.name = name
        self.throughput = Throughput()
        self._model = model
        self._settings = settings
        self._url = settings.base_url.rstrip("/")
        self._headers = _authorization(settings.api_key_env)
        self._check_server()

    def sample(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, *, finished: Finished = NOTHING_FINISHED
    ) -> Iterator[Sample]:
        """Yield K samples of each distinct prompt in order of completion, except those in `finished`.

        After a request has failed for the last time no further one is sent. The samples still in flight are yielded,
        then the failure is raised: `RunError`, or `InputError` if the server rejects the request.
        """
        by_key = {prompt_key(prompt): prompt for prompt in prompts}
        numbers = range(settings.num_responses)
        wanted = iter([(key, number) for key in by_key for number in numbers if (key, number) not in finished])
        results: queue.Queue[Sample | BaseException | None] = queue.Queue()
        stopped = threading.Event()

        def work() -> None:
            try:
                with self._connection() as connection:
                    for key, number in wanted:  # shared by all workers
                        if stopped.is_set():
                            break
                        results.put(self._sample(connection, by_key[key], number, settings, stopped=stopped))
            except BaseException as error:  # raised in the caller's thread
                stopped.set()
                results.put(error)
            results.put(None)

        # Daemon threads: an interrupted program does not wait for the server.
        workers = [threading.Thread(target=work, daemon=True) for _ in range(self._settings.concurrency)]
        try:
            yield from self._collect(results, workers)
        finally:
            stopped.set()

    def _connection(self) -> Connection:
        return Connection(self._headers, self._settings.timeout_s)

    def _collect(
        self, results: queue.Queue[Sample | BaseException | None], workers: Sequence[threading.Thread]
    ) -> Iterator[Sample]:
        """Yield the samples of the workers, then raise the first failure."""
        failure: BaseException | None = None
        for each in workers:
            each.start()
        num_working = len(workers)
        while num_working:
            with self.throughput.timed():
                result = results.get()
            if result is None:
                num_working -= 1
            elif isinstance(result, BaseException):
                failure = failure or result
            else:
                self.throughput.new_tokens += result.num_tokens or 0
                yield result
        if failure:
            raise failure

    def _sample(
        self,
        connection: Connection,
        prompt: Prompt,
        number: int,
        settings: SamplingSettings,
        *,
        stopped: threading.Event,
    ) -> Sample:
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
        post: Callable[[], Completion] = partial(self._post, connection, request)
        completion = call_with_retries(post, retries=self._settings.retries, url=self._url, stopped=stopped)
        (choice, *_), usage = completion.choices, completion.usage
        text, is_cut = cut_at_stop(redact(choice.message.content or "", min_length=MIN_KEY), settings.stop)
        finish = "stop" if is_cut else str(choice.finish_reason)
        return Sample(key, number, self.name, text, usage.completion_tokens if usage else None, finish, seed)

    def _post(self, connection: Connection, request: Mapping[str, Any]) -> Completion:
        """Send a request once; raise `TransientError` where a retry may help."""
        answer = connection.request("POST", f"{self._url}/chat/completions", request)
        if answer.status in RETRIED_STATUSES or answer.status >= FIRST_SERVER_ERROR:
            raise TransientError(f"HTTP {answer.status}: {answer.shown}", parse_retry_after(answer.retry_after))
        if answer.status != OK:
            raise InputError(
                f"{self._url} rejects a request for {self._model!r} with HTTP {answer.status}: {answer.shown}"
            )
        try:
            return Completion.model_validate_json(answer.body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise TransientError(f"{place or 'body'}: {first['msg']}, in the response {answer.shown!r}") from error

    def _check_server(self) -> None:
        """Raise if no request can succeed. A server does not have to list its models."""
        try:
            with self._connection() as connection:
                status = connection.request("GET", f"{self._url}/models").status
        except (TransientError, httpx2.InvalidURL) as error:
            raise InputError(
                f"no server answers at {self._settings.base_url!r} ({_cause(error)}): start it, or correct base_url"
            ) from error
        if status in UNAUTHORIZED:
            variable = self._settings.api_key_env
            key = f"the key in ${variable}" if variable else "a request without a key"
            raise InputError(f"{self._url} rejects {key} with HTTP {status}: set api_key_env")


def _cause(error: Exception) -> str:
    kind = "" if isinstance(error, TransientError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error)}"


def _authorization(variable: str | None) -> dict[str, str]:
    """Return the header with the API key in the environment variable; no header if `variable` is None.

    Spaces and line breaks around the key are left out. The key is never shown: messages and responses that contain it
    are redacted.
    """
    if variable is None:
        return {}
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"the environment variable {variable} is not set", ("api_key_env",))
    add_secret(key)
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the key in ${variable} contains a line break or another character that no HTTP header can hold",
            ("api_key_env",),
        )
    return {"Authorization": f"Bearer {key}"}
