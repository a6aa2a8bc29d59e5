"""Token groups in memory-mapped files: reading by index, columns, digests and memory."""

import json
import math
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

from align.data.group_columns import GROUP, KEY, sequence_key
from align.data.store import (
    DIGEST,
    GROUPS,
    GROUPS_PER_BATCH,
    KEYS,
    SCHEMA,
    TOKENS,
    TokenStore,
    columns_of,
    writing_store,
)
from align.data.token_groups import TokenGroup, TokenSequence

LABELS = [{}, {"helpful": 4.0}, {"helpful": 0.1 + 0.2, "verbose": 3}, {"correct": 1e-300}]


def groups(number, seed=0):
    """Return random groups of one to five sequences, with and without rewards, labels and attributes."""
    draw = random.Random(seed)
    made = []
    for row in range(number):
        size = draw.randint(1, 5)
        sequences = []
        for _ in range(size):
            ids = np.array([draw.randrange(2**31) for _ in range(draw.randint(2, 30))], np.int32)
            mask = np.arange(len(ids)) >= draw.randint(1, len(ids) - 1)
            sequences.append(TokenSequence(ids, mask, is_cut=bool(ids[0] % 3 == 0)))
        rewards = tuple(draw.gauss(0, 1) for _ in range(size)) if draw.random() < 0.7 else None
        chosen = draw.randrange(size) if draw.random() < 0.5 else None
        made.append(TokenGroup(tuple(sequences), rewards, chosen, tuple(draw.choices(LABELS, k=size)), 3 * row))
    return made


def count(sequences):
    """Return a number that stands for the tokens of a tree."""
    return 7 * len(sequences)


def stored(folder, made, metadata=None):
    with writing_store(folder, count) as writer:
        for group in made:
            writer.add(group, metadata)
    return TokenStore(folder)


def plain(group):
    """Return the group as values that can be compared."""
    sequences = [(each.ids.tolist(), each.loss_mask.tolist(), each.is_cut) for each in group.sequences]
    return sequences, group.rewards, group.chosen, [dict(known) for known in group.attributes], group.row


@pytest.mark.parametrize("number", [0, 1, GROUPS_PER_BATCH, 2 * GROUPS_PER_BATCH + 3])
def test_stored_groups_are_read_back_by_index_and_in_order(tmp_path, number):
    made = groups(number)
    store = stored(tmp_path / "store", made)
    assert len(store) == number
    assert [plain(group) for group in store] == [plain(group) for group in made]
    for index in random.Random(1).sample(range(number), min(number, 50)):
        assert plain(store[index]) == plain(made[index])
    assert [plain(group) for group in store[-3:]] == [plain(group) for group in made[-3:]]
    with pytest.raises(IndexError):
        store[number]
    kinds = {(each.ids.dtype, each.loss_mask.dtype) for group in store for each in group.sequences}
    assert kinds <= {(np.dtype(np.int32), np.dtype(np.bool_))}


def test_changing_a_decoded_group_does_not_change_the_file(tmp_path):
    made = groups(3)
    store = stored(tmp_path / "store", made)
    store[1].sequences[0].ids[:] = 0
    assert plain(store[1]) == plain(made[1])


def test_columns_match_the_sequences_for_stores_and_lists(tmp_path):
    made = groups(GROUPS_PER_BATCH + 9)
    store = stored(tmp_path / "store", made)
    for columns in (store.columns, columns_of(store, count), columns_of(made, count)):
        assert columns.digest == store.columns.digest
        for index, group in enumerate(made):
            lengths = [len(each.ids) for each in group.sequences]
            trained = sum(int(each.loss_mask.sum()) for each in group.sequences)
            told = [int(columns.groups[name][index]) for name in ("tree", "plain", "trained", "longest")]
            assert told == [7 * len(lengths), sum(lengths), trained, max(lengths)]
            keys = [key.ljust(16, b"\0").hex() for key in columns.keys[columns.span(index)].tolist()]
            assert keys == [sequence_key(each) for each in group.sequences]


