"""How many requests are sent at a time, to a server that has room for fewer, and what they cost."""

import threading
import time

import pytest
from chat_server import serving

from align.errors import InputError
from align.inference.openai_engine import OpenAIEngine
from align.inference.requests.concurrency import ConcurrencyLimit
from align.inference.requests.retries import TransientError
from align.inference.samples import Throughput
from align.inference.settings import PriceSettings, SamplingSettings, ServerSettings
from align.records import Message, Prompt

PROMPTS = [Prompt((Message("user", f"question {number}"),)) for number in range(40)]


def overload():
    return TransientError("HTTP 429: busy", is_overload=True)


def test_an_overload_halves_the_limit_once_for_all_requests_that_were_under_way():
    limit, stopped = ConcurrencyLimit(16), threading.Event()
    inside, leave = threading.Barrier(9), threading.Event()

    def ask():
        with pytest.raises(TransientError), limit.slot(stopped):
            inside.wait()
            leave.wait()
            raise overload()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for each in threads:
        each.start()
    inside.wait()
    leave.set()
    for each in threads:
        each.join()
    assert limit.limit == 8
    with pytest.raises(TransientError), limit.slot(stopped):
        raise overload()
    assert limit.limit == 4
    with pytest.raises(TransientError), limit.slot(stopped):
        raise TransientError("HTTP 500")
    assert limit.limit == 4


def test_the_limit_grows_by_about_one_in_each_round_of_answers_up_to_the_most():
    limit, stopped = ConcurrencyLimit(8), threading.Event()
    for _ in range(5):
        with pytest.raises(TransientError), limit.slot(stopped):
            raise overload()
    assert limit.limit == 1
    answers = 0
    while limit.limit < 8:
        with limit.slot(stopped):
            answers += 1
    assert sum(range(1, 8)) <= answers <= sum(range(1, 9)) + 1  # 1 + 2 + … + 7 answers, a little more as 1/L falls
    with limit.slot(stopped):
        pass
    assert limit.limit == 8


def test_no_more_requests_are_under_way_than_the_limit():
    limit, stopped, lock = ConcurrencyLimit(3), threading.Event(), threading.Lock()
    active, most = 0, 0

    def ask():
        nonlocal active, most
        for _ in range(10):
            with limit.slot(stopped):
                with lock:
                    active += 1
                    most = max(most, active)
                time.sleep(0.001)
                with lock:
                    active -= 1

    threads = [threading.Thread(target=ask) for _ in range(9)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert most == 3


def test_a_stopped_engine_sends_nothing_more():
    limit, stopped = ConcurrencyLimit(1), threading.Event()
    stopped.set()
    with pytest.raises(TransientError, match="stopped"), limit.slot(stopped):
        pytest.fail("sent")


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_with_little_room_is_asked_less_and_every_sample_arrives(status):
    room = 4

    def answer(handler):
        server = handler.server
        if server.under_way > room:
            handler.say(status, {"error": "too many requests"}, [("Retry-After", "0.01")])
        else:
            time.sleep(0.02)
            handler.say(200, {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]})

    with serving(always=answer) as server:
        settings = ServerSettings(base_url=server.url, concurrency=32, retries=50)
        engine = OpenAIEngine("m", settings, name="m")
        found = list(engine.sample(PROMPTS, SamplingSettings(num_responses=5)))
    refused = len(server.requests) - len(found)
    assert len(found) == 200
    # 32 at once are refused 28 times; afterwards the limit stays near the room. Without it nearly every try is refused.
    assert refused < 120
    assert engine._client.limit.limit < 3 * room


def answer_with_usage(handler):
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}
    handler.say(200, {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}], "usage": usage})


