"""Rows of a file, a folder or a Hugging Face dataset, each with its place."""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from align.artifacts import UNHASHED_FILES
from align.data.columns import missing_column, renamed
from align.data.file_types import BadRow, file_rows, known_suffixes, opener_of
from align.data.strict_json import from_columns
from align.errors import InputError, RunError, one_line
from align.records import Located
from align.storage.disk_errors import UNREADABLE, error_code

DATASET_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # of `save_to_disk`
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![A-Za-z0-9])")
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?")


def read_rows(
    path: str, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, a folder or a Hugging Face dataset (`owner/name` or `owner/name:config`).

    `columns` renames columns, as in `renamed`. Raise `InputError` for a row that cannot be used.
    """
    for number, located in enumerate(located_rows(path, split=split)):
        row = located.record
        if isinstance(row, BadRow):
            raise InputError(f"{located.place}: {row.message}")
        if columns and number == 0 and (error := missing_column(row, columns, columns)):
            raise InputError(f"{located.place}: {error}")
        yield renamed(row, columns).row if columns else row


def located_rows(path: str, *, split: str | None = None) -> Iterator[Located[dict[str, Any] | BadRow]]:
    """Yield the rows of `path` in order, each with its place. A JSON string becomes a row with a `prompt`.

    Raise `InputError` for a path that does not exist, a folder with several splits of which none is named, and
    content that cannot be read.
    """
    if (hub_id := hub_dataset(path)) is not None:
        yield from hub_rows(hub_id["name"], config=hub_id["config"], split=split)
        return
    for file in _files(Path(path), split):
        num_rows = 0
        try:
            for num_rows, value in enumerate(file_rows(file), start=1):
                row = _as_row(value)
                line = row.line if isinstance(row, BadRow) else None
                yield Located(row, f"{file}: row {num_rows}" if line is None else f"{file}: line {line}")
        except (InputError, GeneratorExit):  # the reader of the rows may end before them
            raise
        except _read_errors() as error:
            if error_code(error) in UNREADABLE:
                raise RunError(f"{file}: cannot be read after row {num_rows}: {one_line(error)}") from error
            raise InputError(f"{file}: cannot be read after row {num_rows}: {one_line(error)}") from error


def rows_in_memory(rows: Iterable[Any], name: str) -> Iterator[Located[dict[str, Any] | BadRow]]:
    """Yield dicts, such as the rows of a `datasets.Dataset`, each with its place; `name` is that of the rows."""
    for number, row in enumerate(rows, start=1):
        yield Located(from_columns(_as_row(dict(row) if isinstance(row, Mapping) else row)), f"{name}: row {number}")


def hub_dataset(path: str) -> re.Match[str] | None:
    """Return the match of a path that names a dataset of the Hub: nothing on this machine, and no data file."""
    if Path(path).exists() or opener_of(Path(path)) is not None:
        return None
    return HUB_ID.fullmatch(path)


def hub_rows(name: str, *, config: str | None, split: str | None) -> Iterator[Located[dict[str, Any] | BadRow]]:
    """Yield the rows of a dataset as `datasets.load_dataset` returns it. Code in its repository is not run."""
    from datasets import Dataset, load_dataset  # noqa: PLC0415 - seconds to import, and only hub ids need it
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    try:
        loaded = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(
            f"{name}: no such file or folder, and no dataset of that id could be loaded: {one_line(error)}"
        ) from error
    splits: dict[Any, Any] = {"": loaded} if isinstance(loaded, Dataset) else dict(loaded)
    if len(splits) != 1:
        raise InputError(f"{name}: name one of its splits: {', '.join(splits)}")
    for number, row in enumerate(next(iter(splits.values())), start=1):
        yield Located(from_columns(dict(row)), f"{name}: row {number}")


def _read_errors() -> tuple[type[Exception], ...]:
    """Return what the readers of files raise for content that cannot be read."""
    from pyarrow import ArrowException  # noqa: PLC0415 - a tenth of a second to import, and only errors need it

    return (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error, ArrowException)


def _files(path: Path, split: str | None) -> list[Path]:
    """Return the data files of a path, sorted by name. Files of two splits are never mixed."""
    if path.is_file():
        if split is not None:
            raise InputError(f"{path}: a file has no split {split!r}; leave split out, or name a folder or hub dataset")
        return [path]
    if not path.is_dir():
        is_url = re.match(r"\w+:/", str(path))  # Path has removed one slash
        raise InputError(f"{path}: no such file or folder" + ("; a Hub dataset is named owner/name" if is_url else ""))
    inside = {file: file.relative_to(path).parts for file in sorted(path.rglob("*")) if _is_data(file, path)}
    if split is None:
        splits = {match[1] for parts in inside.values() for part in parts if (match := SPLIT.match(part))}
        if len(splits) > 1:
            raise InputError(f"{path}: contains several splits; name one of {', '.join(sorted(splits))}")
        chosen = list(inside)
    else:
        wanted = re.compile(re.escape(split) + r"(?![A-Za-z0-9])")
        chosen = [file for file, parts in inside.items() if any(wanted.match(part) for part in parts)]
    if not chosen:
        of_split = f" of split {split!r}" if split else ""
        raise InputError(f"{path}: no data file{of_split} in this folder; data files end in {known_suffixes()}")
    return chosen


def _is_data(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    is_cache = file.name.startswith("cache-") and file.suffix == ".arrow"  # a result of `datasets`' map or filter
    is_excluded = is_cache or file.name in (*DATASET_FILES, *UNHASHED_FILES)
    return file.is_file() and not is_hidden and not is_excluded and opener_of(file) is not None


def _as_row(value: Any) -> dict[str, Any] | BadRow:  # noqa: ANN401 - any JSON type
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict | BadRow):
        array = "; a file that is one JSON array must end in .json" if isinstance(value, list) else ""
        return BadRow(f"the row is of type {type(value).__name__}; it must be an object with named columns{array}")
    return cast("dict[str, Any] | BadRow", value)
