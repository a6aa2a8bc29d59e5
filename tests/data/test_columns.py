"""Columns with foreign names: `columns` renames them for every format, and errors name the columns of the file."""

import csv
import json

import pytest
from format_rows import ONE_ROW, ROW_IDS, demonstration, pair, talk

from align.data.readers.table import READERS
from align.data.reading import read, stream
from align.data.rows import read_rows
from align.errors import InputError
from align.records import Prompt

PAIR = {"question": "ask", "good": "good", "bad": "bad"}
NAMES = {"prompt": "question", "chosen": "good", "rejected": "bad"}


def test_a_pair_with_foreign_names_is_read_by_its_columns(lines):
    found = read(lines(PAIR, PAIR), columns=NAMES)
    assert (found.format, found.records) == ("preference", [pair("ask")] * 2)


@pytest.mark.parametrize("name, row, expected", ONE_ROW, ids=ROW_IDS)
def test_every_format_is_read_under_foreign_names(lines, name, row, expected):
    needed = next(columns for columns in READERS[name].alternatives if set(columns) <= row.keys())
    names = {column: f"their {column}" for column in needed}
    foreign = {names.get(column, column): value for column, value in row.items()}
    expected = expected if isinstance(expected, list) else [expected]
    assert read(lines(foreign), columns=names, format=name).records == expected
    assert read(lines(foreign), columns={column: names.get(column, column) for column in row}).format == name


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, {"q": "ask", "a": "say", "instruction": "x", "output": "y"}, "say"),
        ({"instruction": "q", "response": "a"}, {"q": "ask", "a": "say", "output": "y", "input": ""}, "say"),
        ({"prompt": "q", "completion": "a"}, {"q": "ask", "a": "say", "chosen": "x", "rejected": "y"}, "say"),
        ({"prompt": "question", "completion": "answer"}, {"question": "ask", "answer": "say", "messages": []}, "say"),
        ({"prompt": "q", "completion": "prompt"}, {"q": "ask", "prompt": "say"}, "say"),
        ({"prompt": "completion", "completion": "prompt"}, {"completion": "ask", "prompt": "say"}, "say"),
    ],
)
def test_named_columns_are_read_before_others_that_a_format_knows(lines, columns, row, expected):
    (found,) = read(lines(row), columns=columns).records
    assert [message.content for message in found.messages] == ["ask", expected]


def test_columns_that_named_ones_take_the_place_of_are_counted_as_unused(lines):
    row = {"prompt": "template", "question": "ask", "a": "say", "output": "y", "id": 3, "system": "s"}
    found = stream(lines(row), columns={"prompt": "question", "completion": "a"})
    assert found.read().records == [demonstration("=s", "ask", "say", prompt="template", output="y", id=3)]
    assert set(found.statistics.unused_columns) == {"prompt", "output", "id"}


def test_columns_that_are_not_named_keep_their_meaning_where_named_ones_are_not_enough(lines):
    row = {"question": "ask", "chosen": "good", "rejected": "bad", "score_chosen": 2, "score_rejected": 1}
    (found,) = read(lines(row), columns={"prompt": "question"}).records
    assert [(each.content, each.reward) for each in found.responses] == [("good", 2.0), ("bad", 1.0)]


def test_material_and_other_parts_of_a_format_are_read_beside_named_columns(lines):
    row = {"q": "ask", "input": "of this", "a": "say", "system": "s", "history": [["x", "y"]]}
    found = read(lines(row), columns={"instruction": "q", "output": "a"})
    assert found.records == [demonstration("=s", "x", "y", "ask\n\nof this", "say")]
    row = {"best": "good", "rejected": "bad", "prompt": "ask", "chosen_response": "other"}
    assert read(lines(row), columns={"chosen": "best"}).records == [pair("ask", metadata={"chosen_response": "other"})]


def test_a_named_column_can_be_what_a_judge_needs(lines):
    found = read(lines({"problem": "ask", "final": "4"}), columns={"prompt": "problem", "answer": "final"})
    assert found.records == [Prompt(talk("ask"), {"answer": "4"})]


def test_columns_are_renamed_in_every_file_type_and_for_tasks(tmp_path):
    with (tmp_path / "a.csv").open("w") as file:
        writer = csv.DictWriter(file, PAIR)
        writer.writeheader()
        writer.writerow(PAIR)
    (tmp_path / "a.json").write_text(json.dumps([PAIR]))
    for name in ("a.csv", "a.json"):
        assert read(str(tmp_path / name), columns=NAMES).records == [pair("ask")]
        assert list(read_rows(str(tmp_path / name), columns={"prompt": "question"})) == [
            {"prompt": "ask", "good": "good", "bad": "bad"}
        ]


@pytest.mark.parametrize("reader", [read, lambda path, columns: list(read_rows(path, columns=columns))])
def test_a_wrong_name_is_reported_with_the_columns_of_the_file(lines, reader):
    with pytest.raises(InputError) as caught:
        reader(lines(PAIR), columns={**NAMES, "chosen": "best"})
    assert "rows.jsonl: row 1: columns.chosen names 'best', and the row has the columns question, good, bad" in str(
        caught.value
    )


