"""The engine for OpenAI-compatible servers, against a local HTTP server that misbehaves."""

import asyncio
import email.utils
import importlib.util
import signal
import socket
import subprocess
import sys
import time

import pytest
from chat_server import SLOW_S, answer_to, serving
from transformers import AutoConfig, AutoModelForCausalLM

from align.config import build
from align.data.tokenizer import train_tokenizer
from align.distributed.journal import Journal
from align.errors import InputError, RowOrigin, RunError
from align.inference.engines import load_engine
from align.inference.managed.settings import TransformersServeSettings
from align.inference.openai_engine import OpenAIEngine
from align.inference.requests import retries
from align.inference.samples import TOO_LONG, prompt_key, respond, sample_with_journal
from align.inference.settings import EngineSettings, SamplingSettings, ServerSettings
from align.records import Message, Prompt

PROMPTS = [
    Prompt((Message("system", "Be brief."), Message("user", f"question {number} — 日本語"))) for number in range(6)
]
SETTINGS = SamplingSettings(num_responses=3, temperature=0.7, top_p=0.9, max_new_tokens=50, seed=4)
ALL = {(prompt_key(prompt), number) for prompt in PROMPTS for number in range(3)}


def engine(server, model="m", **settings):
    url = server if isinstance(server, str) else server.url
    values = {"base_url": url, "timeout_s": 60.0, "retries": 2, "concurrency": 4, **settings}
    return OpenAIEngine(model, build(ServerSettings, values, ("engine", "server")), name="m")


def by_place(samples):
    found = {}
    for sample in samples:
        assert (sample.key, sample.number) not in found, "sampled twice"
        found[sample.key, sample.number] = sample
    return found


def distinct(requests):
    return {(request["messages"][-1]["content"], request["seed"]) for request in requests}


def test_every_sample_is_requested_once_with_its_seed_and_all_settings():
    with serving() as server:
        asked = engine(server, body={"top_k": 5})
        samples = by_place(asked.sample([*PROMPTS, *PROMPTS], SETTINGS))
    assert samples.keys() == ALL
    assert len(server.requests) == len(distinct(server.requests)) == len(ALL)
    said = {(request["messages"][-1]["content"], request["seed"]): answer_to(request) for request in server.requests}
    for prompt in PROMPTS:
        for number in range(3):
            sample = samples[prompt_key(prompt), number]
            assert sample.text == said[prompt.messages[-1].content, sample.seed]
            assert (sample.policy, sample.finish, sample.num_tokens) == ("m", "length", len(sample.text))
    assert server.requests[0].keys() == {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "top_k"}
    first = server.requests[0]
    assert [first[name] for name in ("temperature", "top_p", "max_tokens", "top_k")] == [0.7, 0.9, 50, 5]
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked.throughput.new_tokens == sum(sample.num_tokens for sample in samples.values())
    assert asked.throughput.tokens_per_s > 0


def test_samples_do_not_depend_on_concurrency():
    found = []
    for concurrency in (1, 7):
        with serving() as server:
            found.append(by_place(engine(server, concurrency=concurrency).sample(PROMPTS, SETTINGS)))
            assert server.most_under_way <= concurrency
    assert found[0] == found[1]
    with serving() as server:
        other = SETTINGS.model_copy(update={"seed": 5})
        assert not {one.seed for one in engine(server).sample(PROMPTS, other)} & {one.seed for one in found[0].values()}


FAILURES = [(429,), (429, "0"), (500,), (503, "0.05"), "slow", "half", "cut", "reset", "odd"]


def impatient(failure):
    """Settings for a server with this failure: only for a slow one are they shorter than any answer takes."""
    return {"timeout_s": SLOW_S / 2} if failure == "slow" else {}


@pytest.fixture
def failed(monkeypatch):
    """The requests that failed, in the words of the engine."""
    found, wait_s = [], retries._wait_s
    monkeypatch.setattr(retries, "_wait_s", lambda tries, after_s: (found.append(tries), wait_s(tries, after_s))[1])
    return found


@pytest.mark.parametrize("failure", FAILURES)
def test_transient_failures_are_retried(failure, failed):
    with serving([failure, "ok", failure]) as server:
        samples = by_place(engine(server, **impatient(failure)).sample(PROMPTS, SETTINGS))
    assert samples.keys() == ALL
    assert len(failed) == 2 or failure == "slow" and len(failed) > 2  # a busy machine may be slow, too
    assert sum(server.steps.values()) == len(ALL) + len(failed)
    assert len(distinct(server.requests)) == len(ALL)


