"""Rows with thoughts, tool calls and tools, in the forms of data sets."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest
from format_rows import chat, demonstration, sharegpt, talk
from pyarrow import ipc, parquet
from transformers.utils.chat_template_utils import render_jinja_template

from align.data.readers.native import native_row
from align.data.reading import read, stream
from align.data.writing import write
from align.errors import InputError
from align.records import Comparison, Demonstration, Message, Prompt, Response, ToolCall

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
def test_a_row_that_is_read_and_written_is_rendered_as_it_was(lines, template, dialogue, tools):
    messages = [SYSTEM, *dialogue]
    (record,) = read(lines({"messages": messages, "tools": tools})).records
    row, defined = native_row(record), None if tools is None else [WEATHER]
    assert row.get("tools") == defined
    assert rendered(template, row["messages"], defined) == rendered(template, messages, defined)


@pytest.mark.parametrize("dialogue", [THINKING, [*chat("How is it?"), THINKING[-1]]], ids=["agent", "answer"])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
def test_a_thought_is_the_text_that_qwen_renders(lines, dialogue, tools):
    (record,) = read(lines({"messages": dialogue, "tools": tools})).records
    assert rendered("qwen3.jinja", native_row(record)["messages"], tools) == rendered("qwen3.jinja", dialogue, tools)


CALLED = ToolCall("weather", '{"city": "Zürich"}')
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
    "LangChain": {
        "role": "assistant",
        "tool_calls": [{"name": "weather", "args": {"city": "Zürich"}, "id": "1", "type": "tool_call"}],
    },
    "Anthropic": {
        "role": "assistant",
        "tool_calls": [{"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Zürich"}}],
    },
    "columns of other calls": {
        "role": "assistant",
        "tool_calls": [{"name": "weather", "arguments": None, "parameters": {"city": "Zürich"}, "kwargs": None}],
    },
    "a list in ShareGPT": {"from": "function_call", "value": json.dumps([CALL["function"]])},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_tool_call_is_read_alike(lines, form):
    (record,) = read(lines({"messages": [*chat("ask"), FORMS[form]]})).records
    (call,) = record.messages[1].tool_calls
    has_id = form in ("OpenAI", "as JSON", "LangChain", "Anthropic")
    assert replace(call, id=None) == CALLED and call.id == ("1" if has_id else None)
    assert record.messages[1].content == ""


BROKEN = {
    "no JSON": ({"function": {"name": "weather", "arguments": '{"city": '}}, "which is not JSON"),
    "a repeated key": ({"name": "weather", "arguments": '{"city": 1, "city": 2}'}, "the key 'city' occurs twice"),
    "a list": ({"name": "weather", "arguments": "[1]"}, "an object with named fields is needed"),
    "NaN": ({"name": "weather", "arguments": '{"city": NaN}'}, "city is nan"),
    "no name": ({"function": {"arguments": "{}"}}, "a tool call has the name None"),
    "an empty name": ({"name": " ", "arguments": {}}, "a tool call has no name"),
    "an unknown key": ({"name": "weather", "kwargs": {"city": 1}}, "'kwargs' and no arguments, param.* or input"),
    "an unknown key beside the function": ({"function": {"name": "weather"}, "kwargs": {"city": 1}}, "has 'kwargs'"),
    "arguments twice": ({"name": "weather", "arguments": {}, "input": {"city": 1}}, "arguments and input; keep one"),
    "an unpaired surrogate": ({"name": "weather", "arguments": '{"city": "\\ud800"}'}, "unpaired surrogate"),
    "deep nesting": ({"name": "weather", "arguments": '{"a":' * 3000 + "1" + "}" * 3000}, "which is not JSON"),
}


@pytest.mark.parametrize("form", BROKEN)
def test_a_malformed_tool_call_is_an_error_of_its_row(lines, form):
    call, reason = BROKEN[form]
    good = {"messages": chat("ask", "say")}
    path = lines(good, {"messages": [*chat("ask"), {"role": "assistant", "tool_calls": [call]}]})
    with pytest.raises(InputError, match=f"row 2: .*{reason}") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    reading = read(path, on_error="skip")
    assert reading.records == [demonstration("ask", "say")] and sum(reading.dropped.values()) == 1


@pytest.mark.parametrize("tools", ['[{"name": "weather"', [{"type": "function", "function": {}}], [{"name": 3}]])
def test_a_malformed_definition_of_a_tool_is_an_error_of_its_row(lines, tools):
    with pytest.raises(InputError, match="row 1: .*tool"):
        read(lines({"messages": chat("ask", "say"), "tools": tools}))


@pytest.mark.parametrize("start", ["[", "[ ", "[\t", " [\r\n"])
@pytest.mark.parametrize("as_texts", [False, True])
def test_tools_are_read_from_json_with_any_space(lines, start, as_texts):
    inside = json.dumps(json.dumps(WEATHER)) if as_texts else json.dumps(WEATHER)
    (record,) = read(lines({"messages": chat("ask", "say"), "tools": f"{start}{inside}]"})).records
    assert record.tools == (WEATHER,)


GLAIVE = {"system": "SYSTEM: Help.", "chat": "USER: ask\n\n\nASSISTANT: say <|endoftext|>"}


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("chat", "Hello", "chat begins with"),
        ("chat", 'USER: ask\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{"x": \'}', "not JSON"),
        ("chat", "USER: ask\n\n\nASSISTANT: <functioncall> f(x) <|endoftext|>", "not JSON"),
        ("system", 'SYSTEM: Use these -\n{"name": "f"', "not JSON"),
    ],
)
def test_a_malformed_row_of_glaive_is_counted(lines, column, value, reason):
    path = lines(GLAIVE, {**GLAIVE, column: value})
    with pytest.raises(InputError, match=f"row 2: .*{reason}"):
        read(path)
    reading = read(path, on_error="skip")
    assert reading.records == [demonstration("=Help.", "ask", "say")] and sum(reading.dropped.values()) == 1


RESULT = Message("tool", '{"sky": "blue"}', name="weather", tool_call_id="1")
CALLING = Message("assistant", "I look.", (CALLED, ToolCall("add", '{"a": [1, 2.5], "b": null}', "2")))


@pytest.mark.parametrize(
    "record",
    [
        Demonstration((*talk("ask"), CALLING, RESULT, Message("assistant", "Fine.")), {"a": 1}, "stop", (WEATHER,)),
        Prompt((*talk("ask"), CALLING, RESULT), {}, (WEATHER,)),
        Comparison(
            (*talk("ask"), CALLING, RESULT),
            (Response("Fine.", 1.0), Response("", 0.0, finish="stop", tool_calls=(CALLED,))),
            tools=(WEATHER,),
        ),
    ],
)
def test_records_with_tools_are_read_back_as_they_were_written(tmp_path, record):
    write(tmp_path / "rows.jsonl", [record])
    assert read(str(tmp_path / "rows.jsonl")).records == [record]


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
    assert record.prompt == talk("ask") and record.tools == (WEATHER,)
    assert [response.content for response in record.responses] == ["", "bad"]
    assert record.responses[0].tool_calls == (replace(CALLED, id="1"),)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_add_no_nulls_to_tools_and_calls(tmp_path, suffix):
    """Arrow gives every object the fields of all rows."""
    tools = [[WEATHER], [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]]
    calls = [ToolCall("weather", '{"city": "Zürich"}'), ToolCall("add", '{"a": [1, 2]}')]
    rows = [
        {"messages": [*chat("ask"), Message("assistant", "", (call,)).to_json()], "tools": defined}
        for call, defined in zip(calls, tools, strict=True)
    ]
    table = pa.Table.from_pylist(rows)
    (stored,) = table.to_pylist()[0]["messages"][1]["tool_calls"]
    assert stored["function"]["arguments"] == {
        "city": "Zürich",
        "a": None,
    }
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_stream(path, table.schema) as stream_of_rows:
            stream_of_rows.write_table(table)
    records = read(str(path)).records
    assert [record.messages[1].tool_calls for record in records] == [(call,) for call in calls]
    assert [list(record.tools) for record in records] == tools


def test_text_in_the_form_of_qwen_stays_text(lines):
    """So earlier files of this project keep their keys, and their responses are trained as they were sampled."""
    text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    row = {"messages": chat("=# Tools\n<tools>\n{}\n</tools>", "ask", text), "metadata": {}}
    assert read(lines(row)).records == [demonstration("=# Tools\n<tools>\n{}\n</tools>", "ask", text)]


def test_fields_of_messages_that_are_not_read_are_counted(lines):
    turns = [
        *chat("ask"),
        FORMS["OpenAI"],
        {"role": "tool", "name": "weather", "content": {"sky": "blue"}, "mood": "x"},
    ]
    found = stream(lines({"messages": [*turns, *chat("", "say")[1:]]}))
    (located,) = found.records
    assert located.record.messages[2] == Message("tool", '{"sky": "blue"}', name="weather")
    assert found.statistics.unused_columns == {"messages.mood": 1}
