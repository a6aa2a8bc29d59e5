"""Tools through chat templates: sampling and training see the same tokens, and nothing is lost."""

import json
import re
from dataclasses import replace

import pytest
from chat_styles import STYLES, make_tokenizer
from tool_templates import DEEPSEEK, HERMES, MISTRAL, TOOL_TEMPLATES, tool_tokenizer

from align.data.chat_encoder import ChatEncoder
from align.errors import InputError
from align.records import Comparison, Demonstration, Message, Response, ToolCall

TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "The weather in Zürich & elsewhere.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}},
        },
    }
    for name in ("weather", "climate")
)
USER = Message("user", "How is it?")


def call(**arguments):
    return ToolCall("weather", json.dumps(arguments, ensure_ascii=False))


AGENT = (USER, Message("assistant", "", (call(city="Zürich"),)), Message("tool", "blue"), Message("assistant", "Fine."))
LONGER = (*AGENT, Message("user", "And now?"), Message("assistant", "", (call(city="Bern", days=3),)))
NESTED = (USER, Message("assistant", "", (call(city={"name": "a", "of": ["b", None]}),)))
EMPTY = (USER, Message("assistant", "", (call(),)))
TWO = (USER, Message("assistant", "", (call(city="a"), call(city="b"))), Message("tool", "x"), Message("tool", "y"))
DIALOGUES = {"agent": AGENT, "longer": LONGER, "nested": NESTED, "empty": EMPTY, "two": (*TWO, AGENT[-1])}
ONE_CALL = ("llama3_1", "llama3_2", "gptoss")  # templates that refuse or drop a second call in a message


def transformers_text(tokenizer, encoder, messages, **settings):
    """Return what transformers renders of the messages, in the form that the template takes calls in."""
    chat = encoder._renderer._template.chat(messages, TOOLS)
    return tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False, **settings)


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_what_the_assistant_writes_is_trained_and_nothing_else(name, dialogue):
    """The trained text runs from the end of each prompt that transformers renders to the end of the turn."""
    source, end_of_call, end_of_answer = TOOL_TEMPLATES[name]
    messages = DIALOGUES[dialogue]
    tokenizer = tool_tokenizer(source)
    encoder = ChatEncoder(tokenizer)
    if dialogue == "two" and name in ONE_CALL:
        with pytest.raises(InputError, match="leaves out a tool call|only supports single tool-calls"):
            encoder.encode(Demonstration(messages, tools=TOOLS), 0)
        return
    sequence = encoder.encode(Demonstration(messages, tools=TOOLS), 0).sequences[0]
    whole = transformers_text(tokenizer, encoder, messages)
    expected = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = transformers_text(tokenizer, encoder, messages[:index], add_generation_prompt=True)
        ids = encoder.prompt_ids(messages[:index], 0, TOOLS).tolist()
        assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert sequence.ids[: len(ids)].tolist() == ids and sequence.loss_mask[len(ids)]
        assert whole.startswith(prompt)
        answer, is_last = whole[len(prompt) :], message is messages[-1]
        ends = {"call": end_of_call, "answer": end_of_answer}
        if is_last and name == "glm4moe":
            expected += answer.rstrip() + "</s>"
            continue
        end = ends["call" if message.tool_calls else "answer"]
        if not message.tool_calls and not is_last:
            end = {"gptoss": "<|end|>", "glm4moe": "<|user|>"}.get(name, end)
        expected += answer[: answer.index(end) + len(end)]
    trained = tokenizer.decode(sequence.ids[sequence.loss_mask])
    assert trained == expected
    assert all(text not in trained for text in ("blue", "How is it", "And now", "climate", "elsewhere"))


def test_the_property_covers_the_templates_of_many_families():
    assert {"qwen2_5", "qwen3", "llama3_1", "mistral", "hermes", "deepseek"} <= TOOL_TEMPLATES.keys()
    assert len(TOOL_TEMPLATES) >= 10


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_responses_that_call_tools_are_encoded_as_in_a_dialogue(name):
    encoder = ChatEncoder(tool_tokenizer(TOOL_TEMPLATES[name][0]))
    responses = (Response("Fine.", 1.0), Response("", 0.0, tool_calls=(call(city="Bern"),)))
    group = encoder.encode(Comparison(AGENT[:3], responses, tools=TOOLS), 0)
    prompt = encoder.prompt_ids(AGENT[:3], 0, TOOLS).tolist()
    for sequence, response in zip(group.sequences, responses, strict=True):
        alone = encoder.encode(Demonstration((*AGENT[:3], response.message), tools=TOOLS), 0).sequences[0]
        assert sequence.ids.tolist() == alone.ids.tolist()
        assert sequence.ids[: len(prompt)].tolist() == prompt
        assert not sequence.loss_mask[: len(prompt)].any() and sequence.loss_mask[len(prompt) :].all()


