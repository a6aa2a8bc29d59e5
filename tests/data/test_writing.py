"""Writing records: they are read back equal, and a failed write changes nothing."""

import datetime

import pytest
from format_rows import EVERYTHING, ONE_ROW, talk

from align.data.reading import read
from align.data.writing import write
from align.errors import InputError, RunError
from align.records import Comparison, Demonstration, Prompt, Response


@pytest.mark.parametrize("turned", [1, -1])
def test_written_records_are_read_back_equal(tmp_path, turned):
    odd = Demonstration(
        talk("=\u2028 \U0001f600", "\r\n\0", "<s>{{x}}"), {"metadata": {"prompt": [1.5, None]}, "responses": []}
    )
    cut = Demonstration(talk("a", "b"), {"metadata": 1}, "length")
    ended = (Response("b", 1.0, {"x": 2.0}, "stop"), Response("c", 0.0, {}, "length"))
    records = [*EVERYTHING, odd, cut, Comparison(talk("a"), ended, None, {"finish": "kept"})][::turned]
    write(tmp_path / "all.jsonl", records)
    found = read(str(tmp_path / "all.jsonl"), format="native")
    assert found.records == records and len(records) > len(ONE_ROW)


@pytest.mark.parametrize("record", EVERYTHING, ids=lambda record: type(record).__name__)
def test_the_format_of_a_written_record_is_detected(tmp_path, record):
    write(tmp_path / "one.jsonl", [record])
    assert read(str(tmp_path / "one.jsonl")).records == [record]


@pytest.mark.parametrize(
    "record, message",
    [
        (Prompt(talk("a"), {"x": float("inf")}), "Out of range float"),
        (Prompt(talk("a"), {"x": object()}), "metadata contains a value of type object, which JSON cannot represent"),
        (Demonstration(talk("a", "b", "c")), "ends with a prompt"),
    ],
)
def test_a_failed_write_keeps_the_old_file(tmp_path, record, message):
    target = tmp_path / "records.jsonl"
    write(target, EVERYTHING[:2])
    before = target.read_bytes()
    with pytest.raises(InputError, match=message):
        write(target, [*EVERYTHING, record])
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_dates_are_written_as_text(tmp_path):
    write(tmp_path / "a.jsonl", [Prompt(talk("a"), {"day": datetime.date(2024, 6, 17)})])
    assert read(str(tmp_path / "a.jsonl")).records[0].metadata == {"day": "2024-06-17"}


def test_an_unwritable_path_is_named(tmp_path):
    with pytest.raises(RunError, match="missing/a.jsonl: No such file or directory"):
        write(tmp_path / "missing" / "a.jsonl", EVERYTHING)
    with pytest.raises(InputError, match=r"a.json: records are written as .jsonl, not as .json"):
        write(tmp_path / "a.json", EVERYTHING)