@pytest.mark.parametrize("failure", FAILURES)
def test_permanent_failures_end_the_run_and_finished_samples_are_resumed(tmp_path, failure):
    path = tmp_path / "samples.jsonl"
    made_with = SETTINGS.model_dump()
    with serving(["ok"] * 7, always=failure) as server:
        asked = engine(server, retries=1, **impatient(failure))
        with Journal(path, made_with) as journal:
            before = []
            with pytest.raises(RunError, match=r"failed 2 times, last with: .*; finished samples are kept") as caught:
                before.extend(sample_with_journal(asked, PROMPTS, SETTINGS, journal))
        assert "\n" not in str(caught.value)
        assert len(journal.done) == 7  # written down even where the caller saw less
        assert sum(server.steps.values()) <= 7 + 2 * 4  # what was under way, and no more
        answered = distinct(server.requests[:7])
    with serving() as server:
        with Journal(path, made_with) as journal:
            samples = by_place(sample_with_journal(engine(server), PROMPTS, SETTINGS, journal))
        assert samples.keys() == ALL
        assert len(server.requests) == len(ALL) - 7
        assert not distinct(server.requests) & answered


@pytest.mark.parametrize("told", ["0.4", "date"])
def test_retry_after_is_respected(told):
    def refuse(handler):
        date = email.utils.formatdate(time.time() + 1.999, usegmt=True)  # in whole seconds, by its form
        handler.say(429, {}, [("Retry-After", date if told == "date" else told)])

    with serving([refuse]) as server:
        list(engine(server, concurrency=1).sample(PROMPTS[:1], SETTINGS))
    assert server.times[1] - server.times[0] > 0.39


def test_waits_between_retries_double(monkeypatch):
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: high)
    asked, wait_s = [], retries._wait_s
    monkeypatch.setattr(retries, "_wait_s", lambda *told: asked.append(wait_s(*told)) or asked[-1])
    said = "failed 4 times, last with: HTTP 500: .*status 500"
    with serving(always=(500,)) as server, pytest.raises(RunError, match=said):
        list(engine(server, concurrency=1, retries=3).sample(PROMPTS, SETTINGS))
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert asked == [0.5, 1.0, 2.0]
    assert all(waited_s >= asked_s - 0.01 for waited_s, asked_s in zip(waits, asked, strict=True))


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_rejected_requests_are_not_retried(status):
    with serving(["ok", "ok"], always=(status,)) as server:
        found = []
        with pytest.raises(InputError, match=rf"rejects a request for 'm' with HTTP {status}: .*as told"):
            found.extend(engine(server, concurrency=1).sample(PROMPTS, SETTINGS))
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",  # vLLM
        "Requested token count exceeds the model's maximum context length of 4096 tokens.",  # SGLang
        "context_length_exceeded",  # OpenAI's code
    ],
)
def test_prompts_that_are_too_long_for_the_server_are_not_answered_and_the_others_are(said):
    def refuse(handler):
        handler.say(400, {"error": {"message": said, "code": 400}})

    with serving([refuse, "ok", refuse]) as server:
        samples = list(engine(server, concurrency=1).sample(PROMPTS, SETTINGS))
    assert len(samples) == len(server.requests) == len(ALL)
    assert [(one.text, one.finish, one.num_tokens) for one in samples if not one.text] == [("", TOO_LONG, 0)] * 2


def test_empty_responses_are_returned():
    with serving(["empty"]) as server:
        samples = list(engine(server).sample(PROMPTS, SETTINGS))
    assert len(samples) == len(ALL)
    assert [(one.text, one.finish, one.num_tokens) for one in samples if not one.text] == [("", "stop", None)]


def test_a_stop_string_in_the_servers_text_is_removed():
    with serving() as server:
        samples = list(engine(server).sample(PROMPTS, SETTINGS.model_copy(update={"stop": [" to", "zz"]})))
    assert server.requests[0]["stop"] == [" to", "zz"]
    assert {(len(one.text), one.finish) for one in samples} == {(len("naïve 🙂 01234567"), "stop")}


def test_respond_keeps_the_order_of_the_prompts():
    with serving(["slow", "ok", (500,)]) as server:
        asked = [PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[5]]
        answers = [each.text for each in respond(engine(server, timeout_s=60.0), asked, SETTINGS)]
    assert [answer.split(" to ")[1] for answer in answers] == [prompt.messages[-1].content for prompt in asked]


def test_a_missing_server_is_reported_in_one_line():
    with socket.socket() as taken:  # a port that nobody listens to
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=rf"no server answers at '{url}' \(ConnectError: .*\): start it") as caught:
            engine(url)
    assert "\n" not in str(caught.value)


def test_a_server_that_disappears_ends_the_run():
    with serving() as server:
        asked = engine(server, retries=1, concurrency=1)
        coming = asked.sample(PROMPTS, SETTINGS)
        next(coming)
        server.always = "reset"  # the connections that are open
    with pytest.raises(RunError, match="failed 2 times, last with: (ConnectError|RemoteProtocolError|ReadError)"):
        list(coming)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "ftp://host/v1", ""])
def test_invalid_urls_are_rejected(url):
    with pytest.raises(InputError, match="no server answers at"):
        engine(url)


