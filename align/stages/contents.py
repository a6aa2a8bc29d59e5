"""What stands behind the names in settings: the content of files and folders, and of a user's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.artifacts import fingerprint
from align.models.settings import GGUF
from align.registry import module_file
from align.rewards.settings import JudgeSettings
from align.stages.steps import PROCEDURAL

NO_FILE = (PROCEDURAL, "step:")  # how names of other things begin


def content_of(path: str) -> str:
    """The content hash of a local file or folder, or of the module with a user's own piece, named as module:name.

    A hub id, a built-in's name or a server's name for a model stands for itself.
    """
    if path.startswith(NO_FILE) or not path:
        return path
    there = None
    with suppress(OSError, RuntimeError):  # no text of a path: too long, or of nobody's home
        local = Path(path.removeprefix(GGUF)).expanduser()
        there = local if local.exists() else None
    return code_of(path) if there is None else fingerprint(there)


def code_of(name: str) -> str:
    """The name, with the content hash of the module behind it where it is module:name."""
    code = None if name.startswith((*NO_FILE, GGUF)) else module_file(name)
    return name if code is None else f"{name} {fingerprint(code)}"


def contents_of(judge: JudgeSettings, content_of: Callable[[str], str] = content_of) -> list[str]:
    """What a judge is made of besides its settings: the files, folders and modules that they name."""
    return [code_of(judge.name), *map(content_of, _texts_of(judge.cache_key()["settings"]))]


def _texts_of(settings: Any) -> Iterator[str]:  # noqa: ANN401 - JSON holds any type
    if isinstance(settings, str):
        yield settings
    for each in settings.values() if isinstance(settings, Mapping) else settings if isinstance(settings, list) else ():
        yield from _texts_of(each)
