"""Token groups in files that are mapped into memory: written once, one after another, and read by index.

Tokens lie in an Arrow file, in batches; what is asked of all groups at once lies in columns of fixed width beside it.
Neither is ever in a process's own memory as a whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from align.artifacts import read_json, write_json
from align.data.token_groups import TokenGroup, TokenSequence

GROUPS_AT_ONCE = 256  # in an Arrow batch: 2 MB where rows are long
KEY_BYTES = 16  # of SHA-256
KEY = np.dtype(f"S{KEY_BYTES}")
# Of each group: its first sequence in the column of keys, its tree's tokens, and of its sequences the tokens, the
# trained tokens, and the tokens of the longest
GROUP = np.dtype([("start", "<i8"), ("tree", "<i4"), ("plain", "<i4"), ("trained", "<i4"), ("longest", "<i4")])
PACKED = struct.Struct("<qiiii")
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("lengths", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.int32())),  # of all sequences, one after another
        ("trained", pa.list_(pa.uint8())),
        ("rewards", pa.list_(pa.float64())),
        ("chosen", pa.int32()),
        ("attributes", pa.string()),  # JSON
        ("metadata", pa.string()),  # JSON
    ]
)
ROW, LENGTHS, IDS, TRAINED, REWARDS, CHOSEN, ATTRIBUTES, METADATA = range(len(SCHEMA))
TOKENS, GROUPS, KEYS, DIGEST = "tokens.arrow", "groups.bin", "keys.bin", "digest.json"

Count = Callable[[Sequence[TokenSequence]], int]  # tokens of the sequences' tree


def sequence_key(sequence: TokenSequence) -> str:
    """Thirty-two hex digits of the token ids and of which of them are trained."""
    return _key(sequence).hex()


def _key(sequence: TokenSequence) -> bytes:
    digest = hashlib.sha256(sequence.ids.astype("<i4").tobytes())
    digest.update(sequence.loss_mask.tobytes())
    return digest.digest()[:KEY_BYTES]


@dataclass(frozen=True, slots=True)
class Columns:
    """What is known of all groups without their tokens."""

    groups: NDArray[np.void]  # of GROUP
    keys: NDArray[np.bytes_]  # of each sequence, as `sequence_key` has it
    digest: str  # of all of the groups that decides a number

    def span(self, index: int) -> slice:
        """Where the sequences of a group lie in the column of keys."""
        starts = self.groups["start"]
        return slice(int(starts[index]), int(starts[index + 1]) if index + 1 < len(starts) else len(self.keys))


class _Table:
    """Columns as they are written."""

    def __init__(self, groups: BinaryIO, keys: BinaryIO, count: Count) -> None:
        self._groups, self._keys, self._count = groups, keys, count
        self._num_sequences, self._digest = 0, hashlib.sha256()

    def add(self, group: TokenGroup) -> None:
        keys, lengths = list(map(_key, group.sequences)), [len(sequence.ids) for sequence in group.sequences]
        self._keys.write(b"".join(keys))
        numbers = (self._count(group.sequences), sum(lengths), sum(group.response_lengths), max(lengths))
        self._groups.write(PACKED.pack(self._num_sequences, *numbers))
        self._num_sequences += len(keys)
        labels = [sorted(known.items()) for known in group.attributes]
        self._digest.update(repr((keys, group.rewards, group.chosen, labels)).encode())

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def columns_of(groups: Sequence[TokenGroup], count: Count) -> Columns:
    """The columns of the groups: those that lie beside a store, or those of a list, made here."""
    if isinstance(groups, TokenStore):
        return groups.columns
    lines, keys = io.BytesIO(), io.BytesIO()
    table = _Table(lines, keys, count)
    for group in groups:
        table.add(group)
    return Columns(np.frombuffer(lines.getvalue(), GROUP), np.frombuffer(keys.getvalue(), KEY), table.digest)


class StoreWriter:
    """Groups on their way into a store; `writing_store` makes one."""

    def __init__(self, tokens: Any, table: _Table) -> None:  # noqa: ANN401 - pyarrow has no types
        self._tokens, self._table = tokens, table
        self._waiting: list[tuple[TokenGroup, str | None]] = []
        self.number = 0

    def add(self, group: TokenGroup, metadata: Mapping[str, Any] | None = None) -> None:
        """Write a group, with what else is to be known of its row."""
        self._table.add(group)
        self._waiting.append((group, json.dumps(metadata, default=str) if metadata else None))
        self.number += 1
        if len(self._waiting) == GROUPS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, as a batch of its own."""
        if self._waiting:
            self._tokens.write_batch(_batch(self._waiting))
            self._waiting = []


