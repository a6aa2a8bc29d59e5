"""The cache of reference log-probabilities, computed once by the policy that enters a step.

A value depends only on the weights, their precision and the tokens of the response, and so does its key. A different
learning rate, loss or order of the rows recomputes nothing, and new rows compute only themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.accounting.flops import Work
from align.artifacts import atomic_file, fingerprint_bytes, write_text
from align.data.group_columns import KEY, KEY_BYTES, memory_map
from align.errors import RunError
from align.models.tree.batch import EarlyExit
from align.storage.checksums import DAMAGED
from align.storage.disk_errors import disk_errors, reading
from align.train.indexed_groups import GroupView
from align.train.objectives.base import ObjectiveOutput
from align.train.objectives.batch import GroupBatch

PASS_KEYS = "begun.keys"  # file of the groups that a pass computes; removed when the pass is complete
MISSING = np.inf  # stands for a value that is not known; no log-probability is infinite and positive
SHA256_DIGITS = 64
SUM = np.dtype("<f8")  # of a column: sum of log-probabilities, in nats

# Largest mean difference between policy and reference before the first update, in nats per token: rounding, as their
# micro-batches differ. The loss itself would not reveal a wrong reference: with a beta of 1e-3 it hardly depends on it.
MAX_INITIAL_GAP = {"fp32": 1e-3, "bf16": 5e-2, "bf16-products": 5e-2}

Indices = NDArray[np.int64]
Value = float | list[float]  # of a response


class Pass(NamedTuple):
    """Groups whose reference log-probabilities are computed together."""

    groups: Indices
    num_missing: int  # of these groups; the others are known already


class ReferenceWork(NamedTuple):
    """What was computed for the references of a run, over all attempts."""

    work: Work = Work(0, 0, 0)  # of all ranks
    num_forward_passes: int = 0  # of each rank


class References:
    """Reference values of the groups of a run: a memory-mapped column, by default with one sum per response."""

    def __init__(self, groups: GroupView, column: Path, shape: tuple[int, ...] = ()) -> None:
        self._groups = groups
        self._sums = memory_map(column, SUM).reshape(-1, *shape)

    def of(self, index: int) -> list[float]:
        """Return the reference log-probability of each response of a group, in nats; MISSING if not known."""
        return self._sums[self._groups.sequence_span(index)].tolist()

    def missing(self) -> NDArray[np.bool_]:
        """Return which responses have no reference value yet."""
        return _is_missing(self._sums)


class ReferenceCache:
    """Reference log-probabilities by response, in one folder for each policy and precision.

    Every writer adds its own files, named by their content, so ranks and nodes never write to the same file, and a
    damaged file is found. Files of older versions have random names and are not verified.
    """

    max_pending = 1 << 20  # trained tokens whose values may wait in memory for the next write

    def __init__(
        self,
        folder: Path,
        *,
        weights: str,
        precision: str,
        shape: tuple[int, ...] = (),
        exit: EarlyExit | None = None,
    ) -> None:
        self.folder = folder / f"{weights}-{precision}{'' if exit is None else f'-{exit.layers}-layers'}"
        self.shape = shape  # of the values of a response: () for a log-probability, [A] for A attributes
        self.exit = exit  # of the model, where the values are not those of all layers

    @property
    def values(self) -> dict[str, Value]:
        """Return all stored values by `sequence_key`."""
        return {key.hex(): total for file in self._files() for key, total in file.items()}

    def _files(self) -> Iterator[dict[bytes, Value]]:
        for path in sorted(self.folder.glob("*.json")):
            with reading(path):
                content = path.read_bytes()
            if is_damaged(path, content):
                raise RunError(f"{path}: {DAMAGED}; delete it")
            try:
                yield {_key_bytes(key): self._checked(total) for key, (total, _) in json.loads(content).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise RunError(f"{path}: not a valid file of cached reference log-probabilities; delete it") from error

    def _checked(self, value: Any) -> Value:  # noqa: ANN401 - JSON holds any type
        numbers = np.asarray(value, np.float64)
        if numbers.shape != self.shape:
            raise ValueError(f"{value} is not of the shape {self.shape}")
        return numbers.tolist()

    def store(self, values: Mapping[str, tuple[Any, int]]) -> None:
        """Store (sum in nats, length in tokens) by `sequence_key`, as one new file that is named by its SHA-256."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(values), indent=2, sort_keys=True) + "\n"
        write_text(self.folder / f"{fingerprint_bytes(text.encode())}.json", text)

    def write_column(self, groups: GroupView, column: Path) -> Indices:
        """Write the values of all responses to a column; return the groups with a missing response.

        Of several groups with the same responses only the first is returned.
        """
        keys, inverse = np.unique(groups.sequence_keys(), return_inverse=True)
        sums = np.full((len(keys), *self.shape), MISSING, SUM)
        for file in self._files():
            known = np.frombuffer(b"".join(file), KEY)
            position = np.minimum(np.searchsorted(keys, known), len(keys) - 1)
            is_used = keys[position] == known
            sums[position[is_used]] = np.array(list(file.values()), SUM)[is_used]
        _write(column, sums[inverse])
        is_incomplete = np.logical_or.reduceat(_is_missing(sums)[inverse], groups.sequence_starts())
        incomplete = np.flatnonzero(is_incomplete)
        _, first = np.unique(_group_keys(groups, incomplete), return_index=True)
        return incomplete[np.sort(first)]

    def begin_pass(self, groups: GroupView, column: Path) -> Pass:
        """Write the column and return the pass to run: over the missing groups, or the pass that was interrupted.

        An interrupted pass is repeated with the same groups, so that it is cut into the same micro-batches: the last
        bits of a value depend on the other sequences of its micro-batch.
        """
        missing = self.write_column(groups, column)
        if not len(missing):
            return Pass(missing, 0)
        missing_keys = _group_keys(groups, missing)
        if (self.folder / PASS_KEYS).is_file():
            interrupted = memory_map(self.folder / PASS_KEYS, KEY)
            keys, first = np.unique(_group_keys(groups, np.arange(len(groups))), return_index=True)
            position = np.minimum(np.searchsorted(keys, interrupted), len(keys) - 1)
            if np.isin(missing_keys, interrupted).all() and (keys[position] == interrupted).all():
                return Pass(first[position], len(missing))
        _write(self.folder / PASS_KEYS, missing_keys)
        return Pass(missing, len(missing))

    def finish_pass(self) -> None:
        """Record that the pass is complete."""
        (self.folder / PASS_KEYS).unlink(missing_ok=True)


