"""Servers that drip, flood, lie or repeat what they should not: a failed request each, and no secret in any text."""

import gzip
import json
import time
import zlib
from contextlib import suppress

import pytest
from chat_server import serving
from test_openai_engine import PROMPTS, SETTINGS, engine

from align.config import build
from align.errors import InputError, RunError
from align.inference.requests import connection
from align.inference.requests.retries import parse_retry_after
from align.inference.settings import ServerSettings

KEY = "sk-0123456789abcdef"
CHOICE = {"message": {"content": "hello"}, "finish_reason": "stop"}
FLOOD = 40_000_000  # bytes, more than an answer may have


def body(value, *headers):
    """A server's step that says this with status 200."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda handler: handler.say(200, content, headers)


def drip(handler, *, in_headers):
    """Send a byte from time to time, for ever."""
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X: " if in_headers else b"Content-Length: 999999\r\n\r\n"))
        for _ in range(600):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    handler.close_connection = True


def flood(handler):
    """Send more than an answer may have, in chunks."""
    with suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(FLOOD // 1_000_000):
            handler.wfile.write(b"f4240\r\n" + b" " * 1_000_000 + b"\r\n")
        handler.wfile.write(b"0\r\n\r\n")
    handler.close_connection = True


def nested(depth):
    return b'{"choices": ' + b"[" * depth + b"]" * depth + b"}"


def chat(content=b'"hello"', usage=b"null"):
    return b'{"choices": [{"message": {"content": ' + content + b'}}], "usage": ' + usage + b"}"


BOMB = gzip.compress(chat(b'"' + b"a" * FLOOD + b'"'))
HOSTILE = {
    "a body that drips": (lambda handler: drip(handler, in_headers=False), "no complete answer in 1 s"),
    "headers that drip": (lambda handler: drip(handler, in_headers=True), "no complete answer in 1 s"),
    "a flood": (flood, "an answer of more than 32 MiB"),
    "a gzip bomb": (body(BOMB, ("Content-Encoding", "gzip")), "an answer of more than 32 MiB"),
    "a bomb in a bomb": (
        body(gzip.compress(BOMB), ("Content-Encoding", "gzip, gzip")),
        "content encoding 'gzip, gzip'",
    ),
    "a deflate bomb": (
        body(zlib.compress(chat(b'"' + b"a" * FLOOD + b'"')), ("Content-Encoding", "deflate")),
        "an answer of more than 32 MiB",
    ),
    "an encoding that was not asked for": (body(b"x", ("Content-Encoding", "br")), "content encoding 'br'"),
    "broken gzip": (body(b"no gzip", ("Content-Encoding", "gzip")), "not valid gzip"),
    "half a gzip": (body(gzip.compress(chat())[:-12], ("Content-Encoding", "gzip")), "body: "),
    "nothing": (body(b""), "body: "),
    "text": (body(b"It works!"), "body: .*It works!"),
    "a number": (body(7), "body: "),
    "a list": (body([1]), "body: "),
    "null": (body(None), "body: "),
    "deep JSON": (body(nested(100_000)), "body: |choices"),
    "no choices": (body({"usage": {}}), "choices: Field required"),
    "choices that are a mapping": (body({"choices": {"0": CHOICE}}), "choices: "),
    "a choice that is text": (body({"choices": ["hello"]}), "choices.0: "),
    "a message that is null": (body({"choices": [{"message": None}]}), "choices.0.message: "),
    "content that is a number": (body(chat(b"7")), "choices.0.message.content: "),
    "content that is a list": (body(chat(b'[{"type": "text", "text": "hello"}]')), "choices.0.message.content: "),
    "a lone surrogate": (body(chat(rb'"\ud800"')), "body: "),
    "bytes that are not UTF-8": (body(chat(b'"\xff"')), "body: |choices"),
    "usage that is a list": (body(chat(usage=b"[1]")), "usage: "),
    "usage that is text": (body(chat(usage=b'"many"')), "usage: "),
    "fewer than no tokens": (body(chat(usage=b'{"completion_tokens": -1}')), "usage.completion_tokens: "),
    "half a token": (body(chat(usage=b'{"completion_tokens": 1.5}')), "usage.completion_tokens: "),
    "not a number of tokens": (body(chat(usage=b'{"completion_tokens": NaN}')), "usage.completion_tokens: "),
    "very many tokens": (body(chat(usage=b'{"completion_tokens": ' + b"9" * 10_000 + b"}")), "body|completion_tokens"),
    "a finish reason that is a list": (
        body({"choices": [{"message": {"content": "a"}, "finish_reason": ["stop"]}]}),
        "choices.0.finish_reason: ",
    ),
    "a redirect in place of an answer": (body(b"<html>\x1b[2J</html>"), "body: .*<html></html>"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_malformed_answer_is_a_failed_request_in_one_line(what):
    step, said = HOSTILE[what]
    timeout_s = 1.0 if "drip" in what else 120.0
    began = time.monotonic()
    with serving(always=step) as server:
        asked = engine(server, timeout_s=timeout_s, retries=0, concurrency=1)
        with pytest.raises(RunError, match=f"a request failed 1 times, last with: .*(?:{said})") as caught:
            list(asked.sample(PROMPTS, SETTINGS))
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
    assert time.monotonic() - began < 100


@pytest.mark.parametrize("what", ["a gzip bomb", "usage that is a list", "a body that drips"])
def test_a_malformed_answer_is_retried(what):
    step, _ = HOSTILE[what]
    with serving([step]) as server:
        samples = list(engine(server, timeout_s=2.0 if "drip" in what else 120.0).sample(PROMPTS, SETTINGS))
    assert len(samples) == len(PROMPTS) * SETTINGS.num_responses


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_a_whole_compressed_answer_is_read(encoding):
    pack = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[encoding]
    step = body(pack(chat('"naïve 🙂"'.encode(), b'{"completion_tokens": 3}')), ("Content-Encoding", encoding))
    with serving(always=step) as server:
        (sample, *_) = engine(server, timeout_s=60.0).sample(PROMPTS[:1], SETTINGS)
    assert (sample.text, sample.num_tokens, sample.finish) == ("naïve 🙂", 3, "None")


def test_an_answer_of_the_largest_size_is_read(monkeypatch):
    content = chat(b'"' + b"a" * 1000 + b'"')
    monkeypatch.setattr(connection, "MAX_BODY_BYTES", len(content))
    with serving(always=body(content)) as server:
        assert len(next(iter(engine(server, timeout_s=60.0).sample(PROMPTS[:1], SETTINGS))).text) == 1000
    with serving(always=body(content + b" ")) as server, pytest.raises(RunError, match="an answer of more than"):
        list(engine(server, timeout_s=60.0, retries=0).sample(PROMPTS[:1], SETTINGS))


@pytest.mark.parametrize(
    "header", ["nan", "inf", "-1", "1e999", "soon", "Mon, 99 Foo", "Fri, 31 Dec 99999 23:59:59 GMT"]
)
def test_a_strange_retry_after_is_no_time_or_one_that_can_be_waited_for(header):
    found = parse_retry_after(header)
    assert found is None or found >= 0


def echo(handler):
    handler.say(500, {"error": f"the key {handler.headers['Authorization']} is unknown\x1b]0;title\x07\x1b[31m"})


@pytest.mark.parametrize("padding", ["", "\n", "\r\n", " "])
def test_a_key_is_stripped_and_never_shown(monkeypatch, padding):
    monkeypatch.setenv("KEY_OF_A_TEST", KEY + padding)
    with serving(key=KEY) as server:
        asked = engine(server, api_key_env="KEY_OF_A_TEST", retries=0, timeout_s=60.0)
        server.always = echo
        with pytest.raises(RunError, match=r"HTTP 500: .*Bearer \*\*\* is unknown") as caught:
            list(asked.sample(PROMPTS, SETTINGS))
        assert KEY not in str(caught.value) and "\x1b" not in str(caught.value)
        server.always = lambda handler: handler.say(400, {"error": handler.headers["Authorization"]})
        with pytest.raises(InputError, match=r"HTTP 400: .*Bearer \*\*\*") as caught:
            list(asked.sample(PROMPTS, SETTINGS))
        assert KEY not in str(caught.value)
        server.always = body(chat(json.dumps(f"Your key is {KEY}.").encode()))
        assert {sample.text for sample in asked.sample(PROMPTS, SETTINGS)} == {"Your key is ***."}


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}\x07-", f"{KEY}é"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("KEY_OF_A_TEST", key)
    with pytest.raises(InputError, match=r"the key in \$KEY_OF_A_TEST contains a line break") as caught:
        engine("http://127.0.0.1:9/v1", api_key_env="KEY_OF_A_TEST")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://user:hunter22@host/v1", "https://hunter22@host/v1", "http://host/v1?key=hunter22", "http://h/#hunter22"],
)
def test_a_url_with_a_password_or_query_is_refused_and_not_shown(url):
    with pytest.raises(
        InputError, match="base_url: a URL ends in /v1, without a user name, password or query"
    ) as caught:
        build(ServerSettings, {"base_url": url})
    assert "hunter22" not in str(caught.value)
    assert isinstance(build(ServerSettings, {"base_url": "http://host:8000/v1"}), ServerSettings)
