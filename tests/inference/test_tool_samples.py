"""Prompts with tools, sampled by a server and in this process."""

import json

import pytest
import torch
from chat_server import serving
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.chat_encoder import ChatEncoder
from align.data.tokenizer import train_tokenizer
from align.distributed.journal import Journal
from align.errors import InputError
from align.inference.openai_engine import OpenAIEngine
from align.inference.samples import journal_samples, prompt_key, respond, sample_with_journal
from align.inference.settings import SamplingSettings, ServerSettings
from align.inference.transformers_engine import TransformersEngine
from align.records import Message, Prompt, ToolCall

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
USER = Message("user", "How is it?")
CALLING = Message("assistant", "", (ToolCall("weather", '{"city": "Zürich"}'), ToolCall("weather", "{}", "second")))
RESULTS = (Message("tool", "blue", name="weather"), Message("tool", "grey"))
ASKED = Prompt((USER, CALLING, *RESULTS), tools=(WEATHER,))
SETTINGS = SamplingSettings(max_new_tokens=8)


def engine(server):
    return OpenAIEngine("m", ServerSettings(base_url=server.url, retries=0, concurrency=1), name="m")


def saying(message, finish="tool_calls"):
    """A step of the server that answers with this message."""
    return lambda handler: handler.say(200, {"choices": [{"message": message, "finish_reason": finish}]})


def test_a_server_is_sent_tools_calls_and_results_in_openais_form():
    with serving() as server:
        list(respond(engine(server), [ASKED, Prompt((USER,))], SETTINGS))
    by_length = {len(request["messages"]): request for request in server.requests}
    request = by_length[4]
    assert request["tools"] == [WEATHER] and "tools" not in by_length[1]
    asked, calling, *results = request["messages"]
    assert asked == {"role": "user", "content": "How is it?"} == by_length[1]["messages"][0]
    assert calling["content"] is None and calling["role"] == "assistant"
    functions = [call["function"] for call in calling["tool_calls"]]
    assert [json.loads(function["arguments"]) for function in functions] == [{"city": "Zürich"}, {}]
    ids = [call["id"] for call in calling["tool_calls"]]
    assert ids[1] == "second" and ids[0]
    assert results == [
        {"role": "tool", "content": text, "tool_call_id": call_id}
        for text, call_id in zip(("blue", "grey"), ids, strict=True)
    ]


CALLS = [{"id": "chatcmpl-1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Zürich"}'}}]
FOUND = (ToolCall("weather", '{"city": "Zürich"}'),)


@pytest.mark.parametrize("content", [None, "I look."])
def test_the_tool_calls_of_a_server_are_those_of_the_response(tmp_path, content):
    with (
        serving([saying({"content": content, "tool_calls": CALLS})]) as server,
        Journal(tmp_path / "samples", {}) as journal,
    ):
        (sample,) = sample_with_journal(engine(server), [ASKED], SETTINGS, journal)
        assert (sample.text, sample.tool_calls, sample.finish) == (content or "", FOUND, "tool_calls")
    with Journal(tmp_path / "samples", {}) as journal:
        assert journal_samples(journal, "m", [ASKED]) == [sample]


@pytest.mark.parametrize("arguments", ['{"city": ', "[1]", '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_a_malformed_call_of_a_server_is_an_empty_response(arguments):
    calls = [{"function": {"name": "weather", "arguments": arguments}}]
    with serving([saying({"content": "I look.", "tool_calls": calls})]) as server:
        (sample,) = respond(engine(server), [ASKED], SETTINGS)
    assert (sample.text, sample.tool_calls, sample.finish) == ("", (), "malformed tool call")


def test_a_response_that_is_cut_off_behind_a_call_is_empty():
    with serving([saying({"content": "I look.", "tool_calls": CALLS}, "length")]) as server:
        (sample,) = respond(engine(server), [ASKED], SETTINGS)
    assert (sample.text, sample.tool_calls, sample.finish) == ("", (), "length")


def test_keys_of_prompts_and_samples_without_tools_have_not_changed():
    """The keys of earlier journals, groups and seeds: a hash of roles and contents."""
    assert prompt_key(Prompt((Message("user", "Hello."),))) == "69dc22fd28d80aeb"
    with serving() as server:
        (sample,) = respond(engine(server), [Prompt((USER,))], SETTINGS)
    assert list(sample.to_json()) == ["key", "number", "policy", "text", "num_tokens", "finish", "seed"]


def test_keys_depend_on_tools_calls_and_results():
    changed = [
        ASKED,
        Prompt(ASKED.messages),
        Prompt(ASKED.messages, tools=(WEATHER, WEATHER)),
        Prompt((USER, Message("assistant", "", CALLING.tool_calls[:1]), *RESULTS), tools=(WEATHER,)),
        Prompt((USER, CALLING, Message("tool", "blue"), RESULTS[1]), tools=(WEATHER,)),
    ]
    assert len({prompt_key(prompt) for prompt in changed}) == len(changed)
    assert prompt_key(Prompt(ASKED.messages, {"id": 1}, (dict(WEATHER),))) == prompt_key(ASKED)


TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.role + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
)


def local_engine(template):
    tokenizer = train_tokenizer(["a b"], vocab_size=259, chat_template=template)
    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=259
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return TransformersEngine(model, tokenizer, name="tiny"), tokenizer


def test_a_local_policy_is_asked_with_the_tokens_that_training_sees():
    local, tokenizer = local_engine(TEMPLATE)
    (sample,) = respond(local, [ASKED], SETTINGS)
    prompt = ChatEncoder(tokenizer).prompt_ids(ASKED.messages, 0, ASKED.tools)
    assert json.dumps(WEATHER) in tokenizer.decode(prompt)
    assert local.throughput.processed_tokens == len(prompt) + sample.num_tokens


def test_a_local_policy_whose_template_ignores_tools_is_not_asked():
    local, _ = local_engine("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="row 1: the chat template leaves out a tool of the row"):
        list(respond(local, [ASKED], SETTINGS))
