"""What a step reads, opened before any step runs: first rows, models, and other files. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from align.artifacts import check_not_removed
from align.content_hash import GGUF, STEP
from align.data.readers.pairs import LABELLED_RESPONSE, LIKED
from align.errors import InputError, one_line
from align.records import Comparison, Demonstration, Located, Prompt, Record
from align.stages.inputs.sources import SourceSettings, check_end, streamed

FIRST_ROWS = 8  # that every step must be able to read
SEARCHED_ROWS = 1000  # among which one at least must be of use
MODEL_FILES = ("config.json", "adapter_config.json")
KINDS = {Demonstration: "a demonstration", Comparison: "a comparison", Prompt: "a prompt without a response"}


def first_records(source: SourceSettings, number: int = FIRST_ROWS) -> Iterator[Located[Record]]:
    """Yield the first records of a file of rows; none of procedural rows, which only need an end."""
    if source.is_procedural:
        check_end(source)
        return
    in_file = source.model_copy(update={"order": "file"})  # not the whole file
    yield from islice(streamed(in_file, kind=Prompt, seed=0).records, number)


def check_kind(located: Located[Record], kind: type[Demonstration | Comparison], stage: str) -> None:
    """Raise for a record that a step of this stage cannot train on."""
    record = located.record
    if isinstance(record, Comparison if kind is Comparison else Demonstration | Comparison):
        return
    needs = {
        Demonstration: "demonstrations: messages, or a prompt with a completion",
        Comparison: "comparisons of responses: a prompt with chosen and rejected, or with scored responses",
    }
    raise InputError(f"{located.place}: the row is {KINDS[type(record)]}, and {stage} needs {needs[kind]}")


def lack_of_kind(
    located: Located[Record], kind: type[Demonstration | Comparison], stage: str, *, skips: bool
) -> str | None:
    """Return why a step cannot train on a record of another kind, None for one of its kind; raise if it skips none."""
    try:
        check_kind(located, kind, stage)
    except InputError as error:
        if not skips:
            raise
        return error.message
    return None


def lack_of_preference(record: Record, *, needs_rewards: bool) -> str | None:
    """Return why no response of a comparison is known to be better than another; None if one is."""
    assert isinstance(record, Comparison)
    rewards = {response.reward for response in record.responses}
    if len(record.responses) < 2 and LIKED in record.metadata:  # noqa: PLR2004 - a comparison takes two
        return f"the row is {LABELLED_RESPONSE}"
    if len(record.responses) < 2:  # noqa: PLR2004
        return "the row has one response, and a comparison needs two"
    if record.chosen is not None or len(rewards) > 1 or (needs_rewards and None not in rewards):
        return None
    return "the responses have no rewards" if None in rewards else "all rewards of a row are equal"


def open_model(path: str) -> None:
    """Raise for a model that is on this machine and cannot be one; a Hub id is not looked up."""
    if path.startswith(STEP):
        return
    file = Path(path.removeprefix(GGUF)).expanduser()
    if path.startswith(GGUF):
        if not file.is_file():
            raise InputError(f"no such GGUF file: {file}")
    elif file.is_file():
        form = f"write {GGUF}{path}" if file.suffix == ".gguf" else f"name its folder, or {GGUF}FILE"
        raise InputError(f"{path} is a file, and a model is a folder or a Hub id; {form}")
    elif file.is_dir():
        _check_folder(file)
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(f"{path}: no such folder; a model is a folder, a Hub id (owner/name) or {GGUF}FILE")


def _check_folder(folder: Path) -> None:
    """Raise for a folder that holds no model, or whose weights were removed."""
    check_not_removed(folder)
    configs = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    if not configs:
        inside = [
            path.name for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in MODEL_FILES)
        ]
        of_run = f"; name one of its folders: {', '.join(inside)}" if inside else ""
        raise InputError(f"{folder} holds no model: it has no {' and no '.join(MODEL_FILES)}{of_run}")
    try:
        json.loads(configs[0].read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{configs[0]} cannot be read as JSON: {error}") from error


def open_file(path: str) -> None:
    """Raise for a file or folder that is not there or cannot be opened."""
    try:
        if not Path(path).is_dir():
            Path(path).open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or one_line(error)}") from error
