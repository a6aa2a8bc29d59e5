"""The cache of a teacher's top-k log-probabilities, and the memory-mapped targets of a run.

Shape legend: N trained tokens, K tokens of the vocabulary, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from align.artifacts import atomic_file, fingerprint_bytes, read_json, write_json
from align.data.group_columns import KEY_BYTES
from align.errors import RunError
from align.storage.checksums import DAMAGED, sha256_of
from align.storage.disk_errors import disk_errors, reading
from align.train.distillation.settings import cached_bytes
from align.train.indexed_groups import GroupView
from align.train.objectives.batch import GroupBatch
from align.train.references.cache import Indices, ReferenceCache, References

SEGMENT = ".safetensors"
KEYS, STARTS, TOKENS, LOGPS = "keys", "starts", "tokens", "logps"  # tensors of a segment
SEGMENT_BYTES = 1 << 28  # of values that may wait in memory for the next write
PLACE = (3,)  # what the column of a run holds for each sequence: segment, first and last row


class TopLogps(NamedTuple):
    """A teacher's most likely tokens at each trained token of a sequence."""

    tokens: NDArray[np.int32]  # [N, K]
    logps: NDArray[np.float32]  # [N, K + 1]; the last is that of all other tokens together


class TeacherCache(ReferenceCache):
    """Top-k log-probabilities by sequence, in one folder for each teacher, precision and k.

    Like `ReferenceCache`, but every writer adds safetensors files (segments), 8 K + 4 bytes for each trained token,
    which stay where they are: the column of a run holds the segment and the rows of each sequence.
    """

    def __init__(self, folder: Path, *, weights: str, precision: str, top_k: int) -> None:
        super().__init__(folder, weights=weights, precision=f"{precision}-top{top_k}", shape=PLACE)
        self.max_pending = SEGMENT_BYTES // cached_bytes(top_k)
        self._names: list[str] = []

    def _files(self) -> Iterator[dict[bytes, Any]]:
        for number, name in enumerate(self._names):
            path = self.folder / name
            with reading(path):
                if sha256_of(path) != path.stem:
                    raise RunError(f"{path}: {DAMAGED}; delete it")
                with cast(Any, safe_open)(path, framework="np") as tensors:
                    keys = tensors.get_tensor(KEYS)
                    starts = tensors.get_tensor(STARTS).tolist()
            places = zip(starts[:-1], starts[1:], strict=True)
            yield {key.tobytes(): [number, *place] for key, place in zip(keys, places, strict=True)}

    def store(self, values: Mapping[str, tuple[Any, int]]) -> None:
        """Store `TopLogps` by `sequence_key` as one new file that is named by its SHA-256."""
        ordered = sorted(values)
        found: list[TopLogps] = [values[key][0] for key in ordered]
        tensors = {
            KEYS: np.frombuffer(bytes.fromhex("".join(ordered)), np.uint8).reshape(-1, KEY_BYTES),
            STARTS: np.cumsum([0, *(len(each.tokens) for each in found)], dtype=np.int64),
            TOKENS: np.concatenate([each.tokens for each in found]),
            LOGPS: np.concatenate([each.logps for each in found]),
        }
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        content = save(tensors)
        with atomic_file(self.folder / f"{fingerprint_bytes(content)}{SEGMENT}") as partial:
            partial.write_bytes(content)

    def write_column(self, groups: GroupView, column: Path) -> Indices:
        """Write the place of each sequence to a column, and the names of the segments beside it."""
        self._names = sorted(path.name for path in self.folder.glob(f"*{SEGMENT}"))
        column.parent.mkdir(parents=True, exist_ok=True)
        write_json(_names_of(column), self._names)
        return super().write_column(groups, column)


class TeacherTargets:
    """The teacher's log-probabilities for the groups of a run, read from the segments when they are needed."""

    def __init__(self, places: References, folder: Path, column: Path, weights: str) -> None:
        self.weights = weights  # fingerprint of the teacher
        self._places, self._folder, self._column = places, folder, column

    @cached_property
    def _segments(self) -> list[Any]:
        names: list[str] = read_json(_names_of(self._column))
        return [cast(Any, safe_open)(self._folder / name, framework="np") for name in names]

    def of(self, groups: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return tokens [N, K] and log-probabilities [N, K + 1] at the trained tokens of the groups' sequences."""
        parts = [
            self._rows(*map(int, cast("list[float]", place))) for group in groups for place in self._places.of(group)
        ]
        tokens, logps = zip(*parts, strict=True)
        return torch.from_numpy(np.concatenate(tokens)).long(), torch.from_numpy(np.concatenate(logps))

    def added_to(self, batch: GroupBatch, groups: Sequence[int]) -> GroupBatch:
        """Return the batch of these groups with their tokens and log-probabilities."""
        tokens_NK, teacher_NC = self.of(groups)
        return replace(batch, tokens=replace(batch.tokens, tokens_NK=tokens_NK), teacher_NC=teacher_NC)

    def _rows(self, segment: int, first: int, last: int) -> TopLogps:
        tensors = self._segments[segment]
        return TopLogps(*(tensors.get_slice(name)[first:last] for name in (TOKENS, LOGPS)))


def _names_of(column: Path) -> Path:
    """Return the file beside a column with the names of its segments."""
    return column.with_suffix(".segments.json")