CHANGES = {
    "a token": lambda one: (
        TokenSequence(one.sequences[0].ids + 1, one.sequences[0].loss_mask),
        one.rewards,
        one.chosen,
    ),
    "a mask": lambda one: (TokenSequence(one.sequences[0].ids, ~one.sequences[0].loss_mask), one.rewards, one.chosen),
    "a reward": lambda one: (one.sequences[0], (0.25,) * len(one.sequences), one.chosen),
    "a label": lambda one: (one.sequences[0], one.rewards, 0 if one.chosen is None else None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_everything_that_affects_training_is_in_the_digest(what):
    made = groups(5)
    sequence, rewards, chosen = CHANGES[what](made[3])
    other = TokenGroup((sequence, *made[3].sequences[1:]), rewards, chosen, made[3].attributes, made[3].row)
    changed = columns_of([*made[:3], other, made[4]], count).digest
    assert changed != columns_of(made, count).digest
    moved = TokenGroup(made[3].sequences, made[3].rewards, made[3].chosen, made[3].attributes, 999)
    assert columns_of([*made[:3], moved, made[4]], count).digest == columns_of(made, count).digest


def test_metadata_is_kept(tmp_path):
    store = stored(tmp_path / "store", groups(2), {"subset": "odd", "n": [1, None], "text": "zwölf"})
    assert store.metadata(1) == {"subset": "odd", "n": [1, None], "text": "zwölf"}
    assert stored(tmp_path / "other", groups(1)).metadata(0) == {}


# Open a store, plan and read some steps of an epoch, and print the tokens read and the anonymous memory in KiB
READER = """
import sys
from pathlib import Path
from align.data.batching import groups_of_step, order, plan_step
from align.data.store import TokenStore
def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:"))
before = own()
store = TokenStore(Path(sys.argv[1]))
indices, tokens = order(len(store), seed=0, epoch=0), 0
for step in range(0, len(store) // 64, max(1, len(store) // 64 // 150)):
    groups = groups_of_step(step, len(store), 64, epoch_of=lambda _: indices)
    plan = plan_step(groups, store.columns.groups["tree"], token_budget=2048, num_ranks=8)
    tokens += sum(len(one.ids) for micro in plan.ranks[3] for index in micro for one in store[index].sequences)
print(tokens, before, own())
"""
ORDER_KIB_PER_MILLION = 4 * 10**6 / 1024  # order of an epoch: four bytes per row
NOISE_KIB = 6 * 1024  # memory that the allocator keeps


def million(folder, number):
    """Write a store of `number` pairs fast, by repeating one batch, and return its folder."""
    made = [group for group in groups(4 * GROUPS_PER_BATCH) if len(group.sequences) == 2][:GROUPS_PER_BATCH]
    made = (made * GROUPS_PER_BATCH)[:GROUPS_PER_BATCH]
    small = stored(folder / "small", made)
    batch = ipc.open_file(pa.memory_map(str(folder / "small" / TOKENS))).get_batch(0)
    big = folder / "big"
    big.mkdir()
    batches = math.ceil(number / GROUPS_PER_BATCH)
    with ipc.new_file(str(big / TOKENS), SCHEMA) as writer:
        for _ in range(batches):
            writer.write_batch(batch)
    lines = np.tile(np.array(small.columns.groups), batches)
    lines["start"] = 2 * np.arange(len(lines))
    lines.astype(GROUP).tofile(big / GROUPS)
    np.tile(np.array(small.columns.keys), batches).astype(KEY).tofile(big / KEYS)
    (big / DIGEST).write_text(json.dumps("none"))
    return big


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads anonymous memory from /proc")
def test_memory_of_a_reader_does_not_grow_with_the_number_of_rows(tmp_path):
    held = {}
    for number in (10_000, 1_000_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        said = subprocess.run(
            [sys.executable, "-c", READER, str(million(folder, number))], capture_output=True, text=True, check=True
        )
        tokens, before, after = map(int, said.stdout.split())
        assert tokens > 30_000, "too little was read to measure memory"
        held[number] = after - before
    print(f"KiB of its own after reading, by rows: {held}")
    assert held[1_000_000] - held[10_000] <= ORDER_KIB_PER_MILLION + NOISE_KIB
