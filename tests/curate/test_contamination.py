"""Test items in rows: against a count of covered words on tuples, and on planted items."""

import random

import pytest

from align.curate.contamination import ANSWER, MAX_ITEMS, PROMPT, ContaminationIndex, TestItem
from align.curate.ngrams import WORDS, normalized

NGRAM = 8


def sentence(draw, words, vocabulary=3000):
    return " ".join(f"w{draw.randrange(vocabulary)}" for _ in range(words))


def coverage(item, fields):
    """The share of an item's words that n-grams in one of the fields cover."""
    words = WORDS.findall(normalized(item))
    known = set()
    for field in fields:
        own = WORDS.findall(normalized(field))
        known |= {tuple(own[at : at + NGRAM]) for at in range(len(own) - NGRAM + 1)}
    covered = set()
    for at in range(len(words) - NGRAM + 1):
        if tuple(words[at : at + NGRAM]) in known:
            covered |= set(range(at, at + NGRAM))
    return len(covered) / len(words)


def index(*prompts, answers=()):
    items = [TestItem("test", PROMPT, text) for text in prompts] + [TestItem("test", ANSWER, text) for text in answers]
    return ContaminationIndex.of(items, NGRAM)


def test_coverage_is_that_of_a_count_over_all_items():
    draw = random.Random(1)
    items = [sentence(draw, draw.randrange(NGRAM, 40)) for _ in range(40)]
    found = index(*items)
    partial = 0
    for _ in range(200):
        words = draw.choice(items).split()
        start = draw.randrange(len(words))
        field = " ".join([sentence(draw, 5), *words[start : start + draw.randrange(4, 30)], sentence(draw, 5)])
        hit = found.find(sentence(draw, 12), [field])
        expected = max(coverage(item, [field]) for item in items)
        assert (0.0 if hit is None else hit.coverage) == pytest.approx(expected)
        partial += 0 < expected < 1
    assert partial > 50


def test_verbatim_changed_and_reordered_items_are_found_and_paraphrases_are_not():
    draw = random.Random(2)
    item = sentence(draw, 30)
    words = item.split()
    find = index(item, sentence(draw, 30)).find
    assert find(item.upper() + "  ", []).is_equal
    assert find(f"Solve this: {item}", []).coverage == 1
    assert find("Solve this.", [f"The task is: {item}"]).coverage == 1
    changed = [*words[:10], "other", *words[11:]]
    assert find(" ".join(changed), []).coverage == pytest.approx(29 / 30)
    assert find(" ".join([*words[15:], *words[:15]]), []).coverage == 1
    assert find(" ".join(words[::-1]), []) is None
    assert find(sentence(draw, 30), []) is None


def test_words_of_several_rows_or_fields_do_not_join_to_an_ngram():
    item = sentence(random.Random(3), 8)
    words = item.split()
    assert index(item).find(" ".join(words[:4]), [" ".join(words[4:])]) is None


def test_short_prompts_are_found_as_whole_prompts_only():
    find = index("Who are you?", "How far is the moon?").find
    assert find("who are you", []).coverage == 1
    assert find("Tell me: who are you?", []) is None
    assert find("Something else.", ["Who are you?"]) is None


def test_short_answers_are_not_searched_and_long_ones_are():
    draw = random.Random(4)
    long = sentence(draw, 12)
    find = index("What is 6 times 7, and why do people ask that?", answers=["42", long]).find
    assert find("Say a number.", ["42"]) is None
    hit = find("Say something.", [long])
    assert (hit.item.part, hit.coverage) == (ANSWER, 1)


def test_ngrams_of_a_template_do_not_count():
    draw = random.Random(5)
    template = sentence(draw, 20)
    items = [f"{template} {sentence(draw, 12)}" for _ in range(MAX_ITEMS + 1)]
    find = index(*items).find
    assert find(f"{template} {sentence(draw, 12)}", []) is None
    hit = find(items[3].split(maxsplit=20)[-1], [])  # without the template
    words = 12 + NGRAM - 1  # that an n-gram of the item's own covers
    assert hit.coverage == pytest.approx(12 / words)
    assert find(items[3], []).is_equal


def test_the_order_of_items_and_an_empty_index_change_nothing():
    draw = random.Random(6)
    items = [sentence(draw, 10) for _ in range(20)]
    rows = [f"{items[at]} {items[(at + 7) % 20]}" for at in range(20)]
    assert [index(*items).find(row, []) for row in rows] == [index(*items[::-1]).find(row, []) for row in rows]
    assert index().find("anything", ["at all"]) is None