def test_a_later_row_without_a_named_column_is_an_error_or_counted(lines):
    path = lines(PAIR, {"question": "ask", "good": "good"}, PAIR)
    with pytest.raises(
        InputError, match=r"row 2: columns\.rejected names 'bad', and the row has the columns question, good$"
    ):
        read(path, columns=NAMES)
    found = read(path, columns=NAMES, on_error="skip")
    assert (len(found.records), sum(found.dropped.values())) == (2, 1)


def test_an_optional_named_column_may_be_missing_in_later_rows(lines):
    path = lines({"q": "ask", "a": "say", "sys": "s"}, {"q": "ask", "a": "say"})
    found = read(path, columns={"prompt": "q", "completion": "a", "system": "sys"})
    assert found.records == [demonstration("=s", "ask", "say"), demonstration("ask", "say")]


CHAT = {
    "conversation": [{"role": "user", "content": "ask", "id": 1}, {"role": "assistant", "content": "other"}],
    "chosen": {"text": "good", "model": "m"},
    "rejected": {"text": "bad"},
    "turns": 2,
}
NESTED = {"prompt": "conversation.0.content", "chosen": "chosen.text", "rejected": "rejected.text"}


def test_a_dotted_path_reads_objects_and_indices_of_lists(lines):
    found = stream(lines(CHAT, CHAT), columns=NESTED)
    left = {
        "conversation": [{"role": "user", "id": 1}, {"role": "assistant", "content": "other"}],
        "chosen": {"model": "m"},
        "turns": 2,
    }
    assert found.read().records == [pair("ask", metadata=left)] * 2
    assert (found.format, found.found_columns) == ("preference", ("chosen", "rejected"))
    # What a nested value leaves in its column is not read, and told; of `rejected`, nothing is left
    assert found.statistics.unused_columns == {"conversation": 2, "chosen": 2, "turns": 2}


def test_a_negative_index_counts_from_the_end(lines):
    row = {"chat": [{"text": "x"}, {"text": "ask"}, {"text": "say"}]}
    found = read(lines(row), columns={"prompt": "chat.-2.text", "completion": "chat.-1.text"})
    assert found.records == [demonstration("ask", "say", chat=[{"text": "x"}])]


def test_a_column_whose_own_name_has_a_dot_comes_before_a_path(lines):
    row = {"a.b": "ask", "a": {"b": "other"}, "c": "say"}
    found = read(lines(row), columns={"prompt": "a.b", "completion": "c"})
    assert found.records == [demonstration("ask", "say", a={"b": "other"})]


def test_several_paths_may_read_one_list_and_one_path_two_names(lines):
    row = {"x": ["ask", "say", 3], "y": {"z": {"system": "s"}}}
    found = read(lines(row), columns={"prompt": "x.0", "completion": "x.1", "system": "y.z.system", "id": "x.2"})
    assert found.records == [demonstration("=s", "ask", "say", id=3)]


WRONG_PATHS = {
    "conversation.2.content": "'conversation' is a list of 2",
    "conversation.first.content": "'conversation' is a list of 2",
    "conversation.0.text": "'conversation.0' has the keys role, content, id",
    "chosen.text.0": "'chosen.text' is of type str",
    "turns.0": "'turns' is of type int",
    "talk.0.content": "the row has the columns conversation, chosen, rejected, turns",
    "conversation.-3.content": "'conversation' is a list of 2",
}


@pytest.mark.parametrize("path", WRONG_PATHS)
@pytest.mark.parametrize("reader", [read, lambda path, columns: list(read_rows(path, columns=columns))])
def test_a_path_that_ends_too_early_names_the_row_and_what_there_is(lines, path, reader):
    with pytest.raises(InputError) as caught:
        reader(lines(CHAT), columns={**NESTED, "prompt": path})
    assert str(caught.value).endswith(f"rows.jsonl: row 1: columns.prompt names {path!r}, and {WRONG_PATHS[path]}")


def test_a_later_row_without_a_nested_value_is_named_or_counted_with_what_it_has(lines):
    short = {**CHAT, "chosen": {"texts": "good"}}
    path = lines(CHAT, short, CHAT)
    with pytest.raises(
        InputError, match=r"row 2: columns\.chosen names 'chosen\.text', and 'chosen' has the keys texts$"
    ):
        read(path, columns=NESTED)
    found = read(path, columns=NESTED, on_error="skip")
    assert (len(found.records), list(found.dropped.values())) == (2, [1])


def test_nested_values_are_read_from_parquet_and_for_tasks(tmp_path):
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT]), path)
    assert [response.content for response in read(path, columns=NESTED).records[0].responses] == ["good", "bad"]
    (row,) = read_rows(path, columns={"question": "conversation.0.content"})
    assert row["question"] == "ask"
