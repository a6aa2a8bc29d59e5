"""Reading sources: statistics, limits, errors and settings."""

import sys

import pytest
from format_rows import group, talk

from align.data.reading import read, stream
from align.errors import InputError
from align.records import Prompt


def test_consecutive_rows_of_one_prompt_become_one_comparison(lines):
    rows = [{"prompt": prompt, "response": text, "helpfulness": 1} for prompt, text in ("aw", "ax", "by", "az")]
    found = read(lines(*rows))
    groups = [(one.prompt[0].content, [response.content for response in one.responses]) for one in found.records]
    assert groups == [("a", ["w", "x"]), ("b", ["y"]), ("a", ["z"])] and found.num_rows == 4


def test_records_keep_the_place_of_their_first_row(lines):
    rated = [{"prompt": prompt, "response": "a", "helpfulness": 3} for prompt in "aabbbc"]
    spoilt = {**rated[0], "response": ""}
    path = lines(rated[0], spoilt, *rated[1:], {"prompt": "d"})
    found = stream(path, on_error="skip")
    assert [(located.record.prompt[0].content, located.place) for located in found.records] == [
        (prompt, f"{path}: row {row}") for prompt, row in [("a", 1), ("b", 4), ("c", 7)]
    ]


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"prompt": "a", "output": "b", "response": "c"}, {"output"}),
        ({"instruction": "a", "input": "", "context": "b", "output": "c"}, set()),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, {"context"}),
        ({"prompt": "a", "completion": "b", "metadata": {"id": 1}, "id": 2, "tags": [], "note": ""}, {"id"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": 1, "margin": 1}, set()),
        ({"prompt": "a", "response": "b", "helpfulness": 3, "verbosity": 1, "split": "train"}, {"split"}),
        ({"messages": [{"role": "assistant", "content": "a", "note": "b"}], "metadata": {}}, {"messages.note"}),
        ({"input": "a", "output_A": "b", "output_B": "c", "parsed_result": {"x": {"preference": "A"}}}, set()),
    ],
)
def test_unused_columns_are_counted(lines, row, unused):
    found = stream(lines(row, row))
    list(found.records)
    assert found.statistics.unused_columns == dict.fromkeys(unused, 2)


def test_dropped_rows_are_counted_by_reason(lines):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = lines(good, {**good, "chosen": ""}, {**good, "rejected": " "}, {"prompt": "a"}, good)
    found = read(path, on_error="skip")
    needs = (
        "preference needs chosen and rejected, or chosen_messages and rejected_messages, or chosen_response and "
        "rejected_response, and the row has the columns prompt"
    )
    assert (len(found.records), found.num_rows, found.dropped) == (2, 5, {"a response is empty": 2, needs: 1})
    with pytest.raises(InputError, match="row 2: a response is empty"):
        read(path)
    with pytest.raises(InputError, match="none of the 1 rows can be read: a response is empty"):
        read(lines({**good, "chosen": ""}), on_error="skip")


def test_a_group_loses_only_its_empty_responses(lines):
    path = lines({"prompt": "ask", "responses": [{"content": text, "reward": 1} for text in ("a", " ", "b")]})
    assert read(path, on_error="skip").records == [group(("a", 1.0), ("b", 1.0))]
    assert read(path, on_error="skip").dropped == {"a response is empty": 1}
    with pytest.raises(InputError, match="row 1: a response is empty"):
        read(path)


def test_a_group_without_its_empty_responses_is_read_like_any_other(lines):
    answers = [{"content": text, "reward": 1, "model": model} for text, model in (("a", "x"), ("", "y"), ("b", "z"))]
    rows = [{"request": "ask", "responses": answers, "prompt": "own", "metadata": {"kind": kind}} for kind in "pq"]
    found = read(lines(*rows), columns={"prompt": "request"}, where={"kind": "q"}, on_error="skip")
    assert found.records == [
        group(("a", 1.0), ("b", 1.0), metadata={"kind": "q", "prompt": "own", "models": ["x", "z"]})
    ]


def test_a_limit_stops_reading(lines):
    path = lines(*({"prompt": str(number)} for number in range(9)))
    found = read(path, limit=3)
    assert (found.num_rows, found.records) == (3, read(path).records[:3])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"format": "alpacca"}, "no format is called 'alpacca'; did you mean 'alpaca'?"),
        (
            {"format": "question_answer"},
            "question_answer needs question and answer, or problem and solution, and the row has the columns prompt",
        ),
        ({"format": "json:loads"}, "reader 'json:loads' is of type function; a Reader is needed"),
        ({"on_error": "skpi"}, "on_error is 'skpi'; did you mean 'skip'?"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_invalid_settings_are_rejected_with_a_suggestion(lines, settings, message):
    with pytest.raises(InputError) as caught:
        read(lines({"prompt": "a"}), **settings)
    assert message in str(caught.value)


def test_an_empty_file_is_rejected(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv"):
        (tmp_path / name).write_text("")
        with pytest.raises(InputError, match=f"{name}: contains no rows"):
            read(str(tmp_path / name))


def test_a_custom_reader_is_imported_by_dotted_path(lines, tmp_path, monkeypatch):
    (tmp_path / "their_format.py").write_text(
        "from align.data.readers.table import Reader\n"
        "from align.records import Message, Prompt\n"
        "reader = Reader(('q',), lambda row: iter([Prompt((Message('user', row['q']),))]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert read(lines({"q": "ask"}), format="their_format:reader").records == [Prompt(talk("ask"))]
    del sys.modules["their_format"]


BAD_LINES = {
    "not valid JSON (Unterminated string starting at, column 12)": '{"prompt": "a',
    "the key 'prompt' occurs twice in one object": '{"prompt": "a", "prompt": "b"}',
    "score is nan, which is not valid JSON; use null for a missing value": '{"prompt": "a", "score": NaN}',
    "the row is of type int; it must be an object with named columns": "3",
    "nested too deeply": "[" * 100_000,
    "id contains '\\udfff', an unpaired surrogate; write the whole character or remove it": '{"id": "\\udfff"}',
}


@pytest.mark.parametrize("place", [0, 1])
def test_lines_that_are_no_rows_are_an_error_or_dropped_and_counted(tmp_path, place):
    good = '{"prompt": "a"}'
    bad = [*BAD_LINES.values()]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*bad, good] if place == 0 else [good, *bad]))
    found = read(str(path), on_error="skip")
    assert (found.format, len(found.records), found.num_rows) == ("prompt", 1, 1 + len(bad))
    assert found.dropped == dict.fromkeys(BAD_LINES, 1)
    with pytest.raises(InputError, match=f"rows.jsonl: line {place + 1}: not valid JSON"):
        read(str(path))
    path.write_text("\n".join(bad[1:2]))
    with pytest.raises(InputError, match="none of the 1 rows can be read: the key 'prompt' occurs twice"):
        read(str(path), on_error="skip")


def test_the_reasons_of_dropped_rows_are_few_and_short(lines):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"messages": [{"role": f"role {number} {'x' * 500}", "content": "a"}, *turns]} for number in range(50)]
    found = read(lines({"messages": turns}, *bad), on_error="skip")
    assert (len(found.records), sum(found.dropped.values())) == (1, 50)
    assert 1 < len(found.dropped) <= 21 and max(map(len, found.dropped)) <= 200
