import socket
from types import SimpleNamespace

import httpx2
import pytest

from align.errors import InputError, RunError
from align.models import hub
from align.models.hub import card_problems, push_folder
from align.models.model_card import CardContent, write_model_card

FILES = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}", "chat_template.jinja": ""}
LOCAL = {"manifest.json": "{}", "metrics.jsonl": "{}", "launch.log": "", "rows.jsonl": "private"}


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "dpo"
    model.mkdir()
    for name, text in (FILES | LOCAL).items():
        (model / name).write_text(text)
    (model / "checkpoints").mkdir()
    write_model_card(model, CardContent(title="t", kind="policy", base="owner/base"))
    return model


class FakeApi:
    """A replacement of HfApi that records calls."""

    def __init__(self, *, is_private=True, error=None):
        self.calls, self.is_private, self.error = [], is_private, error

    def create_repo(self, repo, **options):
        self.calls.append(("create_repo", repo, options))

    def model_info(self, repo):
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def api(monkeypatch):
    fake = FakeApi()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    return fake


def test_a_dry_run_lists_files_and_problems_without_network(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    push = push_folder(folder, "me/model", private=True, dry_run=True)
    assert dict(push.files) == {name: (folder / name).stat().st_size for name in [*FILES, "README.md"]}
    assert push.num_bytes == sum(size for _, size in push.files)
    assert set(push.skipped) == {*LOCAL, "checkpoints"}
    assert push.problems == ("README.md states no license",)
    assert push.url is None


def test_a_push_uploads_the_model_and_nothing_else(folder, api):
    push = push_folder(folder, "me/model", private=True)
    (_, repo, options), (_, upload) = api.calls
    assert (repo, options) == ("me/model", {"private": True, "exist_ok": True})
    assert upload["repo_id"] == "me/model" and upload["folder_path"] == folder
    assert set(upload["allow_patterns"]) == {*FILES, "README.md"}
    assert push.url == "https://hub/commit/1"


def test_a_private_push_to_a_public_repository_is_an_error(folder, api):
    api.is_private = False
    with pytest.raises(InputError, match="me/model exists and is public"):
        push_folder(folder, "me/model", private=True)
    assert [name for name, *_ in api.calls] == ["create_repo"]
    push_folder(folder, "me/model")


@pytest.mark.parametrize(
    "error", [httpx2.ConnectError("no route\nto host"), PermissionError("401"), OSError("offline")]
)
def test_a_failed_upload_is_one_line(folder, api, error):
    api.error = error
    with pytest.raises(RunError, match="pushing .*dpo to me/model failed: ") as caught:
        push_folder(folder, "me/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("repo", ["", "model", "a/b/c", "me/mo del", "me/-x", "me/a--b"])
def test_an_invalid_repository_is_an_error_before_any_upload(folder, api, repo):
    with pytest.raises(InputError, match="repository"):
        push_folder(folder, repo)
    assert api.calls == []


def test_a_folder_without_a_model_is_an_error(folder):
    with pytest.raises(InputError, match="no such folder"):
        push_folder(folder / "nowhere", "me/model", dry_run=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        push_folder(folder, "me/model", dry_run=True)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="is not a model's folder"):
        push_folder(folder, "me/model", dry_run=True)


def test_problems_of_a_card_are_named(folder):
    readme = folder / "README.md"
    readme.write_text(f"---\nlicense: mit\nbase_model: /models/base\n---\nFrom {folder.parent}/sft.\n")
    assert card_problems(folder) == [
        "base_model is not a Hub ID: '/models/base'",
        f"README.md contains a local path: {folder.parent}",
    ]
    readme.write_text("---\nlicense: [\n---\n")
    assert card_problems(folder)[0].startswith("README.md has invalid front matter")
    readme.write_text("# No front matter\n")
    assert card_problems(folder) == ["README.md has no front matter"]
    readme.unlink()
    assert card_problems(folder) == ["README.md is missing"]


def test_named_chat_templates_are_part_of_the_model(folder):
    (folder / hub.TEMPLATES).mkdir()
    (folder / hub.TEMPLATES / "tool_use.jinja").write_text("{{ 1 }}")
    (folder / hub.TEMPLATES / "notes.txt").write_text("private")
    before = push_folder(folder, "owner/name", dry_run=True)
    assert ("additional_chat_templates/tool_use.jinja", 7) in before.files
    assert not any("notes" in name for name, _ in before.files)
    assert "additional_chat_templates" not in before.skipped and "checkpoints" in before.skipped