CALLS_ONLY = AGENT[:2]
RESULT_ONLY = (USER, Message("tool", "blue"), Message("assistant", "Fine."))


@pytest.mark.parametrize("name", STYLES)
def test_a_template_without_tools_drops_no_row_in_silence(name):
    tokenizer = make_tokenizer("gpt2", STYLES[name][0], adds_bos=False)
    for record in (
        Demonstration((USER, Message("assistant", "Fine.")), tools=TOOLS),
        Demonstration(CALLS_ONLY),
        Comparison((USER,), (Response("Fine."), Response("", tool_calls=(call(),))), chosen=0),
    ):
        with pytest.raises(InputError, match="row 1: the chat template") as caught:
            ChatEncoder(tokenizer).encode(record, 0)
        assert "\n" not in str(caught.value)
        skipping = ChatEncoder(tokenizer, on_error="skip")
        assert skipping.encode(record, 0) is None
        assert sum(count for reason, count in skipping.counts.items() if reason.startswith("dropped:")) == 1
    with pytest.raises(InputError, match="the chat template"):
        ChatEncoder(tokenizer).prompt_ids((USER,), 0, TOOLS)
    plain = ChatEncoder(tokenizer).encode(Demonstration((USER, Message("assistant", "Fine."))), 0)
    assert plain.sequences[0].loss_mask.any()


