"""The cache of reference log-probabilities: what the policy that enters a step says of every response, computed once.

A value depends on the weights, their precision and the response's tokens, and its key is made of nothing else; so a
change of learning rate, loss or order of the data computes nothing again, and added rows compute only themselves.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor

from align.accounting.flops import Work, sum_work
from align.artifacts import atomic_file, read_json, write_json
from align.data.batching import plan_step
from align.data.group_columns import KEY, KEY_BYTES, memory_map, sequence_key
from align.errors import RunError
from align.models.tree.batch import TokenBatch, plain_batch, tree_batch
from align.train.indexed_groups import Groups

FLUSH_S = 60.0  # seconds of computing that a kill may lose
PLANNED = 1 << 14  # groups of a pass that are cut into micro-batches together
REFERENCE_WORK = "references.computed"  # in a step's working folder: what its pass has taken
BEGUN = "begun.keys"  # names what a pass computes, until it is through
MISSING = np.inf  # no logarithm of a probability
SUM = np.dtype("<f8")  # of a column: a sum of log-probabilities, `MISSING` where there is none yet

Indices = NDArray[np.int64]


class Pass(NamedTuple):
    """Groups whose references are computed together, and how many of them are missing: others may be there already."""

    groups: Indices
    num_missing: int


class ReferenceCache:
    """Sums of log-probabilities by response, in one folder for each policy and precision.

    Every writer adds files of its own under unique names, so ranks and nodes never meet in one file. What a step needs
    of them is laid into a column of its own, a number for each of its responses, which all its ranks map into memory.
    """

    def __init__(self, folder: Path, *, weights: str, precision: str) -> None:
        self.folder = folder / f"{weights}-{precision}"
        self.computed, self.forwards = Work(0, 0, 0), 0  # of a step's pass: by all processes, and by each of them

    @property
    def values(self) -> dict[str, float]:
        """What any writer has stored so far, sums by `sequence_key`."""
        return {key.hex(): total for part in self._stored() for key, total in part.items()}

    def _stored(self) -> Iterator[dict[bytes, float]]:
        for part in sorted(self.folder.glob("*.json")):
            try:
                yield {_bytes(key): float(total) for key, (total, _) in read_json(part).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise RunError(f"{part}: not a file of cached references; delete it") from error

    def store(self, found: Mapping[str, tuple[float, int]]) -> None:
        """Add (sum in nats, length in tokens) by key, as one whole file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{uuid.uuid4().hex}.json", dict(found))

    def begin(self, groups: Groups, column: Path) -> Pass:
        """Lay the column, and say what to compute: what is missing, or all that was when a pass began that broke off.

        What a micro-batch computes depends in its last bits on what else is in it, so a resumed pass is cut as it was.
        """
        missing = self.lay(groups, column)
        if not len(missing):
            return Pass(missing, 0)
        wanted = _group_keys(groups, missing)
        if (self.folder / BEGUN).is_file():
            before = memory_map(self.folder / BEGUN, KEY)
            keys, first = np.unique(_group_keys(groups, np.arange(len(groups))), return_index=True)
            at = np.minimum(np.searchsorted(keys, before), len(keys) - 1)
            if np.isin(wanted, before).all() and (keys[at] == before).all():
                return Pass(first[at], len(missing))
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / BEGUN, wanted)
        return Pass(missing, len(missing))

    def lay(self, groups: Groups, column: Path) -> Indices:
        """Write the column, and find the groups with a response that is not there yet, each set of responses once."""
        keys, inverse = np.unique(groups.keys(), return_inverse=True)
        sums = np.full(len(keys), MISSING, SUM)
        for part in self._stored():
            known = np.frombuffer(b"".join(part), KEY)
            at = np.minimum(np.searchsorted(keys, known), len(keys) - 1)
            here = keys[at] == known
            sums[at[here]] = np.fromiter(part.values(), SUM, len(part))[here]
        _write(column, sums[inverse])
        lacks = np.flatnonzero(np.logical_or.reduceat((sums == MISSING)[inverse], groups.starts()))
        _, first = np.unique(_group_keys(groups, lacks), return_index=True)
        return lacks[np.sort(first)]

    def finish(self) -> None:
        """Nothing is missing any more."""
        (self.folder / BEGUN).unlink(missing_ok=True)

    def open(self, groups: Groups, column: Path) -> None:
        """Take the groups' sums from the column."""
        self._groups, self._sums = groups, memory_map(column, SUM)

    def of(self, index: int) -> list[float]:
        """The reference sum of each response of a group, MISSING where it is not there yet."""
        return self._sums[self._groups.span(index)].tolist()

    def owned(self, order: Indices) -> NDArray[np.bool_]:
        """Which responses are to be stored from where they stand: of each the first place in this order.

        A response of two groups has other last bits in each, and a kill must not decide which are kept.
        """
        keys, starts = self._groups.keys(), self._groups.starts()
        lengths = np.diff(starts, append=len(keys))[order]
        places = np.repeat(starts[order] - (lengths.cumsum() - lengths), lengths) + np.arange(lengths.sum())
        _, first = np.unique(keys[places], return_index=True)
        found = np.zeros(len(keys), np.bool_)
        found[places[first]] = True
        return found

    def missing(self) -> NDArray[np.bool_]:
        """Which responses have no reference yet."""
        return self._sums == MISSING

    def account(self, path: Path, mine: Work, forwards: int, accelerator: Accelerator) -> None:
        """Take in what a pass has computed, and leave it in a file for later lives, which find nothing missing."""
        if forwards:
            here = torch.tensor(list(mine), dtype=torch.float64, device=accelerator.device)
            total = cast(Tensor, accelerator.reduce(here, reduction="sum")).tolist()
            if accelerator.is_main_process:
                write_json(path, [*map(int, total), forwards])
        accelerator.wait_for_everyone()
        if path.is_file():
            *work, self.forwards = read_json(path)
            self.computed = Work(*work)


