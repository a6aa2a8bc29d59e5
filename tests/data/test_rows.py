import csv
import gzip
import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from datasets import Dataset, load_from_disk
from pyarrow import ipc, parquet

from align.data.rows import read_rows
from align.errors import InputError

ROWS = [{"prompt": "Wie geht's?\nGut – 你好", "answer": "a,b"}, {"prompt": "second", "answer": 'with "quotes"'}]


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_arrow(rows, opening, rows_per_batch=None):
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with opening(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return sink.getvalue()


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


KINDS = {
    "list.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "object.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "lines.json": as_lines,
    "lines.jsonl": as_lines,
    "blank_lines.jsonl": lambda rows: as_lines(rows).replace(b"\n", b"\r\n\r\n"),
    "byte_order_mark.jsonl": lambda rows: b"\xef\xbb\xbf" + as_lines(rows),
    "table.csv": as_csv,
    "table.parquet": as_parquet,
    "stream.arrow": lambda rows: as_arrow(rows, ipc.new_stream),
    "file.arrow": lambda rows: as_arrow(rows, ipc.new_file),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_file_type_gives_the_same_rows(tmp_path, name, zipped):
    content = KINDS[name](ROWS)
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert list(read_rows(str(path))) == ROWS


def test_a_single_object_is_one_row_and_a_bare_string_a_prompt(tmp_path):
    (tmp_path / "one.json").write_text('{"prompt": "a", "answers": [{"x": 1}]}')
    (tmp_path / "strings.jsonl").write_text('"a"\n"b"\n')
    assert list(read_rows(str(tmp_path / "one.json"))) == [{"prompt": "a", "answers": [{"x": 1}]}]
    (tmp_path / "kept.json").write_text('{"data": [], "examples": [{"a": 1}], "version": 2}')
    assert list(read_rows(str(tmp_path / "kept.json"))) == [{"a": 1}]
    assert list(read_rows(str(tmp_path / "strings.jsonl"))) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_header_that_ends_in_the_letters_of_choices_is_no_question_of_mmlu(tmp_path):
    (tmp_path / "header.csv").write_text("id,question,A,B,C,D\n1,Which?,a,b,c,d\n")
    assert list(read_rows(str(tmp_path / "header.csv"))) == [
        {"id": "1", "question": "Which?", "A": "a", "B": "b", "C": "c", "D": "d"}
    ]
    (tmp_path / "blood_test.csv").write_text("Which group?,A,B,AB,O,D\n")
    (question,) = read_rows(str(tmp_path / "blood_test.csv"))
    assert (question["D"], question["answer"], question["subject"]) == ("O", "D", "blood")


def test_a_csv_cell_can_exceed_the_default_limit(tmp_path):
    (tmp_path / "long.csv").write_bytes(as_csv([{"text": "x" * 200_000}]))
    assert [len(row["text"]) for row in read_rows(str(tmp_path / "long.csv"))] == [200_000]


def test_a_folder_gives_its_data_files_in_order_and_nothing_else(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, rows in {
        "b.jsonl": ROWS[1:],
        "a.json.gz": ROWS[:1],
        "part/c.csv": ROWS[:1],
        ".cache/d.jsonl": ROWS,
    }.items():
        content = as_csv(rows) if name.endswith("csv") else as_lines(rows)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for name in ("README.md", "manifest.json", "state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert list(read_rows(str(tmp_path))) == [*ROWS, ROWS[0]]


def test_a_saved_dataset_gives_its_rows_without_what_datasets_caches_beside_them(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    saved = load_from_disk(str(tmp_path / "saved"))
    saved.map(lambda row: {"prompt": row["prompt"].upper()}), saved.filter(lambda row: row["prompt"] == "second")
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 3  # with both caches
    assert list(read_rows(str(tmp_path / "saved"))) == ROWS


@pytest.mark.parametrize(
    "names",
    [("train.jsonl", "test.jsonl"), ("train/0.jsonl", "test/0.jsonl"), ("train-0-of-1.jsonl", "test_all.jsonl")],
)
def test_splits_are_never_mixed(tmp_path, names):
    for name, row in zip(names, ROWS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(as_lines([row]))
    assert [list(read_rows(str(tmp_path), split=split)) for split in ("train", "test")] == [ROWS[:1], ROWS[1:]]
    with pytest.raises(InputError, match="contains several splits; name one of test, train"):
        list(read_rows(str(tmp_path)))
    with pytest.raises(InputError, match="no data file of split 'dev' in this folder"):
        list(read_rows(str(tmp_path), split="dev"))
    with pytest.raises(InputError, match="a file has no split 'train'"):
        list(read_rows(str(tmp_path / names[0]), split="train"))


BROKEN = {
    "cut.jsonl": (as_lines(ROWS)[:-9], "line 2: not valid JSON"),
    "cut.json": (json.dumps(ROWS, indent=1).encode()[:-20], "line 8: not valid JSON"),
    "cut_lines.json": (as_lines(ROWS)[:-9], "line 2: not valid JSON"),
    "cut.jsonl.gz": (gzip.compress(as_lines(ROWS * 999))[:-30], "cannot be read after row"),
    "plain.jsonl.gz": (as_lines(ROWS), "cannot be read after row 0: Not a gzipped file"),
    "cut.parquet": (as_parquet(ROWS)[:-40], "cannot be read after row 0"),
    "cut.arrow": (as_arrow(ROWS, ipc.new_stream)[:100], "cannot be read after row 0"),
    "cut_later.arrow": (as_arrow(ROWS * 3, ipc.new_stream, 2)[:-40], "cannot be read after row 4"),
    "latin.jsonl": ('{"a": 1}\n{"prompt": "ä"}'.encode("latin-1"), "line 2: byte 0xe4 is not UTF-8; Western text is"),
    "latin.json": ('[{"a": 1},\n{"prompt": "ä"}]'.encode("latin-1"), "line 2: byte 0xe4 is not UTF-8; Western text is"),
    "latin.csv": ("prompt\nä ü\n".encode("latin-1"), "byte 0xe4 is not UTF-8; Western text is probably in Latin-1"),
    "windows.jsonl": (
        b'{"prompt": "\x93hi\x94"}',
        "line 1: byte 0x93 is not UTF-8; Western text is probably in Latin-1",
    ),
    "latin.jsonl.gz": (gzip.compress('{"prompt": "ä"}'.encode("latin-1")), "line 1: byte 0xe4 is not UTF-8"),
    "cut_character.jsonl": ('{"prompt": "ä'.encode()[:-1], "line 1: ends inside a character"),
    "utf16.jsonl": (
        as_lines(ROWS).decode().encode("utf-16"),
        "is encoded in UTF-16, and UTF-8 is needed: iconv -f UTF-16",
    ),
    "utf16.json": (json.dumps(ROWS).encode("utf-16"), "is encoded in UTF-16, and UTF-8 is needed: iconv -f UTF-16"),
    "utf16.csv": (as_csv(ROWS).decode().encode("utf-16"), "is encoded in UTF-16, and UTF-8 is needed: iconv -f UTF-16"),
    "utf16le.jsonl": (as_lines(ROWS).decode().encode("utf-16-le"), "is encoded in UTF-16LE, and UTF-8 is needed"),
    "utf16be.json": (json.dumps(ROWS).encode("utf-16-be"), "is encoded in UTF-16BE, and UTF-8 is needed"),
    "utf32.jsonl": (as_lines(ROWS).decode().encode("utf-32"), "is encoded in UTF-32, and UTF-8 is needed"),
    "utf16.jsonl.gz": (gzip.compress(as_lines(ROWS).decode().encode("utf-16")), "is encoded in UTF-16, and UTF-8"),
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", "cannot be read after row 1: the next row has more or fewer fields"),
    "short.csv": (b"a,b\n1\n", "cannot be read after row 0: the next row has more or fewer fields"),
    "open_quote.csv": (b'a,b\n1,"2\n', "cannot be read after row 0: unexpected end of data"),
    "twice.csv": (b"a,b,a\n1,2,3\n", "the header names the column 'a' more than once"),
    "lists.json": (
        b'{"data": [{"a": 1}], "examples": [{"a": 2}]}',
        "contains several lists of rows, data and examples",
    ),
    "numbers.jsonl": (b'{"a": 1}\n3\n', "row 2: the row is of type int; it must be an object with named columns"),
    "array.jsonl": (
        b'[{"a": 1}]',
        "row 1: the row is of type list; it must be an object with named columns; a file that",
    ),
    "digits.jsonl": (b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", "line 2: a number has too many digits"),
    "number.json": (b"3", "contains a number alone; a list of rows, or one in each line, is needed"),
    "text.json": (b'"abc"', "contains a string alone; a list of rows"),
    "null.json": (b"null", "contains null alone; a list of rows"),
    "true.json": (b" true ", "contains true alone; a list of rows"),
    "numbers.json": (b"[1, 2]", "row 1: the row is of type int"),
    "comma.json": (b'[{"a": 1},]', "line 1: not valid JSON (Expecting value, column 11)"),
    "two_lists.json": (b"[]\n[]", "line 2: not valid JSON (Extra data, column 1)"),
    "no_comma.json": (b'[{"a": 1} {"a": 2}]', "line 1: not valid JSON (Expecting ',' delimiter, column 11)"),
    "twice.jsonl": (b'{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}', "line 2: the key 'c' occurs twice in one object"),
    "twice.json": (b'[{"a": 1}, {"a": 1, "a": 1}]', "row 2: the key 'a' occurs twice in one object"),
    "twice_in_data.json": (b'{"data": [{"a": 1, "a": 1}]}', "the key 'a' occurs twice in one object"),
    "twice_lines.json": (b'{"a": 1, "a": 2}\n{"a": 1}', "line 1: the key 'a' occurs twice in one object"),
    "nan.jsonl": (
        b'{"a": 1}\n{"a": {"b": [NaN]}}',
        "line 2: a.b.0 is nan, which is not valid JSON; use null for a missing value",
    ),
    "infinity.json": (b'[{"a": -Infinity}]', "row 1: a is -inf, which is not valid JSON"),
    "surrogate.jsonl": (b'{"id": ["\\ud800"]}', "line 1: id.0 contains '\\ud800', an unpaired surrogate"),
    "low_surrogate.json": (b'[{"a": 1}, {"id": "\\uDC00 x"}]', "row 2: id contains '\\udc00', an unpaired surrogate"),
    "surrogate_key.jsonl": (b'{"\\ud800": 1}', "line 1: a key contains '\\ud800', an unpaired surrogate"),
    "surrogate_text.jsonl": (b'"\\ud800"', "line 1: the text contains '\\ud800', an unpaired surrogate"),
    "deep.jsonl": (b"[" * 100_000, "line 1: nested too deeply"),
    "deep.json": (b"[" * 100_000, "cannot be read after row 0"),
    "model.bin": (b"\0\1", "not a data file; those end in .json, .jsonl, .csv, .parquet, .arrow, each also with .gz"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_rejected_with_the_place(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_rows(str(tmp_path / name)))
    assert f"{name}: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_pairs_of_surrogates_and_escaped_backslashes_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"prompt": "\ud83d\ude00 \\ud800"}' + b"\n")
    assert list(read_rows(str(tmp_path / "a.jsonl"))) == [{"prompt": "\U0001f600 \\ud800"}]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_nan_is_a_missing_number_in_files_that_pandas_writes(tmp_path, name):
    rows = [{"a": 1.5, "b": {"c": [float("nan"), 2.0]}}, {"a": float("nan"), "b": {"c": []}}]
    content = as_parquet(rows) if name.endswith("parquet") else as_arrow(rows, ipc.new_file)
    (tmp_path / name).write_bytes(content)
    assert list(read_rows(str(tmp_path / name))) == [{"a": 1.5, "b": {"c": [None, 2.0]}}, {"a": None, "b": {"c": []}}]


def test_a_list_of_rows_gives_the_same_rows_however_it_is_spaced(tmp_path):
    for text in (
        '[{"a":1},{"b":"]"}]',
        ' [\n{"a": 1} ,\r\n\t{"b": "]"}\n]\n',
        json.dumps([{"a": 1}, {"b": "]"}], indent=4),
    ):
        (tmp_path / "a.json").write_text(text)
        assert list(read_rows(str(tmp_path / "a.json"))) == [{"a": 1}, {"b": "]"}]
    (tmp_path / "a.json").write_text(" [ ] ")
    assert list(read_rows(str(tmp_path / "a.json"))) == []


def test_a_missing_path_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing.jsonl: no such file or folder"):
        list(read_rows(str(tmp_path / "nothing.jsonl")))
    with pytest.raises(InputError, match="https:/hub/a: no such file or folder; a Hub dataset is named owner/name"):
        list(read_rows("https://hub/a"))
    with pytest.raises(InputError, match="empty: no data file in this folder; data files end in"):
        list(read_rows(str(tmp_path / "empty")))


HUB = """
import sys
from align.errors import InputError
from align.data.rows import hub_rows, read_rows
print([located.record for located in hub_rows(sys.argv[1], config=None, split=None)])
try:
    next(read_rows("no-such-owner/no-such-set"))
except InputError as error:
    print(error)
"""


def test_a_hub_id_is_loaded_by_datasets_and_errors_name_it(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(as_lines(ROWS))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PATH": os.environ["PATH"]}
    ran = subprocess.run(
        [sys.executable, "-c", HUB, "./set"], cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    rows, error = ran.stdout.splitlines()
    assert rows == str(ROWS)
    assert error.startswith("no-such-owner/no-such-set: no such file or folder, and no dataset of that id")
