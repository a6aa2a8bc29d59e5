"""A folder of token groups that is written once and read by index through memory-mapped files.

Tokens are in an Arrow file, in batches. Token counts, sequence keys and a content hash are in columns beside it
(`align.data.group_columns`). No process holds either in its own memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from align.artifacts import read_json, write_json
from align.data.group_columns import (
    GROUP,
    KEY,
    ColumnWriter,
    GroupColumns,
    TreeSize,
    compute_columns,
    memory_map,
)
from align.data.token_groups import LazyGroups, TokenGroup, TokenSequence

GROUPS_PER_BATCH = 256  # about 2 MB where rows are long
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("lengths", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.int32())),  # of all sequences, concatenated
        ("loss_mask", pa.list_(pa.uint8())),
        ("rewards", pa.list_(pa.float64())),
        ("chosen", pa.int32()),
        ("is_cut", pa.list_(pa.bool_())),
        ("attributes", pa.string()),  # JSON
        ("metadata", pa.string()),  # JSON
    ]
)
ROW, LENGTHS, IDS, LOSS_MASK, REWARDS, CHOSEN, IS_CUT, ATTRIBUTES, METADATA = range(len(SCHEMA))
TOKENS, GROUPS, KEYS, DIGEST = "tokens.arrow", "groups.bin", "keys.bin", "digest.json"


class StoreWriter:
    """Write groups to a store; made by `writing_store`. `num_groups` counts them."""

    def __init__(self, tokens: Any, columns: ColumnWriter) -> None:  # noqa: ANN401 - pyarrow has no types
        self._tokens, self._columns = tokens, columns
        self._batch: list[tuple[TokenGroup, str | None]] = []
        self.num_groups = 0

    def add(self, group: TokenGroup, metadata: Mapping[str, Any] | None = None) -> None:
        """Write a group with its row's metadata, of which values that JSON cannot represent become text."""
        self._columns.add(group)
        self._batch.append((group, json.dumps(metadata, default=str) if metadata else None))
        self.num_groups += 1
        if len(self._batch) == GROUPS_PER_BATCH:
            self.flush()

    def flush(self) -> None:
        """Flush the buffered groups as one Arrow record batch."""
        if self._batch:
            self._tokens.write_batch(_record_batch(self._batch))
            self._batch = []


def _record_batch(batch: Sequence[tuple[TokenGroup, str | None]]) -> Any:  # noqa: ANN401 - pyarrow has no types
    groups = [group for group, _ in batch]
    lengths = [[len(sequence.ids) for sequence in group.sequences] for group in groups]
    offsets = np.cumsum([0, *map(sum, lengths)], dtype=np.int32)
    ids = np.concatenate([sequence.ids for group in groups for sequence in group.sequences])
    masks = np.concatenate([sequence.loss_mask for group in groups for sequence in group.sequences])
    attributes = [json.dumps([*map(dict, group.attributes)]) if any(group.attributes) else None for group in groups]
    columns = [
        pa.array([group.row for group in groups], pa.int64()),
        pa.array(lengths, pa.list_(pa.int32())),
        pa.ListArray.from_arrays(offsets, ids),
        pa.ListArray.from_arrays(offsets, masks.view(np.uint8)),
        pa.array([group.rewards for group in groups], pa.list_(pa.float64())),
        pa.array([group.chosen for group in groups], pa.int32()),
        pa.array([[sequence.is_cut for sequence in group.sequences] for group in groups], pa.list_(pa.bool_())),
        pa.array(attributes, pa.string()),
        pa.array([metadata for _, metadata in batch], pa.string()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


@contextmanager
def writing_store(folder: Path, tree_size: TreeSize) -> Generator[StoreWriter]:
    """Yield a writer of the new store `folder`, which is complete when the block ends without an exception.

    `tree_size` returns the number of tokens that the tree forward computes for a group's sequences.
    """
    folder.mkdir(parents=True)
    with ExitStack() as files:
        lines, keys = (files.enter_context((folder / name).open("wb")) for name in (GROUPS, KEYS))
        columns = ColumnWriter(lines, keys, tree_size)
        writer = StoreWriter(files.enter_context(ipc.new_file(str(folder / TOKENS), SCHEMA)), columns)
        yield writer
        writer.flush()
    write_json(folder / DIGEST, columns.digest)


class TokenStore(LazyGroups):
    """The groups of a folder that `writing_store` has written, by index; each is decoded when it is accessed."""

    def __init__(self, folder: Path) -> None:
        self.columns = GroupColumns(
            memory_map(folder / GROUPS, GROUP), memory_map(folder / KEYS, KEY), str(read_json(folder / DIGEST))
        )
        self._file: Any = ipc.open_file(pa.memory_map(str(folder / TOKENS)))

    def __len__(self) -> int:
        return len(self.columns.groups)

    def group(self, index: int) -> TokenGroup:
        """Return a decoded group."""
        return _decode(*self._locate(index))

    def __iter__(self) -> Iterator[TokenGroup]:
        for number in range(self._file.num_record_batches):
            batch = self._file.get_batch(number)
            for position in range(batch.num_rows):
                yield _decode(batch, position)

    def metadata(self, index: int) -> dict[str, Any]:
        """Return the metadata of a group's row; its tokens are not decoded."""
        batch, position = self._locate(index)
        text = batch.column(METADATA)[position].as_py()
        return json.loads(text) if text is not None else {}

    def _locate(self, index: int) -> tuple[Any, int]:
        """Return the batch of a group and its position in it."""
        index = range(len(self))[index]  # raises IndexError
        return self._file.get_batch(index // GROUPS_PER_BATCH), index % GROUPS_PER_BATCH


def columns_of(groups: Sequence[TokenGroup], tree_size: TreeSize) -> GroupColumns:
    """Return the columns of a store as written, or compute those of a list."""
    return groups.columns if isinstance(groups, TokenStore) else compute_columns(groups, tree_size)


def _decode(batch: Any, position: int) -> TokenGroup:  # noqa: ANN401 - pyarrow has no types
    ends = np.cumsum(batch.column(LENGTHS)[position].as_py())
    ids = batch.column(IDS)[position].values.to_numpy().copy()  # the mapped file itself is read-only
    mask = batch.column(LOSS_MASK)[position].values.to_numpy().view(np.bool_).copy()
    is_cut = batch.column(IS_CUT)[position].as_py()
    bounds = list(zip([0, *ends[:-1]], ends, is_cut, strict=True))
    rewards, attributes = batch.column(REWARDS)[position].as_py(), batch.column(ATTRIBUTES)[position].as_py()
    return TokenGroup(
        sequences=tuple(TokenSequence(ids[start:end], mask[start:end], cut) for start, end, cut in bounds),
        rewards=tuple(rewards) if rewards is not None else None,
        chosen=batch.column(CHOSEN)[position].as_py(),
        attributes=tuple(json.loads(attributes)) if attributes is not None else ({},) * len(bounds),
        row=batch.column(ROW)[position].as_py(),
    )
