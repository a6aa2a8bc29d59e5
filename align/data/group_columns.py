"""Numbers of all token groups of a store, in columns of fixed width: token counts, sequence keys and a content hash."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from align.data.token_groups import TokenGroup, TokenSequence

KEY_BYTES = 16  # of a SHA-256 digest
KEY = np.dtype(f"S{KEY_BYTES}")
# Per group: index of its first sequence in the column of keys; tokens of its tree; tokens of its sequences; tokens in
# the loss; tokens of its longest sequence
GROUP = np.dtype([("start", "<i8"), ("tree", "<i4"), ("plain", "<i4"), ("trained", "<i4"), ("longest", "<i4")])
PACKED_GROUP = struct.Struct("<qiiii")

TreeSize = Callable[[Sequence[TokenSequence]], int]  # tokens of the sequences' prefix tree


def sequence_key(sequence: TokenSequence) -> str:
    """Return a hash of a sequence's token ids and loss mask, 32 hexadecimal digits."""
    return _key(sequence).hex()


def _key(sequence: TokenSequence) -> bytes:
    digest = hashlib.sha256(sequence.ids.astype("<i4").tobytes())
    digest.update(sequence.loss_mask.tobytes())
    return digest.digest()[:KEY_BYTES]


@dataclass(frozen=True, slots=True)
class GroupColumns:
    """Numbers of N groups with S sequences in total, without their tokens."""

    groups: NDArray[np.void]  # of GROUP, shape [N]
    keys: NDArray[np.bytes_]  # `sequence_key` of each sequence, shape [S]
    digest: str  # hash of everything that affects training: tokens, masks, rewards, labels, attributes

    def span(self, index: int) -> slice:
        """Return the range of a group's sequences in the column of keys."""
        starts = self.groups["start"]
        return slice(int(starts[index]), int(starts[index + 1]) if index + 1 < len(starts) else len(self.keys))


class ColumnWriter:
    """Write the columns of groups to two binary files."""

    def __init__(self, groups: BinaryIO, keys: BinaryIO, tree_size: TreeSize) -> None:
        self._groups, self._keys, self._tree_size = groups, keys, tree_size
        self._num_sequences = 0
        self._digest = hashlib.sha256()

    def add(self, group: TokenGroup) -> None:
        """Write the numbers of one group."""
        keys = list(map(_key, group.sequences))
        lengths = [len(sequence.ids) for sequence in group.sequences]
        self._keys.write(b"".join(keys))
        numbers = (self._tree_size(group.sequences), sum(lengths), sum(group.response_lengths), max(lengths))
        self._groups.write(PACKED_GROUP.pack(self._num_sequences, *numbers))
        self._num_sequences += len(keys)
        attributes = [sorted(values.items()) for values in group.attributes]
        self._digest.update(repr((keys, group.rewards, group.chosen, attributes)).encode())

    @property
    def digest(self) -> str:
        """Return the hash of all groups written so far."""
        return self._digest.hexdigest()


def compute_columns(groups: Iterable[TokenGroup], tree_size: TreeSize) -> GroupColumns:
    """Return the columns of groups in memory."""
    lines, keys = io.BytesIO(), io.BytesIO()
    writer = ColumnWriter(lines, keys, tree_size)
    for group in groups:
        writer.add(group)
    return GroupColumns(np.frombuffer(lines.getvalue(), GROUP), np.frombuffer(keys.getvalue(), KEY), writer.digest)


def memory_map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the content of a binary file as a read-only array, mapped into memory."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)
