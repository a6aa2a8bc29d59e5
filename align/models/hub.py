"""Push a model's folder to the Hugging Face Hub. A dry run uses no network."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from align.artifacts import check_content
from align.errors import InputError, RunError, one_line
from align.models.model_card import README, hub_id

# The files of a model; anything else in a step's folder, such as data or logs, stays local
MODEL_FILES = (
    README,
    "LICENSE*",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "made_of.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates"  # folder of a tokenizer's named chat templates


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What a push uploads, or would upload."""

    repo: str
    private: bool
    files: tuple[tuple[str, int], ...]  # name and size in bytes
    skipped: tuple[str, ...]  # names of files and folders that are not part of the model
    problems: tuple[str, ...]  # of the model card
    url: str | None  # of the commit; None for a dry run

    @property
    def num_bytes(self) -> int:
        """Return the total size of the files."""
        return sum(size for _, size in self.files)


def push_folder(folder: Path, repo: str, *, private: bool = False, dry_run: bool = False) -> Push:
    """Upload the model in a folder to the Hub repository `owner/name`, which is created if it does not exist.

    Only the files of the model are uploaded. A dry run returns the same lists without network access. Problems of the
    model card are returned and do not stop the upload.

    Raises `InputError` for a folder without a model, an invalid repository name, or `private` with a repository that
    is public; `RunError` if the Hub rejects the upload or cannot be reached.
    """
    _check(folder, repo)
    templates = {f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")}
    own = {path.name for path in folder.iterdir() if path.is_file() and _is_model_file(path.name)}
    names = sorted(own | templates)
    skipped = tuple(sorted({path.name for path in folder.iterdir()} - own - ({TEMPLATES} if templates else set())))
    url = None if dry_run else _upload(folder, repo, names, private=private)
    return Push(
        repo=repo,
        private=private,
        files=tuple((name, (folder / name).stat().st_size) for name in names),
        skipped=skipped,
        problems=tuple(card_problems(folder)),
        url=url,
    )


def card_problems(folder: Path) -> list[str]:
    """Return what is missing or wrong in a folder's model card; empty if nothing is."""
    try:
        text = (folder / README).read_text("utf-8")
        front_matter = metadata_load(folder / README)
    except FileNotFoundError:
        return [f"{README} is missing"]
    except (ValueError, YAMLError) as error:
        return [f"{README} has invalid front matter: {one_line(error)[:200]}"]
    if not front_matter:
        return [f"{README} has no front matter"]
    problems = [f"{README} states no {key}" for key in ("license", "base_model") if not front_matter.get(key)]
    base = front_matter.get("base_model")
    if isinstance(base, str) and hub_id(base) is None:
        problems.append(f"base_model is not a Hub ID: {base!r}")
    local = (str(Path.home()), str(folder.resolve().parent))
    problems += [f"{README} contains a local path: {path}" for path in dict.fromkeys(local) if f"{path}/" in text]
    return problems


def _check(folder: Path, repo: str) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{folder} is not a model's folder: it has no config.json or adapter_config.json")
    check_content(folder)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
        raise InputError(f"{folder} has no weights (*.safetensors or *.gguf)")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"invalid repository {repo!r}: {one_line(error)}") from error
    if "/" not in repo:
        raise InputError(f"the repository must be of the form owner/name, not {repo!r}")


def _is_model_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def _upload(folder: Path, repo: str, names: list[str], *, private: bool) -> str:
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        # An existing repository keeps its visibility
        if private and not api.model_info(repo).private:
            raise InputError(f"the repository {repo} exists and is public; make it private, or push without private")
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message=f"Upload {folder.name} with align"
        )
    except (OSError, httpx2.HTTPError) as error:
        raise RunError(f"pushing {folder} to {repo} failed: {one_line(error)[:300]}") from error
    return str(commit.commit_url)