def test_the_api_key_is_read_from_the_environment_and_never_shown(monkeypatch):
    monkeypatch.setenv("KEY_OF_A_TEST", "s3cret")
    with serving(key="s3cret") as server:
        samples = list(engine(server, api_key_env="KEY_OF_A_TEST").sample(PROMPTS, SETTINGS))
        assert len(samples) == len(ALL)
        with pytest.raises(InputError, match="rejects a request without a key with HTTP 401: set api_key_env"):
            engine(server)
        monkeypatch.setenv("KEY_OF_A_TEST", "wr0ng")
        with pytest.raises(InputError, match=r"rejects the key in \$KEY_OF_A_TEST with HTTP 401") as caught:
            engine(server, api_key_env="KEY_OF_A_TEST")
        assert "wr0ng" not in str(caught.value)
        with pytest.raises(InputError, match="the environment variable NO_SUCH_KEY is not set"):
            engine(server, api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"retries": -1}, "retries"),
        ({"body": {"temperature": 1.0}}, "body sets temperature, which the sampling settings set"),
        ({"api_key": "s3cret"}, "api_key: unknown key"),
    ],
)
def test_invalid_server_settings_are_rejected(values, said):
    with pytest.raises(InputError, match=said):
        build(ServerSettings, {"base_url": "http://127.0.0.1:1/v1", **values}, ("engine", "server"))


def test_an_interrupted_program_does_not_wait_for_the_server():
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job is born without
from align.records import Message, Prompt
from align.inference.settings import SamplingSettings
from align.inference.openai_engine import OpenAIEngine
from align.inference.settings import ServerSettings
engine = OpenAIEngine("m", ServerSettings(base_url=sys.argv[1], timeout_s=600.0), name="m")
print("asking", flush=True)
list(engine.sample([Prompt((Message("user", "q"),))], SamplingSettings(num_responses=4)))
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        command = [sys.executable, "-c", code, url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            connection, _ = silent.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 404 none\r\nContent-Length: 0\r\n\r\n")
                assert child.stdout.readline() == b"asking\n"
            asked, _ = silent.accept()
            with asked:
                asked.recv(1000)  # a sample is asked for, and nobody answers
                start = time.monotonic()
                child.send_signal(signal.SIGINT)
                assert child.wait(timeout=300) != 0
                assert time.monotonic() - start < 120  # not the 600 s of the request


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve needs fastapi, uvicorn and openai",
)
def test_sampling_from_transformers_serve(tmp_path):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = train_tokenizer(["a b"], vocab_size=259, chat_template=template)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **shape, vocab_size=len(tokenizer), initializer_range=0.4)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    serve = EngineSettings(transformers_serve=TransformersServeSettings(ready_s=300.0))
    with load_engine(str(tmp_path / "model"), serve, name="m") as asked:
        short = SETTINGS.model_copy(update={"max_new_tokens": 8})
        samples, again = (by_place(asked.sample(PROMPTS, short)) for _ in range(2))
        assert samples.keys() == ALL
        assert samples == again  # one request at a time, each with its seed
        assert all(0 <= one.num_tokens <= 8 for one in samples.values())
        assert len({one.text for one in samples.values()}) > len(ALL) // 2
        greedy = SamplingSettings(temperature=0, max_new_tokens=8)
        first, again = (by_place(asked.sample(PROMPTS, greedy)) for _ in range(2))
        assert first == again


def test_a_prompt_that_the_server_refuses_is_skipped_or_named_by_its_row():
    def asked(text, skips):
        return Prompt((Message("user", text),), origin=RowOrigin(f"{text}.jsonl: row 2", skips))

    with serving() as server:
        server.refuses = "odd"
        found = list(engine(server).sample([asked("even", True), asked("odd", True)], SETTINGS))
        assert len(found) == 2 * SETTINGS.num_responses
        refused = {one.finish for one in found if one.key == prompt_key(asked("odd", True))}
        assert refused == {'refused: HTTP 400: {"message": "roles must alternate"}'}
        assert all(one.text for one in found if one.key == prompt_key(asked("even", True)))
        with pytest.raises(InputError, match=r"^odd\.jsonl: row 2: .* rejects a request for 'm' with HTTP 400: .*alt"):
            list(engine(server).sample([asked("odd", False)], SETTINGS))


def test_a_key_that_is_wrong_is_an_error_even_where_rows_may_be_skipped():
    with serving(always=(401,)) as server, pytest.raises(InputError, match="HTTP 401"):
        list(engine(server).sample([Prompt(PROMPTS[0].messages, origin=RowOrigin("a", skips=True))], SETTINGS))


def test_a_server_is_asked_while_an_event_loop_runs_as_in_jupyter():
    async def cell(server):
        return by_place(engine(server).sample(PROMPTS, SETTINGS))

    with serving() as server:
        assert asyncio.run(cell(server)) == by_place(engine(server).sample(PROMPTS, SETTINGS))
