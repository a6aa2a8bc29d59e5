"""Engine that samples from an OpenAI-compatible server: vLLM, SGLang, NIM, `transformers serve` or any other."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from align.accounting.process_usage import PROCESS_USAGE
from align.data.chat_tools import CallForm, chat_messages
from align.data.readers.tool_calls import as_calls
from align.errors import InputError
from align.inference.requests.server_client import RefusedRequest, Sender, ServerClient
from align.inference.samples import (
    NOTHING_FINISHED,
    REFUSED,
    TOO_LONG,
    Finished,
    Sample,
    Throughput,
    cut_at_stop,
    prompt_key,
    sample_seed,
)
from align.inference.settings import SamplingSettings, ServerSettings
from align.records import Prompt, ToolCall, is_cut_off
from align.redaction import redact

MALFORMED_CALL = "malformed tool call"  # finish reason of a response whose calls are not JSON; it has no text
CALL_FORM = CallForm(arguments_as_text=True, empty_content=None)  # of OpenAI's API
MILLION = 1_000_000  # tokens that a price is for
MIN_KEY = 8  # characters of an API key that is replaced in responses; a shorter one may be a word, such as EMPTY


class ChatMessage(BaseModel):
    """The message of a choice."""

    content: str | None = None
    tool_calls: list[Any] | None = None


class Choice(BaseModel):
    """One response."""

    message: ChatMessage
    finish_reason: str | None = None


class Usage(BaseModel):
    """What a request took."""

    prompt_tokens: int | None = Field(default=None, ge=0)
    completion_tokens: int | None = Field(default=None, ge=0)


class Completion(BaseModel):
    """A chat completion, as far as it is used. Other fields are ignored."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None


COMPLETION = TypeAdapter(Completion)


class OpenAIEngine:
    """Samples from a server's chat completions: one request per sample, many at the same time.

    The seed of a request depends only on what is asked, so a retry asks for the same sample. Whether equal seeds give
    equal text is up to the server.

    `name` is the policy's name in the samples. `settings.models` may give the server's name for it; otherwise that is
    `name` or `model`. Raises `InputError` as `ServerClient` does.
    """

    def __init__(self, model: str, settings: ServerSettings, *, name: str) -> None:
        self.name = name
        self.throughput = Throughput()
        self._cost_lock = threading.Lock()  # the threads of `sample` add to it
        self._settings = settings
        self._client = ServerClient(model, settings, name=name)

    def sample(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, *, finished: Finished = NOTHING_FINISHED
    ) -> Iterator[Sample]:
        """Yield K samples of each distinct prompt in order of completion, except those in `finished`.

        A prompt that is too long for the server's model has empty samples with finish reason `TOO_LONG`, and one whose
        row may be skipped and which the server rejects a sample whose finish reason begins with REFUSED. After a
        request has failed for the last time no further one is sent. The samples still in flight are yielded, then the
        failure is raised: `RunError`, or `InputError` if the server rejects the request.
        """
        by_key = {prompt_key(prompt): prompt for prompt in prompts}
        numbers = range(settings.num_responses)
        missing = [(key, number) for key in by_key for number in numbers if (key, number) not in finished]

        def ask(sender: Sender, item: tuple[str, int]) -> Sample:
            key, number = item
            return self._sample(sender, by_key[key], number, settings)

        with closing(self._client.ask_all(missing, ask)) as samples:
            while True:
                with self.throughput.timed():
                    sample = next(samples, None)
                if sample is None:
                    return
                self.throughput.new_tokens += sample.num_tokens or 0
                self.throughput.requests += 1
                yield sample

    def _sample(self, sender: Sender, prompt: Prompt, number: int, settings: SamplingSettings) -> Sample:
        key = prompt_key(prompt)
        seed = sample_seed(settings, self.name, key, number)
        request = {
            **self._settings.body,
            "model": self._client.model,
            "messages": _messages(prompt),
            **({"tools": list(prompt.tools)} if prompt.tools else {}),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": seed,
            **({"stop": settings.stop} if settings.stop else {}),
        }
        try:
            completion = sender.post(f"{self._client.url}/chat/completions", request, COMPLETION)
        except RefusedRequest as error:
            prompt.origin.refuse(str(error))
            return Sample(key, number, self.name, "", 0, f"{REFUSED}: {error.reason}", seed)
        if completion is None:
            return Sample(key, number, self.name, "", 0, TOO_LONG, seed)
        (choice, *_), usage = completion.choices, completion.usage
        self._add_cost(usage)
        text, is_cut = cut_at_stop(redact(choice.message.content or "", min_length=MIN_KEY), settings.stop)
        finish = "stop" if is_cut else str(choice.finish_reason)
        num_tokens = usage.completion_tokens if usage else None
        try:
            calls = _calls(choice.message)
        except InputError:
            return Sample(key, number, self.name, "", num_tokens, MALFORMED_CALL, seed)
        if calls and is_cut_off(finish):  # more calls may have followed; a message with calls cannot be cut off
            return Sample(key, number, self.name, "", num_tokens, finish, seed)
        return Sample(key, number, self.name, text, num_tokens, finish, seed, calls)

    def _add_cost(self, usage: Usage | None) -> None:
        """Count the price of an answer; raise if the server does not report its tokens."""
        price = self._settings.price
        if price is None:
            return
        if usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
            raise InputError(
                f"{self._client.url} reports no numbers of tokens, so the cost is unknown: leave price out"
            )
        cost = (price.prompt * usage.prompt_tokens + price.response * usage.completion_tokens) / MILLION
        PROCESS_USAGE.add_cost(cost)
        with self._cost_lock:
            self.throughput.cost += cost


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Return the messages of a prompt as the API takes them: a tool's result has the id of its call and no name."""
    messages = chat_messages(prompt.messages, lambda: CALL_FORM, str, lambda message: message.content)
    return [{field: value for field, value in message.items() if field != "name"} for message in messages]


def _calls(message: ChatMessage) -> tuple[ToolCall, ...]:
    """Return the tool calls of a response, without the ids that the server made."""
    calls = as_calls(message.tool_calls or [])
    return tuple(replace(call, arguments=redact(call.arguments, min_length=MIN_KEY), id=None) for call in calls)