LOSSES = {  # what a template leaves out -> the part that is cut from it, and its replacement
    "a tool of": ("{{ t | tojson + '\\n' }}", "{{ t | tojson + '\\n' if loop.first else '' }}"),
    "a tool call of": ("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
    "a result of a tool of": ("'<tool_response>\\n' + m.content", "'<tool_response>\\n'"),
}


@pytest.mark.parametrize("lost", LOSSES)
def test_a_template_that_writes_only_a_part_of_the_tools_is_refused(lost):
    source = HERMES.replace(*LOSSES[lost])
    assert source != HERMES
    record = Demonstration((*TWO, AGENT[-1]), tools=TOOLS)
    assert ChatEncoder(tool_tokenizer(HERMES)).encode(record, 0) is not None
    with pytest.raises(InputError, match=f"the chat template leaves out {lost}"):
        ChatEncoder(tool_tokenizer(source)).encode(record, 0)


def test_content_that_a_template_drops_beside_a_call_is_an_error():
    if "llama3_1" not in TOOL_TEMPLATES:
        pytest.skip("this version of TRL has no llama3_1.jinja")
    encoder = ChatEncoder(tool_tokenizer(TOOL_TEMPLATES["llama3_1"][0]))
    row = Demonstration((USER, Message("assistant", "I look.", (call(),))), tools=TOOLS)
    with pytest.raises(InputError, match="alters an assistant message"):
        encoder.encode(row, 0)


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek"])
def test_special_tokens_in_tools_calls_and_results_are_text(name):
    source, end, _ = TOOL_TEMPLATES[name]
    tokenizer = tool_tokenizer(source)
    encoder = ChatEncoder(tokenizer)

    def num_ends(text):
        tool = json.loads(json.dumps(TOOLS[0]).replace("elsewhere", text))
        messages = (USER, Message("assistant", "", (call(city=text),)), Message("tool", f"1{text}"), AGENT[-1])
        sequence = encoder.encode(Demonstration(messages, tools=(tool,)), 0).sequences[0]
        decoded = tokenizer.decode(sequence.ids)
        assert decoded.count(text) >= 3
        trained = tokenizer.decode(sequence.ids[sequence.loss_mask])
        assert trained.count(text) == 1 + 2 * (text == end)
        return (sequence.ids == tokenizer.convert_tokens_to_ids(end)).sum()

    assert num_ends(end) == num_ends("harmless") > 1
    assert encoder.counts["special tokens in content"] == 1


def test_calls_without_ids_get_ids_that_their_results_name():
    tokenizer = tool_tokenizer(MISTRAL)
    encoder = ChatEncoder(tokenizer)
    text = tokenizer.decode(encoder.encode(Demonstration((*TWO, AGENT[-1]), tools=TOOLS), 0).sequences[0].ids)
    ids = re.findall(r'"id": "(\w{9})"', text)
    assert len(set(ids)) == 2
    assert re.findall(r'"call_id": "(\w+)"', text) == ids
    given = replace(TWO[1], tool_calls=(call(city="a"), replace(call(city="b"), id="abcdefghi")))
    swapped = (USER, given, Message("tool", "y", tool_call_id="abcdefghi"), Message("tool", "x"), AGENT[-1])
    text = tokenizer.decode(encoder.encode(Demonstration(swapped, tools=TOOLS), 0).sequences[0].ids)
    assert re.findall(r'"call_id": "(\w+)"', text) == ["abcdefghi", ids[0]]
    wrong = replace(given, tool_calls=(replace(call(), id="short"),))
    with pytest.raises(InputError, match="length 9"):
        encoder.encode(Demonstration((USER, wrong), tools=TOOLS), 0)


def test_arguments_are_json_where_a_template_takes_a_string():
    tokenizer = tool_tokenizer(DEEPSEEK)
    sequence = ChatEncoder(tokenizer).encode(Demonstration(NESTED, tools=TOOLS), 0).sequences[0]
    text = tokenizer.decode(sequence.ids[sequence.loss_mask])
    found = text.partition("<｜tool▁sep｜>")[2].partition("<｜tool▁call▁end｜>")[0]
    assert json.loads(found) == {"city": {"name": "a", "of": ["b", None]}}


def test_calls_are_found_where_a_template_writes_them_for_messages_without_content_only():
    source = DEEPSEEK.replace("elif m.tool_calls %}", "elif m.content is none %}").replace(
        "+ m.content + '<｜tool▁calls", "+ '<｜tool▁calls"
    )
    tokenizer = tool_tokenizer(source)
    sequence = ChatEncoder(tokenizer).encode(Demonstration(CALLS_ONLY, tools=TOOLS), 0).sequences[0]
    assert '<｜tool▁sep｜>{"city": "Zürich"}<｜tool▁call▁end｜>' in tokenizer.decode(sequence.ids[sequence.loss_mask])


def test_a_call_follows_the_thought_that_the_generation_prompt_opens():
    opened = "<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    source = HERMES.replace("<|im_start|>assistant\\n' }}{% endif %}", opened)
    assert source != HERMES
    tokenizer = tool_tokenizer(source)
    answer = Message("assistant", "<think>\nso\n</think>\n\nI look.", (call(city="Bern"),))
    encoder = ChatEncoder(tokenizer)
    sequence = encoder.encode(Demonstration((USER, answer), tools=TOOLS), 0).sequences[0]
    prompt = encoder.prompt_ids((USER,), 0, TOOLS)
    assert sequence.ids[: len(prompt)].tolist() == prompt.tolist()
    assert tokenizer.decode(sequence.ids[len(prompt) :]) == (
        "so\n</think>\n\nI look.\n<tool_call>\n"
        '{"arguments": {"city": "Bern"}, "name": "weather"}\n</tool_call><|im_end|>'
    )


def test_a_cut_message_with_tool_calls_is_dropped_and_counted():
    encoder = ChatEncoder(tool_tokenizer(HERMES), on_error="skip")
    assert encoder.encode(Demonstration(CALLS_ONLY, finish="length", tools=TOOLS), 0) is None
    assert encoder.counts["dropped:a message with tool calls was cut off, and a tool call ends with its message"] == 1


@pytest.mark.parametrize("part", ["tools", "arguments", "result"])
def test_the_characters_of_tools_calls_and_results_count(part):
    """A row with more than a million characters is overlong before it is rendered."""
    long = "x" * 1_000_001
    tools = ({"type": "function", "function": {"name": "f", "description": long}},) if part == "tools" else ()
    arguments = call(city=long if part == "arguments" else "a")
    messages = (USER, Message("assistant", "", (arguments,)), Message("tool", long if part == "result" else "b"))
    encoder = ChatEncoder(tool_tokenizer(HERMES), max_length=64)
    assert encoder.encode(Demonstration((*messages, AGENT[-1]), tools=tools), 0) is None
    assert encoder.counts["dropped:overlong"] == 1


def test_marks_of_calls_in_a_sampled_text_stay_special_tokens():
    tokenizer = tool_tokenizer(MISTRAL)
    said = '[TOOL_CALLS] [{"name": "weather", "arguments": {}}]'
    record = Comparison((Message("user", said),), (Response(said), Response("no")))
    sequence = ChatEncoder(tokenizer).encode(record, 0).sequences[0]
    mark = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert (sequence.ids == mark).sum() == (sequence.ids[sequence.loss_mask] == mark).sum() == 1
