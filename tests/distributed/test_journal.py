"""Test the journal of finished items: a kill repeats no finished work."""

import json
import os
import subprocess
import sys
from zlib import crc32

import pytest

from align.distributed.journal import Journal, remove_journal
from align.distributed.work_split import WorkShard
from align.errors import InputError, RunError

MADE_WITH = {"settings": {"temperature": 0.7, "stop": ["\n"]}, "policies": ["a", "b"], "data": "3f"}
ITEMS = {"a/1/0": {"text": "naïve — 日本語 🙂\n"}, "a/1/1": ["", None, 0.5], "b/2/0": "ok"}


def filled(path, items=None):
    with Journal(path, MADE_WITH) as journal:
        for key, value in (ITEMS if items is None else items).items():
            journal.add(key, value)
    return path.read_bytes()


def test_finished_items_are_read_back(tmp_path):
    filled(tmp_path / "new" / "journal.jsonl")
    with Journal(tmp_path / "new" / "journal.jsonl", MADE_WITH) as journal:
        assert journal.done == ITEMS


def test_a_kill_at_any_byte_loses_at_most_one_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = filled(path)
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        num_whole = max(0, sum(end <= size for end in ends) - 1)  # the first line is the header
        with Journal(path, MADE_WITH) as journal:
            assert list(journal.done) == list(ITEMS)[:num_whole], size
            for key in ITEMS.keys() - journal.done.keys():
                journal.add(key, ITEMS[key])
        with Journal(path, MADE_WITH) as journal:
            assert journal.done == ITEMS, size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"temperature": 1.0, "stop": ["\n"]}}, r"started with settings.temperature 0.7, but .* has 1.0"),
        ({"policies": ["a"]}, r'policies \["a", "b"\], but this call has \["a"\]'),
        ({"data": "40"}, r'data "3f", but this call has "40"'),
        ({"seed": 1}, r"seed null, but this call has 1"),
    ],
)
def test_a_journal_made_with_other_settings_is_an_error_with_the_difference(tmp_path, change, message):
    before = filled(tmp_path / "journal.jsonl")
    with pytest.raises(InputError, match=message) as caught:
        Journal(tmp_path / "journal.jsonl", {**MADE_WITH, **change})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ['{"prompt": "precious"}\n', "precious", '[{"prompt": 1}]'])
def test_a_file_that_is_not_a_journal_is_not_overwritten(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="exists and was not written by this command"):
        Journal(path, MADE_WITH)
    assert path.read_text() == content


def test_a_malformed_line_is_an_error(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = filled(path).split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], lines[2][:5], *lines[3:]]))
    with pytest.raises(InputError, match="line 3 is not valid JSON"):
        Journal(path, MADE_WITH)


def test_a_journal_has_one_writer(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = (
        "from pathlib import Path; from align.distributed.journal import Journal; "
        f"Journal(Path({str(path)!r}), {MADE_WITH!r})"
    )
    with Journal(path, MADE_WITH):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"{RunError.__name__}: {path}: another process is writing to it" in other.stderr
    Journal(path, MADE_WITH).close()


def test_each_item_is_one_line_of_json_with_its_checksum(tmp_path):
    lines = filled(tmp_path / "journal.jsonl").decode().splitlines()
    items = [json.dumps([key, value], ensure_ascii=False) for key, value in ITEMS.items()]
    assert lines[1:] == [f'{item[:-1]}, "{crc32(item.encode()):08x}"]' for item in items]


def test_items_of_an_older_version_have_no_checksum(tmp_path):
    path = tmp_path / "journal.jsonl"
    header = filled(path).splitlines()[0].decode()
    path.write_text("\n".join([header, *(json.dumps([key, value]) for key, value in ITEMS.items())]) + "\n")
    with Journal(path, MADE_WITH) as journal:
        assert journal.done == ITEMS


def test_a_damaged_item_is_not_resumed_from(tmp_path):
    path = tmp_path / "journal.jsonl"
    content = filled(path)
    first = len(content.splitlines(keepends=True)[0])
    accepted = []
    for at in range(first, len(content)):
        for bit in (1, 4):
            damaged = bytearray(content)
            damaged[at] ^= bit
            path.write_bytes(damaged)
            try:
                Journal(path, MADE_WITH).close()
            except InputError as error:
                assert "line" in str(error)
            else:
                accepted.append(at)
    # Only a damaged end of the last line is taken for a line that a kill cut off
    assert set(accepted) <= {len(content) - 1}


def test_a_journal_that_cannot_be_read_or_closed_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    path.with_name("journal.jsonl-1").symlink_to("/proc/self/mem")  # of another process; its first byte is unreadable
    with pytest.raises(RunError, match=r"journal\.jsonl: Input/output error"):
        Journal(path, MADE_WITH)
    journal = Journal(tmp_path / "other.jsonl", MADE_WITH)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"other\.jsonl: no space left on the disk"), journal:
        pass
    assert journal._file.closed


def test_items_are_found_with_any_number_of_processes(tmp_path):
    path, keys = tmp_path / "journal.jsonl", [f"item {number}" for number in range(10)]
    journals = [Journal(path, MADE_WITH, WorkShard(number, 3)) for number in range(3)]
    for journal, share in zip(journals, (WorkShard(number, 3) for number in range(3)), strict=True):
        for key in share.select(keys):
            journal.add(key, [key, share.index])
    for journal in journals:
        journal.read_others()
        assert journal.done == {key: [key, place % 3] for place, key in enumerate(keys)}
        journal.close()
    for count in (1, 2, 4):
        with Journal(path, MADE_WITH, WorkShard(count - 1, count)) as journal:
            assert journal.done.keys() == set(keys)
    remove_journal(path)
    assert list(tmp_path.iterdir()) == []


def test_a_partial_line_of_another_process_is_repeated(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, MADE_WITH, WorkShard(1, 2)) as second:
        second.add("whole", 1)
        second.add("torn", 2)
    second.path.write_bytes(second.path.read_bytes()[:-3])
    with Journal(path, MADE_WITH) as journal:
        assert journal.done == {"whole": 1}
        journal.add("torn", 2)
    with Journal(path, MADE_WITH) as journal:
        assert journal.done == {"whole": 1, "torn": 2}


def test_a_surviving_process_of_a_killed_call_blocks_the_next_call(tmp_path):
    """Of two processes the first is killed; the next call waits until the second has ended."""
    path = tmp_path / "journal.jsonl"
    with (
        Journal(path, MADE_WITH, WorkShard(1, 2)),
        pytest.raises(RunError, match="jsonl-1: another process is writing"),
    ):
        Journal(path, MADE_WITH)
    Journal(path, MADE_WITH).close()


def test_a_folder_that_nodes_do_not_share_is_an_error(tmp_path):
    with (
        Journal(tmp_path / "journal.jsonl", MADE_WITH, WorkShard(0, 2)) as journal,
        pytest.raises(RunError, match="jsonl-1: the file of another process is missing"),
    ):
        journal.read_others()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_are_disjoint_complete_and_balanced(count):
    items = list(range(132))
    shares = [WorkShard(number, count).select(items) for number in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert {len(share) for share in shares} <= {132 // count, 132 // count + 1}
