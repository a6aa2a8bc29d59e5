import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice

import pytest
import torch
from tiny_training import (
    VOCABULARY,
    Killed,
    Recorder,
    comparisons,
    demonstrations,
    group,
    llama,
    loop,
    policy,
    preference,
    supervised,
)

from align.data.group_columns import sequence_key
from align.errors import RunError
from align.train.indexed_groups import GroupView
from align.train.passes.data_ranks import DataRanks
from align.train.references.cache import PASS_KEYS, ReferenceCache, References
from align.train.references.compute import fill_cache
from align.train.settings import TrainSettings
from align.train.sharding.accelerator import make_accelerator


class Counting:
    """A policy that counts the sequences it is asked about, by their length; each token costs it 0.5."""

    def __init__(self):
        self.asked = Counter()

    def __call__(self, batch):
        self.asked.update(torch.bincount(batch.sequence_N, minlength=batch.num_sequences).tolist())
        return torch.full(batch.targets_N.shape, -0.5, device=batch.targets_N.device)


def cache_of(folder):
    return ReferenceCache(folder, weights="abc", precision="fp32")


def filled(folder, groups, budget=100):
    """The cache of the folder with the groups in it, what the policy was asked, and how many groups were done."""
    cache, counting = cache_of(folder), Counting()
    missing, *done = filling(cache, counting, groups, folder, budget=budget)
    assert sum(done) == missing
    return cache, counting.asked, missing


def filling(cache, policy, groups, folder, *, budget, forward="tree"):
    """The work of a pass over the groups."""
    accelerator = make_accelerator(TrainSettings(learning_rate=1.0))
    column = folder / "column.bin"
    more = {"forward": forward, "token_budget": budget, "ranks": DataRanks(accelerator)}
    more["work_file"] = folder / "computed"
    outputs = lambda tokens: tokens.sum_by_sequence(policy(tokens)).tolist()  # noqa: E731
    return fill_cache(cache, outputs, GroupView(groups), column=column, **more)


@pytest.mark.parametrize("budget", [1, 100, 10**6])
def test_ten_added_rows_compute_ten(tmp_path, budget):
    groups = comparisons(40, sizes=(2, 3))
    _, asked, done = filled(tmp_path, groups[:30], budget)
    assert (asked.total(), done) == (sum(len(each.sequences) for each in groups[:30]), 30)
    cache, asked, done = filled(tmp_path, groups, budget)
    assert asked == Counter(length for each in groups[30:] for length in each.response_lengths)
    assert done == 10
    references = References(GroupView(groups), tmp_path / "column.bin")
    assert filled(tmp_path, groups[::-1], budget)[1:] == (Counter(), 0)  # in another order: nothing
    for index, each in enumerate(groups):
        assert references.of(index) == [-0.5 * length for length in each.response_lengths]


def test_what_stands_in_several_rows_is_computed_once(tmp_path):
    one, other = comparisons(2)
    twice = [one, other, one]
    _, asked, done = filled(tmp_path, twice)
    assert (asked.total(), done) == (4, 2)
    mixed = type(one)((one.sequences[0], other.sequences[1]), None, None, ({}, {}), 3)
    assert filled(tmp_path, [mixed])[1:] == (Counter(), 0)  # known responses in a group of their own


def test_a_response_is_known_by_its_tokens_and_by_which_of_them_are_trained():
    made = [group([1, 2], [[3]]), group([1], [[2, 3]]), group([1, 2], [[4]]), group([1, 2, 3], [[0]])]
    assert len({sequence_key(each.sequences[0]) for each in made}) == 4
    assert sequence_key(group([1, 2], [[3]]).sequences[0]) == sequence_key(made[0].sequences[0])


# A second run over the same rows, and how many groups of it are new: (objective, settings, job)
AGAIN = {
    "learning rate": (preference("dpo"), {"learning_rate": 1e-5}, {}),
    "loss": (preference("rpo_sq", eta=3.0, sft_weight=0.5), {}, {}),
    "order": (preference("dpo"), {}, {"seed": 5}),
    "forward": (preference("dpo"), {}, {"forward": "plain"}),
    "batch": (preference("dpo"), {"prompts_per_step": 2, "tokens_per_micro_batch": 1}, {}),
    "held out": (preference("dpo"), {}, {"held_out": comparisons(5)}),
}


