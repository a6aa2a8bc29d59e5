"""Thoughts, tool calls and tools: their text is what the templates of Qwen render of the structured messages."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from format_rows import chat, demonstration, sharegpt
from transformers.utils.chat_template_utils import render_jinja_template

from align.data.readers.native import native_row
from align.data.reading import read, stream
from align.records import Message

TEMPLATES = Path(find_spec("trl").origin).parent / "chat_templates"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in Zürich & elsewhere.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
OTHER = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, 2.5], "b": None}}}
AGENT = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "I will look.", "tool_calls": [CALL, OTHER]},
    {"role": "tool", "content": '{"sky": "blue"}'},
    {"role": "assistant", "content": "Fine."},
]
SILENT = [AGENT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, *AGENT[2:]]
THINKING = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "reasoning_content": "Look first.", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "reasoning_content": "It is blue.\nSo it is fine.", "content": "Fine."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def rendered(template, messages, tools=None):
    if not (TEMPLATES / template).is_file():
        pytest.skip(f"this version of TRL has no {template}")
    source = (TEMPLATES / template).read_text()
    return render_jinja_template([messages], tools=tools, chat_template=source)[0][0]


@pytest.mark.parametrize("template", ["qwen3.jinja", "qwen2_5.jinja"])
@pytest.mark.parametrize("dialogue", [AGENT, SILENT], ids=["with content", "without content"])
@pytest.mark.parametrize("tools", [None, [WEATHER], json.dumps([WEATHER])], ids=["no tools", "tools", "tools as JSON"])
def test_a_tool_call_is_the_text_that_qwen_renders(lines, template, dialogue, tools):
    messages = [SYSTEM, *dialogue]
    (record,) = read(lines({"messages": messages, "tools": tools})).records
    defined = None if tools is None else [WEATHER]
    assert rendered(template, native_row(record)["messages"]) == rendered(template, messages, defined)


@pytest.mark.parametrize("dialogue", [THINKING, [*chat("How is it?"), THINKING[-1]]], ids=["agent", "answer"])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
def test_a_thought_is_the_text_that_qwen_renders(lines, dialogue, tools):
    (record,) = read(lines({"messages": dialogue, "tools": tools})).records
    assert rendered("qwen3.jinja", native_row(record)["messages"]) == rendered("qwen3.jinja", dialogue, tools)


CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
FORMS = {
    "OpenAI": {"role": "assistant", "content": None, "tool_calls": [CALL]},
    "arguments as JSON": {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}],
    },
    "without function": {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Zürich"}}]},
    "as JSON": {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
    "the older function_call": {"role": "assistant", "content": None, "function_call": CALL["function"]},
    "ShareGPT": {"from": "function_call", "value": json.dumps(CALL["function"])},
    "a list in ShareGPT": {"from": "function_call", "value": json.dumps([CALL["function"]])},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_tool_call_becomes_the_same_text(lines, form):
    (record,) = read(lines({"messages": [*chat("ask"), FORMS[form]]})).records
    assert record == demonstration("ask", CALLED)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_every_name_of_a_thought_becomes_the_same_text(lines, field):
    turns = [*chat("ask"), {"role": "assistant", "content": "say", field: "hm"}]
    assert read(lines({"messages": turns})).records == [demonstration("ask", "<think>\nhm\n</think>\n\nsay")]


def test_a_thought_that_the_content_has_too_is_kept_once(lines):
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nsay", "reasoning_content": "hm"}
    assert read(lines({"messages": [*chat("ask"), answer]})).records == [demonstration("ask", answer["content"])]


def test_tools_that_the_system_message_has_are_not_repeated(lines):
    turns = sharegpt("=You may call <tools>\n{}\n</tools>", "ask", "say")
    (record,) = read(lines({"conversations": turns, "tools": json.dumps([WEATHER])})).records
    assert record == demonstration("=You may call <tools>\n{}\n</tools>", "ask", "say")


@pytest.mark.parametrize("tools", [None, [], "", "[]", ["search"], "a hammer"])
def test_a_column_without_definitions_of_tools_changes_no_message(lines, tools):
    found = stream(lines({"messages": chat("ask", "say"), "tools": tools}))
    (located,) = found.records
    assert located.record.messages == demonstration("ask", "say").messages
    assert set(found.statistics.unused_columns) == ({"tools"} if tools else set())


def test_tools_are_part_of_the_prompt_of_a_pair(lines):
    row = {"prompt": chat("ask"), "chosen": [FORMS["OpenAI"]], "rejected": chat("x", "bad")[1:], "tools": [WEATHER]}
    (record,) = read(lines(row)).records
    assert [message.role for message in record.prompt] == ["system", "user"] and "weather" in record.prompt[0].content
    assert [response.content for response in record.responses] == [CALLED, "bad"]


def test_fields_of_messages_that_are_not_read_are_counted(lines):
    turns = [*chat("ask"), FORMS["OpenAI"], {"role": "tool", "name": "weather", "content": {"sky": "blue"}}]
    found = stream(lines({"messages": [*turns, *chat("", "say")[1:]]}))
    (located,) = found.records
    assert located.record.messages[2] == Message("tool", '{"sky": "blue"}')
    assert found.statistics.unused_columns == {"messages.name": 1}
