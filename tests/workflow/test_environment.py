import json
import subprocess

from align.workflow.environment import command_line, environment


def git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    return subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_command_is_recorded_without_folders_and_without_secrets():
    assert command_line(["/opt/bin/align", "run", "a b.yaml"]) == "align run 'a b.yaml'"
    assert command_line(["/x/align/__main__.py", "run"]) == "python -m align run"
    given = ["align", "run", "steps.rate.judges.0.settings.api_key=sk-123", "engine.server.Token=abc", "run=key"]
    text = command_line(given)
    assert "sk-123" not in text and "abc" not in text
    assert text.endswith("run=key")
    plain = "sampling.max_new_tokens=64 train.tokens_per_micro_batch=512 policy.tokenizer=org/base pre_tokenizer=qwen2"
    assert command_line(["align", *plain.split()]) == f"align {plain}"
    hidden = command_line(["align", "body.tokens=5ecret", "tokenizer_key=abc"])
    assert hidden == "align 'body.tokens=***' 'tokenizer_key=***'"


def test_the_commit_is_that_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git_commit"] is None and environment()["git_changed"] is None
    git(tmp_path, "init")
    (tmp_path / "recipe.yaml").write_text("run: a\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    found = environment()
    assert found["git_commit"] == git(tmp_path, "rev-parse", "HEAD").strip()
    assert found["git_changed"] is False
    (tmp_path / "recipe.yaml").write_text("run: b\n")
    assert environment()["git_changed"] is True
    assert json.loads(json.dumps(found)) == found and found["host"] and found["device"]


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["git_commit"] is None
