import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from align.artifacts import (
    append_line,
    atomic_file,
    atomic_folder,
    complete,
    fingerprint,
    fingerprint_bytes,
    read_json,
    read_manifest,
    versions,
    working_folder,
    write_json,
    write_text,
)
from align.errors import InputError, RunError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_json_round_trips_without_leftover_files(tmp_path):
    value = {"é": [1, 2.5, None, True], "nested": {"a": "b\n"}}
    for written in ({"older": 1}, value):
        write_json(tmp_path / "a.json", written)
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == read_json(tmp_path / "a.json") == value
    assert names(tmp_path) == ["a.json"]


def test_json_that_cannot_be_encoded_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"older": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"of no kind": object()})
    assert content(tmp_path) == {"a.json": '{\n  "older": 1\n}\n'}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_content(tmp_path, error):
    write_text(tmp_path / "a", "old")
    with pytest.raises(error, match="in the middle"), atomic_file(tmp_path / "a") as partial:
        partial.write_text("half")
        assert content(tmp_path)["a"] == "old"
        raise error("in the middle")
    assert content(tmp_path) == {"a": "old"}
    with atomic_file(tmp_path / "a") as partial:
        partial.write_text("new")
    assert content(tmp_path) == {"a": "new"}


def test_unencodable_text_is_an_error_unless_replaced(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "\ud800")
    assert content(tmp_path) == {}
    write_text(tmp_path / "a", "\ud800", errors="replace")
    assert content(tmp_path) == {"a": "?"}


def test_appended_lines_can_be_read_at_once(tmp_path):
    for step in range(3):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "note": "two\nlines"})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(step + 1))


@pytest.mark.parametrize(
    ("place", "message"),
    [("no/such/a.json", "No such file"), ("file/a.json", "Not a directory"), ("folder", "Is a directory")],
)
@pytest.mark.parametrize("write", [write_json, append_line, write_text])
def test_an_unusable_path_is_an_error_in_one_line(tmp_path, place, message, write):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=rf"{tmp_path}/[^.].*: {message}") as caught:
        write(tmp_path / place, "")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine" and not names(tmp_path / "folder")


def test_a_folder_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="file"), atomic_folder(tmp_path / "file" / "model"):
        pass


@pytest.mark.parametrize("text", [None, "", "{", b"\xff"])
def test_a_file_without_json_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"a\.json: cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_an_atomic_folder_replaces_an_older_one(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "deep" / "model") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / text).write_text(text)
    assert content(tmp_path) == {"deep/model/inner/new": "new"}
    assert names(tmp_path / "deep") == ["model"]


def test_an_atomic_folder_has_default_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "whole"):
        pass
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("error", [ValueError, OSError, RunError, KeyboardInterrupt])
def test_a_failed_folder_leaves_nothing(tmp_path, older, error):
    if older:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("old")
    with pytest.raises(error, match="in the middle"), atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        assert content(tmp_path / "model") == {"weights": "old"} if older else not (tmp_path / "model").exists()
        raise error("in the middle")
    assert content(tmp_path) == ({"model/weights": "old"} if older else {})


# A child process kills itself at the n-th call of a system function.
KILLED = """
import os, signal, sys
from pathlib import Path
from align.artifacts import atomic_folder, write_json
target, name, left = Path(sys.argv[1]), sys.argv[2], [int(sys.argv[3])]
call = getattr(os, name)
def call_or_die(*arguments):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments)
setattr(os, name, call_or_die)
with atomic_folder(target) as folder:
    for file in ("a", "b"):
        write_json(folder / file, "new")
"""


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(("call", "times"), [("fsync", 5), ("rename", 2), ("replace", 2)])
def test_a_kill_at_any_point_leaves_a_complete_folder_or_none(tmp_path, call, times, older):
    target = tmp_path / "model"
    seen = set()
    for time in range(1, times + 1):
        shutil.rmtree(target, ignore_errors=True)
        if older:
            target.mkdir()
            write_json(target / "a", "old")
        killed = subprocess.run([sys.executable, "-c", KILLED, target, call, str(time)], check=False)
        found = tuple(sorted(read_json(file) for file in target.iterdir())) if target.exists() else None
        assert found in [None, ("new", "new"), ("old",)]
        seen.add((killed.returncode, found))
    assert any(code < 0 for code, _ in seen), "no point of the write was killed"


def test_a_finished_step_has_a_manifest_and_no_leftovers(tmp_path):
    target = tmp_path / "sft"
    working = working_folder(target)
    assert (working.parent, working.name, read_manifest(target)) == (tmp_path, "sft.partial", None)
    (working / ".checkpoint-2.partial-0123abcd" / ".w.json.partial-0123abcd").mkdir(parents=True)
    for beside in (".sft.older-89abcdef", ".other.partial-01234567"):
        (tmp_path / beside).mkdir()
    (working / ".hidden").write_text("kept")
    append_line(working / "metrics.jsonl", {"step": 1})
    assert read_manifest(target) is None
    complete(working, target, manifest={"fingerprint": "f"})
    found = {".hidden": b"kept", "metrics.jsonl": b'{"step": 1}\n'}
    files = {name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in found.items()}
    assert read_manifest(target) == {"fingerprint": "f", "files": files}
    assert names(target) == [".hidden", "manifest.json", "metrics.jsonl"]
    assert names(tmp_path) == [".other.partial-01234567", "sft"]