def forwards(model):
    """A counter of the policy's calls."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("what", AGAIN)
def test_another_rate_loss_or_order_computes_no_reference(tmp_path, what):
    objective, settings, job = AGAIN[what]
    train = comparisons(12)
    loop(tmp_path / "first", preference("dpo"), train, references=tmp_path / "cache")
    without = forwards(model := policy())
    loop(tmp_path / "sft", supervised(), train, model=model, job=job, **settings)  # the start-up probe alone
    calls = forwards(model := policy())
    again = loop(tmp_path / "again", objective, train, model=model, references=tmp_path / "cache", job=job, **settings)
    assert len(calls) == len(without)
    assert [name for name, *_ in again.progress.phases] == []
    assert any("reference log-probabilities: 0 groups to compute" in note for note in again.progress.notes)


def test_other_weights_or_precision_have_a_folder_of_their_own(tmp_path):
    train = comparisons(6)
    makes = [(policy(0), "fp32"), (policy(1), "fp32"), (policy(0), "bf16"), (policy(0), "fp32")]
    found = []
    for number, (model, precision) in enumerate(makes):
        folder = tmp_path / str(number)
        made = loop(folder, preference("dpo"), train, model=model, precision=precision, references=tmp_path / "cache")
        found.append(
            (made.reference_cache.folder.name, len(made.progress.phases), sum(made.reference_cache.values.values()))
        )
    names, computed, sums = zip(*found, strict=True)
    assert names[3] == names[0]
    assert len({*names}) == len({*sums}) == 3
    assert computed == (1, 1, 1, 0)
    assert {folder.name for folder in (tmp_path / "cache").iterdir()} == set(names)


@pytest.mark.parametrize("forward", ["tree", "plain"])
def test_what_is_cached_is_what_the_policy_says_in_double_precision(tmp_path, forward):
    train = comparisons(10, sizes=(1, 2, 5), longest=80)
    values = loop(tmp_path, preference("dpo"), train, job={"forward": forward}).reference_cache.values
    model = llama().double()
    for each in (each for one in train for each in one.sequences):
        ids = torch.from_numpy(each.ids).long()
        logps = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        total = sum(logps[at - 1, ids[at]].item() for at in range(1, len(ids)) if each.loss_mask[at])
        assert values[sequence_key(each)] == pytest.approx(total, rel=1e-6, abs=1e-6)
    assert len(values) == len({sequence_key(each) for one in train for each in one.sequences})


def key_of(writer, number):
    """A response's key, as far as a file of references can tell."""
    return f"{writer:016x}{number:016x}"


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    def write(writer):
        cache = cache_of(tmp_path)
        for number in range(20):
            cache.store({key_of(writer, number): (float(number), writer)})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {key_of(writer, number): number for writer in range(4) for number in range(20)}
    assert cache_of(tmp_path).values == expected


