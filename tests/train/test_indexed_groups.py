"""The groups of a step by one index, those that are trained on before those that are held out."""

import numpy as np
import pytest
from tiny_training import comparisons, demonstrations, group

from align.data.store import TokenStore, writing_store
from align.data.token_groups import TokenGroup, TokenSequence
from align.models.tree.batch import count_tokens, tree_batch
from align.train.indexed_groups import GroupView, end_of_turn
from align.train.objectives.batch import group_batch


def stored(folder, made):
    with writing_store(folder, count_tokens) as writer:
        for each in made:
            writer.add(each)
    return TokenStore(folder)


@pytest.mark.parametrize("as_store", [False, True])
@pytest.mark.parametrize("num_held_out", [0, 1, 7])
def test_an_index_leads_to_the_same_group_and_numbers_in_a_list_and_in_a_store(tmp_path, as_store, num_held_out):
    train, held_out = comparisons(20, sizes=(1, 3)), comparisons(num_held_out, seed=1)
    both = [*train, *held_out]
    parts = (stored(tmp_path / "a", train), stored(tmp_path / "b", held_out)) if as_store else (train, held_out)
    groups = GroupView(*parts)
    assert len(groups) == len(both)
    sizes, plain = groups.column("tree"), groups.column("plain")
    starts = groups.sequence_starts().tolist()
    for index, each in enumerate(both):
        assert [one.ids.tolist() for one in groups[index].sequences] == [one.ids.tolist() for one in each.sequences]
        assert int(sizes[index]) == count_tokens(each.sequences)
        assert int(plain[index]) == sum(len(one.ids) for one in each.sequences)
        assert starts[index] == groups.sequence_span(index).start
        assert groups.sequence_span(index).stop - groups.sequence_span(index).start == len(each.sequences)
    some = [17, 2, len(both) - 1]
    assert groups.select(some).num_trained_tokens == sum(sum(both[index].response_lengths) for index in some)
    assert [each.response_lengths for each in groups.select(some)] == [both[index].response_lengths for index in some]
    assert len(groups.sequence_keys()) == sum(len(each.sequences) for each in both)
    with pytest.raises(IndexError):
        groups[len(both)]


def test_a_micro_batch_decodes_each_group_once(monkeypatch):
    train, decoded = comparisons(5, sizes=(2, 3)), []
    groups = GroupView(train)
    read = GroupView.__getitem__
    monkeypatch.setattr(GroupView, "__getitem__", lambda self, index: decoded.append(index) or read(self, index))
    batch = group_batch(
        groups.select([3, 1, 4]), [(0.0,) * len(train[index].sequences) for index in (3, 1, 4)], tree_batch
    )
    assert batch.sizes == tuple(len(train[index].sequences) for index in (3, 1, 4))
    assert [index for index in decoded if index < 3] == [0, 1, 2]


def test_a_forward_is_chosen_by_the_first_groups_and_one_with_the_longest_sequence():
    train = demonstrations(9, longest=10)
    for part in (0, 1):
        long = group([1, 2], [[3] * 50])
        parts = ([*train, long], train) if part == 0 else (train, [long, *train])
        probed = GroupView(*parts).probe_sequences()
        assert [each[0].ids.tolist() for each in probed[:2]] == [each.sequences[0].ids.tolist() for each in train[:2]]
        assert max(len(one.ids) for each in probed for one in each) == 52
    assert len(GroupView([long]).probe_sequences()) == 2


def test_held_out_rows_are_in_the_digests_where_they_are_asked_for():
    train, one, other = comparisons(5), comparisons(3, seed=1), comparisons(3, seed=2)
    assert GroupView(train, one).digests(held_out=False) == GroupView(train, other).digests(held_out=False)
    assert GroupView(train, one).digests(held_out=True) != GroupView(train, other).digests(held_out=True)
    assert GroupView(train, one).digests(held_out=False) != GroupView(one, train).digests(held_out=False)


def test_the_end_of_turn_is_the_token_that_most_whole_sequences_end_with():
    whole = [TokenSequence(np.array([1, 2, 9], np.int32), np.array([False, True, True])) for _ in range(3)]
    cut = [TokenSequence(np.array([1, last], np.int32), np.array([False, True]), is_cut=True) for last in range(50, 60)]
    groups = [TokenGroup((one,), None, None, ({},), row) for row, one in enumerate([*cut, *whole])]
    assert end_of_turn(groups) == 9
    assert end_of_turn(groups[:10]) is None