def test_the_cost_is_that_of_the_tokens_of_all_answers():
    price = PriceSettings(prompt=0.5, response=2.0)
    with serving(always=answer_with_usage) as server:
        engine = OpenAIEngine("m", ServerSettings(base_url=server.url, price=price), name="m")
        list(engine.sample(PROMPTS, SamplingSettings()))
    assert engine.throughput.cost == pytest.approx(40 * (1000 * 0.5 + 50 * 2.0) / 1e6)
    shown = engine.throughput.metrics()
    assert shown["requests_per_s"] == pytest.approx(40 / engine.throughput.seconds)
    assert shown["tokens_per_s"] == pytest.approx(40 * 50 / engine.throughput.seconds)
    assert shown["cost"] == engine.throughput.cost


def test_a_price_needs_numbers_of_tokens_and_without_a_price_there_is_no_cost():
    with serving(["ok"], always=answer_with_usage) as server:  # the first answer says no prompt_tokens
        priced = ServerSettings(base_url=server.url, price=PriceSettings(prompt=0.5), concurrency=1)
        with pytest.raises(InputError, match="reports no numbers of tokens, so the cost is unknown: leave price out"):
            list(OpenAIEngine("m", priced, name="m").sample(PROMPTS[:3], SamplingSettings()))
        engine = OpenAIEngine("m", ServerSettings(base_url=server.url), name="m")
        list(engine.sample(PROMPTS[:3], SamplingSettings()))
    assert "cost" not in engine.throughput.metrics()


def test_costs_and_requests_of_processes_add_up():
    one, two = Throughput(requests=3, cost=0.5), Throughput(requests=4, cost=0.25)
    assert (one.merge(two).requests, one.merge(two).cost) == (7, 0.75)


def engine(server, model, name, **settings):
    return OpenAIEngine(model, ServerSettings(base_url=server.url, **settings), name=name)


@pytest.mark.parametrize(
    ("listed", "settings", "sent"),
    [
        (["rpo-1"], {}, "rpo-1"),
        (["FOLDER", "x"], {}, "FOLDER"),
        (["there", "rpo-1"], {"models": {"rpo-1": "there"}}, "there"),
        (["rpo-1"], {"models": {"other": "there"}}, "rpo-1"),
    ],
)
def test_a_policy_is_asked_for_by_a_name_that_the_server_lists(tmp_path, listed, settings, sent):
    names = [name.replace("FOLDER", str(tmp_path)) for name in listed]
    with serving(models=names) as server:
        list(engine(server, str(tmp_path), "rpo-1", **settings).sample(PROMPTS[:1], SamplingSettings()))
        assert server.requests[0]["model"] == sent.replace("FOLDER", str(tmp_path))


@pytest.mark.parametrize(
    ("listed", "settings", "said"),
    [
        (["a", "b"], {}, r"lists 'a', 'b', not 'rpo-1': start the server with this name, or .*models: \{rpo-1: NAME\}"),
        ([], {}, "lists no model, not 'rpo-1'"),
        (list("abcdefgh"), {}, "lists 'a', 'b', 'c', 'd', 'e' and 3 more, not 'rpo-1'"),
        (["rpo-1"], {"models": {"rpo-1": "there"}}, "lists 'rpo-1', not 'there'"),
        (None, {}, "lists no models, so it is not known whether the server has 'rpo-1'"),
    ],
)
def test_a_name_that_the_server_does_not_list_is_never_sampled(tmp_path, listed, settings, said):
    with serving(models=listed) as server:
        with pytest.raises(InputError, match=said):
            engine(server, str(tmp_path), "rpo-1", **settings)
        assert server.requests == []


def test_a_server_without_a_list_is_trusted_for_a_name_that_was_given(tmp_path):
    with serving() as server:
        for model, name, settings in (("m", "m", {}), (str(tmp_path), "rpo-1", {"models": {"rpo-1": "there"}})):
            list(engine(server, model, name, **settings).sample(PROMPTS[:1], SamplingSettings()))
        assert [request["model"] for request in server.requests] == ["m", "there"]


def test_servers_on_this_machine_are_reached_without_the_proxy_of_the_environment(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with serving() as server:
        assert len(list(engine(server, "m", "m").sample(PROMPTS[:2], SamplingSettings()))) == 2