def _batch(waiting: Sequence[tuple[TokenGroup, str | None]]) -> Any:  # noqa: ANN401 - pyarrow has no types
    groups = [group for group, _ in waiting]
    lengths = [[len(sequence.ids) for sequence in group.sequences] for group in groups]
    offsets = np.cumsum([0, *map(sum, lengths)], dtype=np.int32)
    ids = np.concatenate([sequence.ids for group in groups for sequence in group.sequences])
    trained = np.concatenate([sequence.loss_mask for group in groups for sequence in group.sequences])
    columns = [
        pa.array([group.row for group in groups], pa.int64()),
        pa.array(lengths, pa.list_(pa.int32())),
        pa.ListArray.from_arrays(offsets, ids),
        pa.ListArray.from_arrays(offsets, trained.view(np.uint8)),
        pa.array([group.rewards for group in groups], pa.list_(pa.float64())),
        pa.array([group.chosen for group in groups], pa.int32()),
        pa.array([json.dumps([*map(dict, group.attributes)]) if any(group.attributes) else None for group in groups]),
        pa.array([metadata for _, metadata in waiting], pa.string()),
    ]
    columns[ATTRIBUTES] = columns[ATTRIBUTES].cast(pa.string())
    return pa.record_batch(columns, schema=SCHEMA)


@contextmanager
def writing_store(folder: Path, count: Count) -> Generator[StoreWriter]:
    """A writer of the store `folder`, which is whole when the block has succeeded."""
    folder.mkdir(parents=True)
    with ExitStack() as files:
        lines, keys = (files.enter_context((folder / name).open("wb")) for name in (GROUPS, KEYS))
        table = _Table(lines, keys, count)
        writer = StoreWriter(files.enter_context(ipc.new_file(str(folder / TOKENS), SCHEMA)), table)
        yield writer
        writer.flush()
    write_json(folder / DIGEST, table.digest)


class TokenStore(Sequence[TokenGroup]):
    """The groups of a folder that `writing_store` has written, by index; each is made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.columns = Columns(
            mapped(folder / GROUPS, GROUP), mapped(folder / KEYS, KEY), str(read_json(folder / DIGEST))
        )
        self._file: Any = ipc.open_file(pa.memory_map(str(folder / TOKENS)))

    def __len__(self) -> int:
        return len(self.columns.groups)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return _group(*self._place(index))

    def __iter__(self) -> Iterator[TokenGroup]:
        for number in range(self._file.num_record_batches):
            batch = self._file.get_batch(number)
            for at in range(batch.num_rows):
                yield _group(batch, at)

    def metadata(self, index: int) -> dict[str, Any]:
        """What else was kept of a group's row."""
        batch, at = self._place(index)
        told = batch.column(METADATA)[at].as_py()
        return json.loads(told) if told is not None else {}

    def _place(self, index: int) -> tuple[Any, int]:
        place = range(len(self))[index]  # or an IndexError
        return self._file.get_batch(place // GROUPS_AT_ONCE), place % GROUPS_AT_ONCE


def mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """The numbers of a file, mapped into memory."""
    if not path.stat().st_size:  # which cannot be mapped
        return np.empty(0, kind)
    return np.memmap(path, kind, mode="r").view(np.ndarray)


def _group(batch: Any, at: int) -> TokenGroup:  # noqa: ANN401 - pyarrow has no types
    ends = np.cumsum(batch.column(LENGTHS)[at].as_py())
    ids = batch.column(IDS)[at].values.to_numpy().copy()  # of the file's own memory nothing may be changed
    trained = batch.column(TRAINED)[at].values.to_numpy().view(np.bool_).copy()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    rewards, attributes = batch.column(REWARDS)[at].as_py(), batch.column(ATTRIBUTES)[at].as_py()
    return TokenGroup(
        sequences=tuple(TokenSequence(ids[start:end], trained[start:end]) for start, end in bounds),
        rewards=tuple(rewards) if rewards is not None else None,
        chosen=batch.column(CHOSEN)[at].as_py(),
        attributes=tuple(json.loads(attributes)) if attributes is not None else ({},) * len(bounds),
        row=batch.column(ROW)[at].as_py(),
    )