def is_damaged(file: Path, content: bytes) -> bool | None:
    """Return whether a file of a cache is not as it was written; None if it is of an older version, without a hash."""
    return fingerprint_bytes(content) != file.stem if len(file.stem) == SHA256_DIGITS else None


def first_occurrences(groups: GroupView, order: Indices) -> NDArray[np.bool_]:
    """Return which sequences are the first with their tokens, when the groups are taken in this order.

    Only these are stored: a response of two groups has different last bits in each, and which of the two is kept must
    not depend on where a pass was interrupted.
    """
    keys = groups.sequence_keys()
    starts = groups.sequence_starts()
    lengths = np.diff(starts, append=len(keys))[order]
    positions = np.repeat(starts[order] - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())
    _, first = np.unique(keys[positions], return_index=True)
    is_first = np.zeros(len(keys), np.bool_)
    is_first[positions[first]] = True
    return is_first


def check_initial_gap(
    output: ObjectiveOutput, batch: GroupBatch, *, step: int, precision: str, cache: ReferenceCache
) -> None:
    """Raise `RunError` unless policy and reference agree on a batch of a step.

    They are the same weights before any update.
    """
    if output.logps_BK is None:
        return
    gap = float((output.logps_BK - batch.reference_BK).abs().sum() / batch.lengths_BK.sum())
    if gap > MAX_INITIAL_GAP[precision]:
        raise RunError(
            f"step {step}: policy and reference differ by {gap:.2g} nats per token before the first update; the values "
            f"in {cache.folder} are not of this policy: delete it"
        )


def _is_missing(sums: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which responses have no value, shape [S]."""
    return (sums == MISSING).reshape(len(sums), -1).any(axis=1)


def _group_keys(groups: GroupView, indices: Indices) -> NDArray[np.bytes_]:
    """Return a key of all responses of each group."""
    all_keys = groups.sequence_keys()
    keys = all_keys.tobytes()
    starts = [*groups.sequence_starts().tolist(), len(all_keys)]
    found = bytearray()
    for index in indices.tolist():
        responses = keys[starts[index] * KEY_BYTES : starts[index + 1] * KEY_BYTES]
        found += hashlib.sha256(responses).digest()[:KEY_BYTES]
    return np.frombuffer(found, KEY)


def _key_bytes(key: str) -> bytes:
    found = bytes.fromhex(key)
    if len(found) != KEY_BYTES:
        raise ValueError(f"{key!r} is not a key of a response")
    return found


def _write(path: Path, values: NDArray[Any]) -> None:
    """Write the values atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        values.tofile(partial)