def test_a_file_fingerprint_is_its_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    expected = hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert fingerprint(tmp_path / "a") == fingerprint_bytes(b"abc" * 100_000) == expected


CHANGES = {
    "content": lambda folder: (folder / "b" / "c").write_text("other"),
    "an empty file": lambda folder: (folder / "empty").touch(),
    "a name": lambda folder: (folder / "a").rename(folder / "z"),
    "a place": lambda folder: (folder / "b" / "c").rename(folder / "c"),
    "a swap": lambda folder: [(folder / name).write_text(text) for name, text in [("a", "two"), ("b/c", "one")]],
    "a boundary": lambda folder: [(folder / name).write_text(text) for name, text in [("a", "onet"), ("b/c", "wo")]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_fingerprint_changes_with_any_name_or_content(tmp_path, change):
    made = []
    for name in ("first", "second"):
        (tmp_path / name / "b").mkdir(parents=True)
        (tmp_path / name / "b" / "c").write_text("two")
        (tmp_path / name / "a").write_text("one")
        made.append(fingerprint(tmp_path / name))
    assert made[0] == made[1]
    CHANGES[change](tmp_path / "second")
    assert fingerprint(tmp_path / "second") != made[0]


def test_manifest_and_metrics_are_not_fingerprinted(tmp_path):
    (tmp_path / "weights").write_text("one")
    before = fingerprint(tmp_path)
    write_json(tmp_path / "manifest.json", {"seconds": 1})
    append_line(tmp_path / "metrics.jsonl", {"loss": 1})
    assert fingerprint(tmp_path) == before


def test_a_fingerprint_needs_an_existing_path(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        fingerprint(tmp_path / "absent")


def test_versions_are_read_without_imports():
    code = "import sys, json; from align.artifacts import versions; print(json.dumps([versions(), list(sys.modules)]))"
    found, modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert found == versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["python"] == sys.version.split()[0]
    assert not {"torch", "transformers", "datasets"} & set(modules)


# A child process fills a disk of 2 MiB that is mounted in its own namespace.
FILLED = """
import sys
from pathlib import Path
from align.artifacts import append_line, complete, atomic_folder, working_folder, write_json
from align.errors import RunError
big, disk, writer = "x" * 4_000_000, Path(sys.argv[1]), sys.argv[2]
write_json(disk / "older.json", 1)
with atomic_folder(disk / "older") as folder:
    write_json(folder / "a", 1)
def by_torch(path):
    import torch
    torch.save(torch.zeros(1_000_000), path)
def by_safetensors(path):
    import torch, safetensors.torch
    safetensors.torch.save_file({"a": torch.zeros(1_000_000)}, path)
def by_numpy(path):
    import numpy
    numpy.save(path, numpy.zeros(1_000_000))
def in_folder(write):
    with atomic_folder(disk / "older") as folder:
        write(folder / "weights.npy")
def finish():
    working_folder(disk / "older").mkdir()
    complete(working_folder(disk / "older"), disk / "older", manifest={"a": big})
WRITERS = {
    "json": lambda: write_json(disk / "older.json", big),
    "line": lambda: append_line(disk / "metrics.jsonl", big),
    "text": lambda: in_folder(lambda path: path.write_text(big)),
    "torch": lambda: in_folder(by_torch),
    "safetensors": lambda: in_folder(by_safetensors),
    "numpy": lambda: in_folder(by_numpy),
    "manifest": finish,
}
try:
    WRITERS[writer]()
except RunError as error:
    print(error)
print(sorted(path.relative_to(disk).as_posix() for path in disk.rglob("*")))
"""
UNTOUCHED = ["older", "older.json", "older/a"]


def on_a_small_disk(folder, writer):
    """Return the child's output; skip the test where mounting is not permitted."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux) to mount a small disk")
    script = 'mount -t tmpfs -o size=2m disk "$0" && exec "$@"'
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, folder]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting in a user namespace is not permitted")
    child = subprocess.run([*mount, sys.executable, "-c", FILLED, folder, writer], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


FULL_DISKS = [
    ("json", "older.json", UNTOUCHED),
    ("line", "metrics.jsonl", ["metrics.jsonl", *UNTOUCHED]),
    ("text", "older", UNTOUCHED),
    ("torch", "older", UNTOUCHED),
    ("safetensors", "older", UNTOUCHED),
    ("numpy", "older", UNTOUCHED),
    ("manifest", "older.partial/manifest.json", ["older", "older.json", "older.partial", "older/a"]),
]


@pytest.mark.parametrize(("writer", "named", "left"), FULL_DISKS)
def test_a_full_disk_is_one_line_and_keeps_complete_files(tmp_path, writer, named, left):
    message, found = on_a_small_disk(tmp_path, writer)
    assert message == f"{tmp_path / named}: no space left on the disk"
    assert found == str(left)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_missing_permissions_are_reported(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RunError, match=r"closed.*: Permission denied"):
        write_json(tmp_path / "closed" / "a.json", 1)


def test_a_file_size_limit_is_reported(tmp_path):
    code = (
        "import resource; from pathlib import Path; from align.artifacts import write_json;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"write_json(Path({str(tmp_path / 'a.json')!r}), 'x' * 2000)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.stderr.splitlines()[-1] == f"align.errors.RunError: {tmp_path / 'a.json'}: File too large"
    assert names(tmp_path) == []


def test_relative_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_folder(Path("model")) as folder:
        write_json(folder / "a.json", 1)
    assert content(tmp_path) == {"model/a.json": "1\n"}
