"""Files and variables that `align` did not write are reported in one line, or left alone."""

import json

import pytest

from align.artifacts import atomic_folder
from align.distributed.launch import is_launched
from align.errors import InputError, RunError
from align.pipeline import locked
from align.train.checkpoint import has_checkpoint


@pytest.mark.parametrize("name", ["checkpoint-abc", "checkpoint-", "checkpoint-1.5", "checkpoint--3"])
def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(RunError, match=rf"{name}: .* is not the number of a step"):
        has_checkpoint(tmp_path, 3)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00garbage", b"\x1b[2Jx", b"x" * 10**6, b"\n\n"])
def test_garbage_in_a_lock_file_is_replaced(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    notes = []
    with locked(tmp_path, notes.append):
        assert (tmp_path / ".lock").read_text().startswith("PID ")
    assert all(note.isprintable() and len(note) < 600 for note in notes)


def test_a_step_that_is_a_link_is_replaced_and_what_it_links_to_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    (tmp_path / "step").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "step") as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "step" / "file").read_text() == "new" and not (tmp_path / "step").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"step", "elsewhere"}


def test_a_rank_without_a_launch_is_an_error_of_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not is_launched()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="RANK is set but WORLD_SIZE is not"):
        is_launched()
