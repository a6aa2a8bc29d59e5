"""Engine that samples from an OpenAI-compatible server: vLLM, SGLang, NIM, `transformers serve` or any other."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import httpx2

from align.errors import InputError, one_line
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

CONNECT_TIMEOUT_S = 10.0
OK, FIRST_SERVER_ERROR = 200, 500
RETRIED_STATUSES = {408, 409, 425, 429}  # below 500
UNAUTHORIZED = (401, 403)
MAX_SHOWN = 300  # characters of a server's response in an error


class Completion(NamedTuple):
    """The first choice of a chat completion, and the tokens it used."""

    choice: Mapping[str, Any]
    usage: Mapping[str, Any]


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
                with self._client() as client:
                    for key, number in wanted:  # shared by all workers
                        if stopped.is_set():
                            break
                        results.put(self._sample(client, by_key[key], number, settings, stopped=stopped))
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

    def _client(self) -> httpx2.Client:
        timeout_s = self._settings.timeout_s
        timeout = httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        return httpx2.Client(headers=self._headers, timeout=timeout)

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
        client: httpx2.Client,
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
        post: Callable[[], Completion] = partial(self._post, client, request)
        choice, usage = call_with_retries(post, retries=self._settings.retries, url=self._url, stopped=stopped)
        text, is_cut = cut_at_stop(choice["message"]["content"] or "", settings.stop)
        finish = "stop" if is_cut else str(choice.get("finish_reason"))
        return Sample(key, number, self.name, text, usage.get("completion_tokens"), finish, seed)

    def _post(self, client: httpx2.Client, request: Mapping[str, Any]) -> Completion:
        """Send a request once; raise `TransientError` where a retry may help."""
        try:
            response = client.post(f"{self._url}/chat/completions", json=request)
        except httpx2.TimeoutException as error:
            raise TransientError(f"no data in {self._settings.timeout_s:g} s ({type(error).__name__})") from error
        except httpx2.RequestError as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error
        status, body = response.status_code, one_line(response.text)[:MAX_SHOWN]
        if status in RETRIED_STATUSES or status >= FIRST_SERVER_ERROR:
            raise TransientError(f"HTTP {status}: {body}", parse_retry_after(response.headers.get("retry-after")))
        if status != OK:
            raise InputError(f"{self._url} rejects a request for {self._model!r} with HTTP {status}: {body}")
        try:
            parsed = response.json()
            choice, usage = parsed["choices"][0], parsed.get("usage") or {}
            if not isinstance(choice["message"]["content"], str | None):
                raise TypeError("its content is not text")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise TransientError(f"{type(error).__name__} in the response {body!r}") from error
        return Completion(choice, usage)

    def _check_server(self) -> None:
        """Raise if no request can succeed. A server does not have to list its models."""
        try:
            with self._client() as client:
                response = client.get(f"{self._url}/models")
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise InputError(
                f"no server answers at {self._settings.base_url!r} ({type(error).__name__}: {one_line(error)}): "
                "start it, or correct base_url"
            ) from error
        if response.status_code in UNAUTHORIZED:
            variable = self._settings.api_key_env
            key = f"the key in ${variable}" if variable else "a request without a key"
            raise InputError(f"{self._url} rejects {key} with HTTP {response.status_code}: set api_key_env")


def _authorization(variable: str | None) -> dict[str, str]:
    """Return the header with the API key in the environment variable; no header if `variable` is None."""
    if variable is None:
        return {}
    if not (key := os.environ.get(variable)):
        raise InputError(f"the environment variable {variable} is not set", ("api_key_env",))
    return {"Authorization": f"Bearer {key}"}