KEY = "0" * 32
BROKEN = [
    '{"KEY": [1.0',
    "",
    "[1, 2]",
    '{"KEY": 1.0}',
    '{"KEY": null}',
    '{"KEY": ["x", 1]}',
    '{"KEY": [1.0, 2, 3]}',
    "\x00",
]
BROKEN += ['{"a": [1.0, 2]}', '{"no hex digits of a key, are they": [1.0, 2]}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_named_in_one_line(tmp_path, text):
    cache = cache_of(tmp_path)
    cache.store({key_of(0, 0): (1.0, 1)})
    (cache.folder / "0123.json").write_text(text.replace("KEY", KEY))
    with pytest.raises(RunError) as error:
        cache_of(tmp_path).write_column(GroupView(comparisons(2)), tmp_path / "column.bin")
    assert (
        str(error.value)
        == f"{cache.folder / '0123.json'}: not a valid file of cached reference log-probabilities; delete it"
    )


def test_a_writer_that_stops_halfway_leaves_no_file_that_is_read(tmp_path):
    cache = cache_of(tmp_path)
    cache.store({KEY: (1.0, 1)})
    (part,) = cache.folder.glob("*.json")
    (cache.folder / f".{part.name}.partial-01234567").write_text(part.read_text()[:5])  # as a kill would leave it
    assert cache_of(tmp_path).values == {KEY: 1.0}


def test_work_that_is_broken_off_is_found_again_up_to_the_last_flush(tmp_path, monkeypatch):
    monkeypatch.setattr("align.train.references.compute.FLUSH_S", -1.0)  # after every micro-batch
    groups = comparisons(12)
    work = filling(cache_of(tmp_path), Counting(), groups, tmp_path, budget=1, forward="plain")
    assert next(work) == 12
    for _ in range(5):
        next(work)
    work.close()
    assert len(cache_of(tmp_path).write_column(GroupView(groups), tmp_path / "other.bin")) == 12 - 5
    assert filled(tmp_path, groups, 1)[2] == 7


def test_a_folder_that_keeps_nothing_is_told_of(tmp_path):
    groups = comparisons(3)

    class Forgetful(ReferenceCache):
        def store(self, found):
            pass  # as the writes of another node would be seen on a folder that is not shared

    cache = Forgetful(tmp_path, weights="abc", precision="fp32")
    with pytest.raises(
        RunError, match="3 reference log-probabilities are missing after all processes wrote theirs; do all nodes share"
    ):
        list(filling(cache, Counting(), groups, tmp_path, budget=9))


# Stores files of 5,000 values each until it is killed, and says so when the first one is written.
WRITER = """
import sys
from pathlib import Path
from align.train.references.cache import ReferenceCache
cache = ReferenceCache(Path(sys.argv[1]), weights="abc", precision="fp32")
for number in range(10**6):
    cache.store({f"{number:016x}{key:016x}": (float(key), 1) for key in range(5000)})
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_in_the_act_leaves_whole_files_only(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with writer:
        stored = [writer.stdout.readline() for _ in range(3)]
        deadline = time.monotonic() + 300
        while not list((tmp_path / "abc-fp32").glob(".*.partial-*")) and time.monotonic() < deadline:
            pass  # until it is in the middle of a file
        writer.kill()
    values = cache_of(tmp_path).values
    assert len(values) % 5000 == 0
    assert len(values) >= 5000 * len(stored)
    assert {json.dumps(value) for key, value in values.items() if int(key[16:], 16) == 17} == {"17.0"}


def test_a_run_without_a_reference_caches_none(tmp_path):
    recorder = Recorder()
    made = loop(tmp_path, preference("simpo"), comparisons(4), progress=recorder)
    made.run()
    assert made.references is None
    assert not (tmp_path / "references").exists()
    supervised_run = loop(tmp_path / "sft", supervised(), demonstrations(4))
    assert supervised_run.references is None


class Cut:
    """A policy whose answers tell what else was in the micro-batch, as the last bits of real ones do."""

    def __call__(self, batch):
        return torch.full((len(batch.targets_N),), float(batch.num_tokens))


def test_a_broken_pass_goes_on_in_the_micro_batches_that_it_was_cut_into(tmp_path, monkeypatch):
    monkeypatch.setattr("align.train.references.compute.FLUSH_S", -1.0)  # after every micro-batch
    groups = comparisons(24, sizes=(2, 3))

    def work(cache):
        return filling(cache, Cut(), groups, cache.folder, budget=60)

    whole, broken = cache_of(tmp_path / "whole"), cache_of(tmp_path / "broken")
    micros = len(list(work(whole))) - 1  # the first is what is missing
    assert micros > 4, "one micro-batch cannot be cut in two ways"
    begun = work(broken)
    for _ in range(1 + micros // 2):
        next(begun)
    begun.close()
    resumed = cache_of(tmp_path / "broken")
    assert 1 < len(list(work(resumed))) <= micros
    assert resumed.values == whole.values
    assert not (resumed.folder / PASS_KEYS).exists()


def test_a_response_of_two_rows_has_the_value_of_the_first_wherever_a_pass_is_broken_off(tmp_path, monkeypatch):
    draw = random.Random(3)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(9)] for _ in range(12)]
    pairs = [([prompt[0]] * 5, [prompt[0] + end] * (3 + end)) for prompt in prompts for end in (1, 2)]
    groups = [group(prompts[at // 2], [*pair], [1.0, 0.0], row=at) for at, pair in enumerate(pairs)]
    draw.shuffle(groups)

    def work(name, flush_s):
        monkeypatch.setattr("align.train.references.compute.FLUSH_S", flush_s)
        cache = cache_of(tmp_path / name)
        return cache, filling(cache, Cut(), groups, cache.folder, budget=60)

    cache, whole = work("at the end", 60.0)
    micros = len(list(whole)) - 1
    expected = cache.values
    assert len(expected) == 36 < 2 * len(groups) and len(set(expected.values())) > 3
    for stop in range(micros):
        begun = work(f"after {stop}", -1.0)[1]
        for _ in range(1 + stop):
            next(begun)
        begun.close()
        cache, resumed = work(f"after {stop}", -1.0)
        list(resumed)
        assert cache.values == expected, stop


class Rank:
    """What a process of two knows of the launch, as far as a pass asks."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, number):
        self.process_index, self.is_main_process = number, number == 0

    def wait_for_everyone(self):
        pass

    def reduce(self, tensor, reduction):
        return tensor


def test_what_several_processes_had_stored_before_a_kill_is_not_computed_again(tmp_path, monkeypatch):
    groups, passes = comparisons(40), []

    def told(values):  # by the first process, to whom the second listens
        if values == [0] or not hasattr(values[0], "groups"):
            return [0]
        passes.extend(values if len(values[0].groups) else [])
        return [passes[-1]]

    monkeypatch.setattr("align.train.references.compute.FLUSH_S", -1.0)
    monkeypatch.setattr("align.train.references.compute.broadcast_object_list", told)
    cache = cache_of(tmp_path)

    def life(number, stop=None):
        counting = Counting()
        work = fill_cache(
            cache,
            lambda tokens: tokens.sum_by_sequence(counting(tokens)).tolist(),
            GroupView(groups),
            column=tmp_path / "column.bin",
            work_file=tmp_path / "computed",
            forward="plain",
            token_budget=1,
            ranks=DataRanks(Rank(number)),
        )
        for _ in islice(work, stop):
            pass
        work.close()
        return counting.asked.total()

    assert [life(number, stop=1 + 15) for number in (0, 1)] == [2 * 15, 2 * 15]  # sequences asked about
    assert [life(number) for number in (0, 1)] == [2 * 5, 2 * 5]


class KilledInThePass(Recorder):
    """A reporter that ends the run after the second micro-batch of references."""

    def advance(self, units, metrics=None):
        super().advance(units, metrics)
        self.passes = getattr(self, "passes", 0) + (metrics is None)
        if self.passes == 2:
            raise Killed


def test_every_later_life_tells_what_the_references_have_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("align.train.references.compute.FLUSH_S", -1.0)

    def life(name, report):
        how = {"checkpoint_steps": 1, "tokens_per_micro_batch": 100}
        return loop(tmp_path / name, preference("dpo"), comparisons(24), progress=report, **how).run()

    whole = life("whole", Recorder())
    for report in (KilledInThePass(), Recorder(stop_after=2)):
        with pytest.raises(Killed):
            life("killed", report)
    killed = life("killed", Recorder())
    assert killed.forward_only == whole.forward_only and whole.forward_only.tokens > 0
    assert killed.num_forward_passes == whole.num_forward_passes > 4


def test_a_large_pass_is_planned_in_stretches_and_computes_the_same(tmp_path, monkeypatch):
    groups = comparisons(40, sizes=(2, 3))
    at_once = filled(tmp_path / "at once", groups)
    monkeypatch.setattr("align.train.references.compute.GROUPS_PER_PLAN", 7)
    in_stretches = filled(tmp_path / "in stretches", groups)
    assert in_stretches[1:] == at_once[1:]
    assert in_stretches[0].values == at_once[0].values


def test_held_out_groups_have_their_references_behind_those_that_are_trained_on(tmp_path):
    both = comparisons(9, sizes=(1, 4))
    filled(tmp_path, both)
    cache, groups = cache_of(tmp_path), GroupView(both[:6], both[6:])
    assert not len(cache.write_column(groups, tmp_path / "again.bin"))
    references = References(groups, tmp_path / "again.bin")
    assert [references.of(index) for index in range(9)] == [
        [-0.5 * length for length in each.response_lengths] for each in both
    ]


def test_a_response_without_a_finite_reference_is_not_taken_for_one_that_is_missing(tmp_path):
    groups = comparisons(2)
    cache = cache_of(tmp_path)
    cache.store({sequence_key(each): (float("nan"), 1) for one in groups for each in one.sequences})
    assert not len(cache.write_column(GroupView(groups), tmp_path / "column.bin"))