@torch.no_grad()
def fill(
    cache: ReferenceCache,
    policy: Callable[[TokenBatch], Tensor],
    groups: Groups,
    *,
    column: Path,
    told: Path,
    forward: str,
    token_budget: int,
    accelerator: Accelerator,
) -> Iterator[int]:
    """Compute what is missing, every rank its share, and open the cache; yields the number of missing groups first.

    After that it yields how many groups are done after each micro-batch. What all have taken is left in `told`.
    """
    # What the first rank finds missing all compute: another run may be adding to the folder while they look.
    todo = Pass(np.empty(0, np.int64), 0)
    (todo,) = broadcast_object_list([cache.begin(groups, column) if accelerator.is_main_process else todo])
    cache.open(groups, column)
    yield todo.num_missing
    found: dict[str, tuple[float, int]] = {}
    flushed, owned = time.monotonic(), cache.owned(todo.groups)
    wanted, computed, forwards = owned & cache.missing(), Work(0, 0, 0), 0
    for micros, first in _micro_batches(
        groups, todo, forward=forward, token_budget=token_budget, accelerator=accelerator
    ):
        spans = [groups.span(index) for micro in micros for index in micro]
        if not any(owned[span].any() for span in spans):
            continue
        # An empty share runs one group all the same: sharded weights are gathered by all ranks or by none.
        micro = micros[accelerator.process_index]
        members = micro or (first,)
        sequences = [sequence for index in members for sequence in groups[index].sequences]
        batch = tree_batch(sequences) if forward == "tree" else plain_batch(sequences)
        computed, forwards = sum_work([computed, batch.work()]), forwards + 1  # in this life, or in an earlier one
        if not any(wanted[span].any() for span in spans):
            continue
        batch = batch.to(accelerator.device)
        totals = batch.sum_by_sequence(policy(batch)).tolist()
        own = np.concatenate([wanted[groups.span(index)] for index in members])
        for sequence, total, is_own in zip(sequences, totals, own, strict=True):
            if is_own and micro:
                found[sequence_key(sequence)] = (total, int(sequence.loss_mask.sum()))
        if time.monotonic() - flushed > FLUSH_S:
            cache.store(found)
            found, flushed = {}, time.monotonic()
        yield len(micro)
    if found:
        cache.store(found)
    accelerator.wait_for_everyone()
    (left,) = broadcast_object_list([len(cache.lay(groups, column)) if accelerator.is_main_process else 0])
    if left:
        raise RunError(
            f"{cache.folder}: {left} references are missing after all ranks wrote; do all nodes share the folder?"
        )
    cache.account(told, computed, forwards, accelerator)
    if accelerator.is_main_process:
        cache.finish()
    cache.open(groups, column)


def _micro_batches(
    groups: Groups, todo: Pass, *, forward: str, token_budget: int, accelerator: Accelerator
) -> Iterator[tuple[tuple[tuple[int, ...], ...], int]]:
    """The micro-batches that all ranks run at once, and a group of their plan: PLANNED groups are planned at once."""
    sizes, num_ranks = groups.sizes(forward), accelerator.num_processes
    for start in range(0, len(todo.groups), PLANNED):
        window = todo.groups[start : start + PLANNED].tolist()
        plan = plan_step(window, sizes, token_budget=token_budget, num_ranks=num_ranks)
        yield from ((micros, window[0]) for micros in zip(*plan.ranks, strict=True))


def _group_keys(groups: Groups, indices: Indices) -> NDArray[np.bytes_]:
    """A key of all responses of each of the groups."""
    keys, starts = groups.keys().tobytes(), [*groups.starts().tolist(), len(groups.keys())]
    found = bytearray()
    for index in indices.tolist():
        responses = keys[starts[index] * KEY_BYTES : starts[index + 1] * KEY_BYTES]
        found += hashlib.sha256(responses).digest()[:KEY_BYTES]
    return np.frombuffer(found, KEY)


def _bytes(key: str) -> bytes:
    found = bytes.fromhex(key)
    if len(found) != KEY_BYTES:
        raise ValueError(f"{key!r} is no key of a response")
    return found


def _write(path: Path, numbers: NDArray[Any]) -> None:
    """Write the numbers so that a reader sees all of them, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        numbers.tofile(partial)
