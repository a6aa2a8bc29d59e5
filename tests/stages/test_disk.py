"""Files that cannot be read or written, and what a kill leaves: one line, and nothing that stays."""

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HUB_OFFLINE
from small_runs import run
from typer.testing import CliRunner

from align.artifacts import atomic_folder, complete, read_json, remove_leftovers, working_folder
from align.cli import app
from align.data.reading import read
from align.errors import RunError
from align.models.loading.config import load_config
from align.models.loading.tokenizer import load_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings
from align.storage.disk_errors import disk_errors, error_code
from align.testing import tiny_policy

UNREADABLE = Path("/proc/self/mem")  # a file whose first byte cannot be read, for root too

pytestmark = pytest.mark.skipif(not UNREADABLE.exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny policy."""
    folder = tmp_path_factory.mktemp("model") / "policy"
    save_policy(*tiny_policy(), folder)
    return folder


@pytest.fixture
def broken(model, tmp_path):
    """A function that returns a copy of the policy with one file that cannot be read."""

    def copy(name):
        folder = tmp_path / "broken"
        folder.mkdir()
        for file in model.iterdir():
            os.symlink(UNREADABLE if file.name == name else file, folder / file.name)
        return folder

    return copy


def rows(tmp_path):
    """A file of rows that cannot be read."""
    (tmp_path / "rows.jsonl").symlink_to(UNREADABLE)
    return tmp_path / "rows.jsonl"


READS = {
    "rows": lambda broken, path: read(rows(path)),
    "a configuration": lambda broken, path: load_config(str(broken("config.json"))),
    "a tokenizer": lambda broken, path: load_tokenizer(PolicySettings(path=str(broken("tokenizer_config.json")))),
    "JSON": lambda broken, path: read_json(broken("config.json") / "config.json"),
    "a policy": lambda broken, path: load_policy(PolicySettings(path=str(broken("config.json")))),
}


@pytest.mark.parametrize("what", READS)
def test_a_file_that_cannot_be_read_is_one_line_and_no_wrong_input(broken, tmp_path, what):
    with pytest.raises(RunError, match="Input/output error") as error:
        READS[what](broken, tmp_path)
    assert "\n" not in str(error.value)


COMMANDS = {
    "generate from rows": lambda model, file: ["generate", "--policy", model, "--data", file("prompts.jsonl")],
    "generate by a policy": lambda model, file: ["generate", "--policy", file("model/"), "--data", "tasks:general"],
    "score rows": lambda model, file: ["score", "--model", model, "--data", file("pairs.jsonl")],
    "score by a model": lambda model, file: ["score", "--model", file("model/"), "--data", "tasks:general"],
    "evaluate rows": lambda model, file: [
        "evaluate",
        "--task",
        "gsm8k",
        "--policy",
        model,
        "--data",
        file("rows.jsonl"),
    ],
    "evaluate responses": lambda model, file: [
        *("evaluate", "--task", "gsm8k", "--data", "rows", "--responses", file("answers.jsonl")),
    ],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_command_that_reads_it_ends_in_one_line(model, broken, tmp_path, what):
    def file(name):
        if name == "model/":
            return str(broken("model.safetensors"))
        (tmp_path / name).symlink_to(UNREADABLE)
        return str(tmp_path / name)

    command = [*COMMANDS[what](str(model), file), "--out", str(tmp_path / "out.jsonl")]
    ended = CliRunner().invoke(app, command)
    assert isinstance(ended.exception, RunError), ended.exception
    assert re.search(r": cannot be read.*Input/output error$", str(ended.exception))


def test_the_errors_of_libraries_in_rust_are_translated(tmp_path):
    class SafetensorError(Exception):
        """As safetensors raises it: without a number."""

    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    refused = SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")
    assert (error_code(full), error_code(refused), error_code(ValueError("13"))) == (28, 13, None)
    for error, said in ((full, "no space left on the disk"), (refused, "Permission denied")):
        with pytest.raises(RunError, match=f"model: {said}"), disk_errors(tmp_path / "model"):
            raise error
    with pytest.raises(SafetensorError), disk_errors(tmp_path / "model"):
        raise SafetensorError("invalid header")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("way", ["a step", "a folder"])
def test_weights_follow_the_umask(tmp_path, umask, way):
    before = os.umask(umask)
    try:
        if way == "a step":
            working = working_folder(tmp_path / "sft")
            save_policy(*tiny_policy(), working)
            complete(working, tmp_path / "sft", manifest={"fingerprint": "f"})
        else:
            with atomic_folder(tmp_path / "sft") as folder:
                save_policy(*tiny_policy(), folder)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "sft").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~umask}


# Killed while safetensors writes the weights, by a limit on the size of a file, and while a file appears
KILLED = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from align.artifacts import atomic_file
folder = Path(sys.argv[1])
with atomic_file(folder / "a.json") as partial:
    partial.write_text("half")
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    save_file({"a": torch.zeros(10_000_000)}, folder / "model.safetensors")
"""


def test_what_a_kill_left_of_a_file_is_removed(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert killed.returncode == -signal.SIGXFSZ
    left = {path.name for path in tmp_path.iterdir()}
    assert any(name.startswith(".tmp") for name in left) and any(name.startswith(".a.json.") for name in left)
    (tmp_path / ".hidden").write_text("kept")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden"}


def test_the_next_call_removes_what_killed_calls_left_in_a_run(tmp_path):
    run(tmp_path)
    root = tmp_path / "runs/small"
    left = [
        root / ".report.html.partial-0123abcd",
        root / "sft/.README.md.partial-0123abcd",
        root / "sft/.manifest.json.partial-0123abcd",
        next((root / "references").iterdir()) / f".{'0' * 64}.json.partial-0123abcd",
    ]
    for path in left:
        path.write_text("half")
    stale = root / "dpo.partial"
    (stale / "checkpoint-1").mkdir(parents=True)
    _, told = run(tmp_path)
    assert [path for path in (*left, stale) if path.exists()] == []
    assert "dpo: removed an unfinished attempt with other settings or inputs" in told.notes
    assert "dpo: finished before, skipped" in told.notes


@pytest.mark.parametrize("command", ["score", "generate"])
def test_the_next_call_of_a_command_removes_what_a_killed_one_left(model, tmp_path, command):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say a"}\n{"prompt": "say b"}\n')
    left = tmp_path / ".out.jsonl.partial-0123abcd"
    left.write_text("half")
    other = tmp_path / ".other.jsonl.partial-0123abcd"
    other.write_text("of a command that still runs")
    options = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    who = ["--model"] if command == "score" else ["--policy"]
    CliRunner().invoke(
        app, [command, *who, str(model), *options, *(["sampling.max_new_tokens=2"] * (command == "generate"))]
    )
    assert not left.exists() and other.exists()


def test_working_offline_changes_no_byte_of_a_policy(model, tmp_path):
    code = (
        "import sys; from pathlib import Path; from align.models.settings import PolicySettings;"
        "from align.models.policy import load_policy, save_policy;"
        "save_policy(*load_policy(PolicySettings(path=sys.argv[1])), Path(sys.argv[2]))"
    )
    call = [sys.executable, "-c", code, model, tmp_path / "0"]
    subprocess.run(call, check=True, env={**os.environ, "HF_HUB_OFFLINE": "0"})
    assert HF_HUB_OFFLINE  # in this process
    save_policy(*load_policy(PolicySettings(path=str(model))), tmp_path / "1")
    found = [{file.name: file.read_bytes() for file in (tmp_path / each).iterdir()} for each in "01"]
    assert found[0] == found[1]
    assert b"local_files_only" not in found[0]["tokenizer_config.json"]
