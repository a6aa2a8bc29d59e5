"""The cache of reference log-probabilities: what the policy that enters a step says of every response, computed once.

A value depends on the weights, their precision and the response's tokens, and its key is made of nothing else; so a
change of learning rate, loss or order of the data computes nothing again, and added rows compute only themselves.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from align.accounting.formulas import Work, added
from align.artifacts import read_json, write_json
from align.config import RunError, stable_hash
from align.data.batching import plan_step
from align.data.chat import TokenGroup, TokenSequence
from align.models.tree import TokenBatch

FLUSH_S = 60.0  # seconds of computing that a kill may lose
BEGUN = "begun"  # names what a pass computes, until it is through


def sequence_key(sequence: TokenSequence) -> str:
    """Thirty-two hex digits of the token ids and of which of them are trained."""
    digest = hashlib.sha256(sequence.ids.astype("<i4").tobytes())
    digest.update(sequence.trained.tobytes())
    return digest.hexdigest()[:32]


class ReferenceCache:
    """Sums of log-probabilities by response, in one folder for each policy and precision.

    Every writer adds files of its own under unique names, so ranks and nodes never meet in one file.
    """

    def __init__(self, folder: Path, *, weights: str, precision: str) -> None:
        self.folder = folder / f"{weights}-{precision}"
        self.values: dict[str, float] = {}
        self.computed = Work(0, 0, 0)  # by this process
        self.load()

    def load(self) -> None:
        """Read what any writer has stored so far."""
        for part in sorted(self.folder.glob("*.json")):
            try:
                self.values |= {key: float(total) for key, (total, _) in read_json(part).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise RunError(f"{part}: not a file of cached references; delete it") from error

    def store(self, found: Mapping[str, tuple[float, int]]) -> None:
        """Add (sum in nats, length in tokens) by key, as one whole file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{uuid.uuid4().hex}.json", dict(found))

    def of(self, group: TokenGroup) -> list[float]:
        """The reference sum of each response of a group."""
        return [self.values[sequence_key(sequence)] for sequence in group.sequences]

    def missing(self, groups: Sequence[TokenGroup]) -> list[int]:
        """Indices of the groups with a response that is not there yet, each set of responses once."""
        seen: set[tuple[str, ...]] = set()
        indices: list[int] = []
        for index, group in enumerate(groups):
            keys = tuple(sequence_key(sequence) for sequence in group.sequences)
            if keys not in seen and any(key not in self.values for key in keys):
                indices.append(index)
            seen.add(keys)
        return indices

    def begin(self, groups: Sequence[TokenGroup]) -> list[int]:
        """Indices of the groups to compute together: those that are missing, or as they were when a kill came.

        What a micro-batch computes depends in its last bits on what else is in it, so a resumed pass is cut as it was.
        """
        missing = self.missing(groups)
        if not missing:
            return []
        keys = [_group_key(group) for group in groups]
        places = {key: index for index, key in reversed(list(enumerate(keys)))}
        before: list[str] = read_json(self.folder / BEGUN) if (self.folder / BEGUN).is_file() else []
        if {keys[index] for index in missing} <= set(before) <= places.keys():
            return [places[key] for key in before]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / BEGUN, [keys[index] for index in missing])
        return missing

    def finish(self) -> None:
        """Nothing is missing any more."""
        (self.folder / BEGUN).unlink(missing_ok=True)


def _group_key(group: TokenGroup) -> str:
    return stable_hash([sequence_key(sequence) for sequence in group.sequences])


@torch.no_grad()
def fill(
    cache: ReferenceCache,
    policy: Callable[[TokenBatch], Tensor],
    groups: Sequence[TokenGroup],
    *,
    sizes: Sequence[int],
    make: Callable[[Sequence[TokenSequence]], TokenBatch],
    token_budget: int,
    accelerator: Accelerator,
) -> Iterator[int]:
    """Compute what is missing, every rank its share; yields the number of groups done after each micro-batch."""
    # What the first rank finds missing all compute: another run may be adding to the folder while they look.
    (missing,) = broadcast_object_list([cache.begin(groups) if accelerator.is_main_process else []])
    plan = plan_step(missing, sizes, token_budget=token_budget, num_ranks=accelerator.num_processes)
    found: dict[str, tuple[float, int]] = {}
    flushed = time.monotonic()
    for micro in plan.ranks[accelerator.process_index]:
        # An empty share runs one group all the same: sharded weights are gathered by all ranks or by none.
        members = [groups[index] for index in micro or missing[:1]]
        if accelerator.num_processes == 1 and not cache.missing(members):
            continue
        sequences = [sequence for group in members for sequence in group.sequences]
        batch = make(sequences)
        cache.computed = added([cache.computed, batch.work()])
        batch = batch.to(accelerator.device)
        totals = batch.sums(policy(batch)).tolist()
        for sequence, total in zip(sequences, totals, strict=True):
            found[sequence_key(sequence)] = (total, int(sequence.trained.sum()))
        if time.monotonic() - flushed > FLUSH_S:
            cache.store(found)
            found, flushed = {}, time.monotonic()
        yield len(micro)
    if found:
        cache.store(found)
    accelerator.wait_for_everyone()
    cache.load()
    left = cache.missing(groups)
    if accelerator.is_main_process and not left:
        cache.finish()
    if left:
        raise RunError(
            f"{cache.folder}: {len(left)} references are missing after all ranks wrote; do all nodes share the folder?"
        )
