"""Semantic duplicates against a comparison of all pairs, and neighbours of test items."""

import numpy as np
import pytest

from align.curate.neighbours import nearest_pairs, same_by_judge
from align.curate.semantic import clusters, semantic_duplicates
from align.inference.samples import Sample, Throughput, prompt_key
from align.rewards.builtin_judges import LlmSettings
from align.rewards.llm_judge import LlmJudge


def planted(number, *, seed, width=16, spread=0.25):
    """Vectors in chains of similar ones, and one of three guards for each."""
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(number, width))
    for row in range(1, number):
        if draw.random() < 0.6:
            vectors[row] = vectors[draw.integers(row)] + spread * draw.normal(size=width)
    return vectors.astype(np.float32), draw.integers(3, size=number).astype(np.uint64)


def all_pairs(vectors, guards, threshold):
    """The duplicates and the similar texts of another task, by a loop over all pairs."""
    kept, duplicates, other_tasks = [], {}, {}
    for text in range(len(vectors)):
        cosines = {
            other: float(
                vectors[text] @ vectors[other] / np.linalg.norm(vectors[text]) / np.linalg.norm(vectors[other])
            )
            for other in kept
        }
        near = {other: cosine for other, cosine in cosines.items() if cosine >= threshold}
        same = {other: cosine for other, cosine in near.items() if guards[text] == guards[other]}
        if same:
            duplicates[text] = max(same, key=same.get)
            continue
        kept.append(text)
        if near:
            other_tasks[text] = max(near, key=near.get)
    return duplicates, other_tasks


@pytest.mark.parametrize(("number", "threshold"), [(1, 0.9), (300, 0.8), (1300, 0.9)])
def test_blocks_drop_what_a_loop_over_all_pairs_drops(number, threshold):
    vectors, guards = planted(number, seed=number)
    found = semantic_duplicates(vectors, guards, threshold=threshold, num_clusters=None, seed=0)
    duplicates, other_tasks = all_pairs(vectors, guards, threshold)
    assert {text: match.kept for text, match in found.duplicates.items()} == duplicates
    assert {text: match.kept for text, match in found.other_tasks.items()} == other_tasks
    assert number == 1 or (len(duplicates) > 20 and len(other_tasks) > 20)


def test_clusters_compare_only_their_members_and_miss_little_of_tight_groups():
    centres = np.random.default_rng(1).normal(size=(40, 24))
    vectors = np.repeat(centres, 20, axis=0) + 0.05 * np.random.default_rng(2).normal(size=(800, 24))
    vectors = vectors.astype(np.float32)[np.random.default_rng(3).permutation(800)]
    guards = np.zeros(800, np.uint64)
    labels = clusters(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 8, seed=0)
    found = semantic_duplicates(vectors, guards, threshold=0.9, num_clusters=8, seed=0)
    assert all(labels[text] == labels[match.kept] for text, match in found.duplicates.items())
    assert len(found.duplicates) == 800 - 40
    assert len(np.unique(labels)) > 3


def test_more_clusters_than_texts_compare_nothing_but_equal_ones():
    vectors, guards = planted(20, seed=4)
    found = semantic_duplicates(vectors, guards, threshold=0.99, num_clusters=100, seed=0)
    assert found.duplicates == {}


def test_nearest_rows_of_each_item_are_those_of_a_sort():
    draw = np.random.default_rng(5)
    items, rows = draw.normal(size=(7, 6)).astype(np.float32), draw.normal(size=(50, 6)).astype(np.float32)
    found = nearest_pairs(items, rows, number=3, threshold=0.5)
    expected = []
    for item in range(7):
        cosines = [float(items[item] @ row / np.linalg.norm(items[item]) / np.linalg.norm(row)) for row in rows]
        best = sorted(range(50), key=lambda row: -cosines[row])[:3]
        expected += [(item, row) for row in best if cosines[row] >= 0.5]
    assert [(pair.item, pair.row) for pair in found] == expected
    assert len(expected) > 10


def test_the_judge_sees_both_texts_and_an_unclear_answer_is_none():
    class Engine:
        name = "scripted"

        def __init__(self):
            self.throughput, self.asked = Throughput(), []

        def sample(self, prompts, settings, *, finished=frozenset()):
            for prompt in prompts:
                text = prompt.messages[0].content
                self.asked.append(text)
                answer = "Same. [[yes]]" if "alike" in text else "[[No]]" if "unlike" in text else "Perhaps."
                yield Sample(prompt_key(prompt), 0, self.name, answer, 1, "stop", 0)

    engine = Engine()
    judge = LlmJudge(engine, LlmSettings(model="scripted", attempts=2))
    pairs = [("alike {a}", "first"), ("test", "unlike"), ("who", "knows")]
    assert same_by_judge(judge, pairs) == [True, False, None]
    assert any("alike {a}" in text and "first" in text for text in engine.asked)
    assert len(engine.asked) == 4  # the unclear one twice
