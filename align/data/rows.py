"""Files to rows: JSON, JSON lines, CSV, Parquet and Arrow, each also gzipped; a folder of those; a hub dataset id."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
from pyarrow import ipc, parquet

from align.artifacts import UNHASHED_FILES
from align.errors import InputError, one_line
from align.records import Located

Row = Mapping[str, Any]


CONTAINERS = ("data", "rows", "examples", "records", "prompts")  # keys under which a JSON object keeps its rows
SAVED_BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # by `save_to_disk`
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![A-Za-z0-9])")
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?")
UNREADABLE = (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error, pa.ArrowException)


def read_rows(path: str, *, split: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file, a folder or a hub dataset (`owner/name` or `owner/name:config`), as they stand."""
    return (located.record for located in located_rows(path, split=split))


def located_rows(path: str, *, split: str | None = None) -> Iterator[Located[dict[str, Any]]]:
    """The rows of `path` in order, each with its place; a bare JSON string is read as a row with a `prompt`."""
    hub_id = HUB_ID.fullmatch(path)
    if not Path(path).exists() and hub_id and _opener(Path(path)) is None:
        yield from hub_rows(hub_id["name"], config=hub_id["config"], split=split)
        return
    for file in _files(Path(path), split):
        num_rows = 0
        try:
            for num_rows, row in enumerate(_file_rows(file), start=1):
                place = f"{file}: row {num_rows}"
                yield Located(_as_row(row, place), place)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(f"{file}: cannot be read after row {num_rows}: {one_line(error)}") from error


def hub_rows(name: str, *, config: str | None, split: str | None) -> Iterator[Located[dict[str, Any]]]:
    """The rows of the dataset `name` as `datasets` loads it; no code of the dataset's own is run."""
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
        yield Located(dict(row), f"{name}: row {number}")


def _files(path: Path, split: str | None) -> list[Path]:
    """The data files that `path` stands for, in the order of their names; two splits are never mixed."""
    if path.is_file():
        if split is not None:
            raise InputError(f"{path}: a file has no split {split!r}; leave split out, or name a folder or hub dataset")
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    inside = {file: file.relative_to(path).parts for file in sorted(path.rglob("*")) if _is_data(file, path)}
    if split is None:
        found = {match[1] for parts in inside.values() for part in parts if (match := SPLIT.match(part))}
        if len(found) > 1:
            raise InputError(f"{path}: holds several splits; name one of {', '.join(sorted(found))}")
        chosen = list(inside)
    else:
        wanted = re.compile(re.escape(split) + r"(?![A-Za-z0-9])")
        chosen = [file for file, parts in inside.items() if any(wanted.match(part) for part in parts)]
    if not chosen:
        of_split = f" of split {split!r}" if split else ""
        raise InputError(f"{path}: no file{of_split} here; data files end in {', '.join(OPENERS)}, or that and .gz")
    return chosen


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return (
        file.is_file()
        and not hidden
        and file.name not in (*SAVED_BESIDE, *UNHASHED_FILES)
        and _opener(file) is not None
    )


def _opener(file: Path) -> Callable[[BinaryIO, Path], Iterator[Any]] | None:
    return OPENERS.get(Path(file.name.removesuffix(".gz")).suffix.lower())


def _file_rows(file: Path) -> Iterator[Any]:
    opener = _opener(file)
    if opener is None:
        raise InputError(f"{file}: not a data file; those end in {', '.join(OPENERS)}, or that and .gz")
    with file.open("rb") as stream:
        yield from opener(cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if file.suffix == ".gz" else stream, file)


def _as_row(value: Any, place: str) -> dict[str, Any]:  # noqa: ANN401 - whatever the file holds
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise InputError(f"{place} is a {type(value).__name__}; a row is an object with named columns")
    return cast(dict[str, Any], value)


def _line_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except json.JSONDecodeError as error:
                raise _not_json(error, file, number) from error


def _json_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    """The items of a list, those of the list that an object keeps under a name of `CONTAINERS`, or lines."""
    content = stream.read()
    try:
        value = json.loads(content.decode("utf-8-sig")) if content.strip() else []
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise _not_json(error, file, error.lineno) from error
        value = _line_rows(cast(BinaryIO, io.BytesIO(content)), file)
    if isinstance(value, dict):
        held = {key: value[key] for key in CONTAINERS if isinstance(value.get(key), list)}
        filled = [key for key, rows in held.items() if rows]
        if len(filled) > 1:
            raise InputError(f"{file}: holds several lists of rows, {' and '.join(filled)}; keep one of them")
        value = held[filled[0]] if filled else [] if held else [value]
    yield from value


def _not_json(error: json.JSONDecodeError, file: Path, line: int) -> InputError:
    return InputError(f"{file}: line {line}: not valid JSON ({error.msg}, column {error.colno})")


def _csv_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # a dialogue may be longer than the 128 KiB that are the default
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, strict=True)
        twice = [name for name, times in Counter(rows.fieldnames or ()).items() if times > 1]
        if twice:
            raise InputError(f"{file}: the header names the column {twice[0]!r} more than once")
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error("the next row has more or fewer fields than the header")
            yield row


def _parquet_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    for batch in parquet.ParquetFile(io.BytesIO(stream.read()) if file.suffix == ".gz" else stream).iter_batches():
        yield from batch.to_pylist()


def _arrow_rows(stream: BinaryIO, _: Path) -> Iterator[Any]:
    content = stream.read()
    is_file = content.startswith(b"ARROW1")  # Arrow has a file form and a stream form; `datasets` writes streams
    table = ipc.open_file(content).read_all() if is_file else ipc.open_stream(content).read_all()
    yield from table.to_pylist()


OPENERS: dict[str, Callable[[BinaryIO, Path], Iterator[Any]]] = {
    ".json": _json_rows,
    ".jsonl": _line_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
