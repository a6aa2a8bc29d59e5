"""Rows in, cleaned rows out: what is kept, merged, dropped and listed, whatever the order of the rows."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from align.curate import analysis
from align.curate.contamination import PROMPT, ContaminationIndex, TestItem
from align.curate.curation import Models, Ranking
from align.curate.groups import merge
from align.curate.output import REMOVED_FILE, ROWS_FILE, SIMILAR_FILE, curate
from align.curate.settings import (
    CurationSettings,
    DecontaminationSettings,
    GroupChoiceSettings,
    NearDuplicateSettings,
    NeighbourSettings,
    RankSettings,
    SemanticSettings,
)
from align.data.reading import read
from align.records import Comparison, Demonstration, Message, Prompt, Response

DEFAULT = CurationSettings(decontamination=DecontaminationSettings(tests=["test"]))


def user(text):
    return (Message("user", text),)


def shown(prompt, answer="Yes.", **metadata):
    return Demonstration((*user(prompt), Message("assistant", answer)), metadata)


def group(prompt, *rated, chosen=None, **metadata):
    return Comparison(user(prompt), tuple(Response(text, reward) for text, reward in rated), chosen, metadata)


def sentence(seed, words=40):
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(draw.choices(letters, k=5)) for _ in range(words))


def cleaned(folder, rows, settings=DEFAULT, tests=(), **more):
    """The kept records, the lines of removed rows and the report."""
    folder.mkdir(exist_ok=True)
    items = [TestItem("test", PROMPT, text) for text in tests]
    report = curate(rows, ContaminationIndex.of(items, 8) if tests else None, settings, folder, **more)
    kept = read(str(folder / ROWS_FILE), format="native").records
    lines = [json.loads(line) for line in (folder / REMOVED_FILE).read_text().splitlines()]
    files = [REMOVED_FILE, ROWS_FILE, *([SIMILAR_FILE] if settings.semantic_duplicates else [])]
    assert sorted(path.name for path in folder.iterdir()) == files
    total = sum((Counter(counts) for counts in report["sources"].values()), Counter())
    assert total["rows"] == sum(number for name, number in total.items() if name != "rows")
    assert total["rows"] - total["kept"] - total["merged"] == len(lines)
    return kept, lines, report


def mixture():
    """Demonstrations and comparisons of two sources with duplicates of each kind."""
    rows = [("a", shown(sentence(seed))) for seed in range(40)]
    rows += [("b", shown(f" {sentence(seed).upper()}")) for seed in range(0, 40, 4)]
    rows += [("b", shown(sentence(seed).rsplit(" ", 2)[0] + " quite different", id=seed)) for seed in range(1, 40, 4)]
    for seed in range(100, 120):
        rows += [
            ("a", group(sentence(seed), (f"one {part}", float(part)), (f"two {part % 2}", 0.5))) for part in range(3)
        ]
        rows += [("b", group(sentence(seed), ("one 0", None), ("three", None), chosen=1))]
    rows += [("a", shown(f"Solve: {sentence(200)} {seed}")) for seed in range(3)]
    return rows


def test_results_do_not_depend_on_the_order_of_rows(tmp_path):
    rows, found = mixture(), []
    for seed in range(4):
        random.Random(seed).shuffle(rows)
        cleaned(tmp_path / str(seed), rows, tests=[sentence(200)])
        found.append([(tmp_path / str(seed) / name).read_bytes() for name in (ROWS_FILE, REMOVED_FILE)])
    assert all(each == found[0] for each in found)


def test_results_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "ROWS_ALONE", 20)
    monkeypatch.setattr(analysis, "CHUNK", 9)
    rows, found = mixture(), []
    for number in (1, 2):
        cleaned(tmp_path / str(number), rows, tests=[sentence(200)], num_workers=number)
        found.append([(tmp_path / str(number) / name).read_bytes() for name in (ROWS_FILE, REMOVED_FILE)])
    assert found[0] == found[1]


KILLED = """
import time
from align.curate import analysis
from align.curate.settings import CurationSettings

def rows():
    for _ in range(20):
        yield analysis.SourceLine("a", '{"prompt": "Why?", "metadata": {}}')
    time.sleep(600)

if __name__ == "__main__":
    analysis.ROWS_ALONE, analysis.CHUNK = 0, 1
    for _ in analysis.analyses(rows(), analysis.Analyzer(CurationSettings(), None), num_workers=2):
        print("analyzed", flush=True)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert parent.stdout.readline() == "analyzed\n"
        parent.kill()
        parent.communicate(timeout=300)  # the output ends with the last process that can write to it
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_every_row_of_the_mixture_has_the_outcome_that_it_was_planted_with(tmp_path):
    kept, lines, report = cleaned(tmp_path / "out", mixture(), tests=[sentence(200)])
    assert Counter(line["reason"] for line in lines) == {
        "exact duplicates": 10,
        "near-duplicates": 10,
        "test items: n-grams": 3,
    }
    assert report["sources"]["a"]["merged"] == 40
    assert sum(isinstance(one, Demonstration) for one in kept) == 40
    assert sum(isinstance(one, Comparison) for one in kept) == 40  # of two sources with rewards and with labels
    assert report["tests"]["test"] == {"items": {"prompt": 1}, "found": {"prompt": 1}, "rows": {"a": 3}}


def test_removed_rows_are_listed_beside_what_they_repeat(tmp_path):
    longer = f"{sentence(1)} quite so"
    rows = [("a", shown(sentence(1))), ("b", shown(longer)), ("b", shown(f"Now: {sentence(2)}"))]
    _, lines, _ = cleaned(tmp_path / "out", rows, tests=[sentence(2)])
    near, test = lines
    assert near["reason"] == "near-duplicates"
    assert (near["source"], near["text"]) == ("a", f"{sentence(1)}\n\nYes.")
    assert (near["other"]["source"], near["other"]["text"]) == ("b", f"{longer}\n\nYes.")
    assert near["similarity"] == pytest.approx(36 / 42)  # 5-grams: 36 shared, 2 and 4 of their own
    assert test["other"] == {"source": "test", "part": "prompt", "text": sentence(2)}
    assert (test["reason"], test["similarity"]) == ("test items: n-grams", 1.0)


def test_the_row_with_the_higher_reward_is_kept_then_the_longer_one(tmp_path):
    first, second = sentence(1), f"{sentence(1)} indeed"
    pair = [("a", group(first, ("x", 3.0), ("y", 1.0))), ("a", group(second, ("x", 2.0), ("y", 1.0)))]
    kept, _, _ = cleaned(tmp_path / "rewards", pair)
    assert [one.prompt[0].content for one in kept] == [first]
    kept, _, _ = cleaned(tmp_path / "lengths", [("a", Prompt(user(first))), ("a", Prompt(user(second)))])
    assert [one.messages[0].content for one in kept] == [second]


def test_groups_of_equal_prompts_have_all_distinct_responses_with_their_best_rewards(tmp_path):
    rows = [
        ("a", group("What is it?", ("one", 1.0), ("two", 2.0), origins=["p", "q"], models=["m", "n"])),
        ("a", group(" what is  it?", ("ONE", 4.0), ("three", 3.0), origins=["r", "s"])),
        ("a", group("What is it?", ("four", 0.0), ("two", 1.0))),
    ]
    kept, _, report = cleaned(tmp_path / "out", rows)
    (found,) = kept
    by_text = {one.content: one.reward for one in found.responses}
    assert by_text == {"ONE": 4.0, "two": 2.0, "three": 3.0, "four": 0.0}
    origins = dict(zip([one.content for one in found.responses], found.metadata["origins"], strict=True))
    assert origins == {"ONE": "r", "two": "q", "three": "s", "four": None}
    models = dict(zip([one.content for one in found.responses], found.metadata["models"], strict=True))
    assert models == {"ONE": None, "two": "n", "three": None, "four": None}
    assert len(found.metadata["curated"]["rows"]) == 3
    assert report["duplicate_responses"] == 2


def test_groups_with_other_labels_rewards_or_answers_stay_apart(tmp_path):
    rows = [
        ("a", group("What is it?", ("one", None), ("two", None), chosen=0)),
        ("a", group("What is it?", ("three", None), ("one", None), chosen=1)),
        ("a", group("What is it?", ("one", None), ("two", None), chosen=1)),
        ("a", group("What is it?", ("one", 1.0), ("two", 2.0))),
        ("b", group("What is it?", ("one", 10.0), ("six", 20.0))),
        ("a", group("What is it?", ("one", 1.0), ("two", 2.0), answer="2")),
        ("a", group("What is it?", ("seven", None), liked=True)),
        ("a", group("What is it?", ("eight", None), liked=False)),
    ]
    kept, lines, report = cleaned(tmp_path / "out", rows)
    assert (len(kept), lines, report["sources"]["a"]["merged"]) == (7, [], 1)
    (merged,) = [one for one in kept if len(one.responses) == 3]
    assert merged.responses[merged.chosen].content == "one"


def test_single_responses_with_a_binary_label_are_never_a_group(tmp_path):
    """Two liked answers to one prompt have equal rewards: as a group, neither would be preferred."""
    rows = [("a", group("What is it?", (text, float(liked)), liked=liked)) for text, liked in (("x", 1), ("y", 1))]
    rows += [("a", group("What is it?", ("z", 0.0), liked=0))]
    kept, lines, _ = cleaned(tmp_path / "out", rows, CurationSettings(groups=GroupChoiceSettings()))
    assert (sorted(one.responses[0].content for one in kept), lines) == (["x", "y", "z"], [])


def test_an_exponent_is_no_digit_of_its_base(tmp_path):
    rows = [("a", group(f"What is {number}?", (f"as {number}", 1.0), ("?", 0.0))) for number in ("2²", "22", "2^2")]
    kept, _, _ = cleaned(tmp_path / "out", rows)
    assert [{each.content for each in one.responses} for one in sorted(kept, key=lambda one: len(one.responses))] == [
        {"as 22", "?"},
        {"as 2²", "?"},
    ]


def test_a_merged_label_is_the_preferred_response():
    rows = [group("?", ("bad", None), ("good", None), chosen=1), group("?", ("worse", None), ("Good", None), chosen=1)]
    found = merge(rows)
    assert [one.content for one in found.responses] == ["bad", "good", "worse"]
    assert found.chosen == 1


def test_other_numbers_answers_and_system_messages_are_other_problems(tmp_path):
    text = sentence(1)
    system = Demonstration((Message("system", "Be brief."), *shown(f"{text} 3 so").messages))
    rows = [
        ("a", shown(f"{text} 3")),
        ("a", shown(f"{text} 4")),
        ("a", shown(f"{text} 3 yes", answer="9")),
        ("a", system),
    ]
    kept, _, _ = cleaned(tmp_path / "out", rows)
    assert len(kept) == 4
    near = NearDuplicateSettings(same_task=False)
    kept, _, _ = cleaned(tmp_path / "numbers", rows[:2], CurationSettings(near_duplicates=near))
    assert len(kept) == 1


def tool(name):
    return {"type": "function", "function": {"name": name, "description": name, "parameters": {}}}


def test_rows_that_differ_in_their_tools_are_neither_duplicates_nor_one_group(tmp_path):
    tools = [(), (tool("search"),), (tool("search"), tool("add")), (tool("search"),)]  # the last repeats the second
    rows = [("a", replace(shown(sentence(1)), tools=each)) for each in tools]
    kept, lines, _ = cleaned(tmp_path / "shown", rows)
    assert sorted(len(one.tools) for one in kept) == [0, 1, 2]
    assert [line["reason"] for line in lines] == ["exact duplicates"]
    rows = [("a", replace(group("Which?", ("x", 1.0), (f"y{at}", 0.0)), tools=each)) for at, each in enumerate(tools)]
    two = CurationSettings(groups=GroupChoiceSettings(keep="best_and_low"))
    for name, settings, num_responses in (("all", DEFAULT, [2, 3, 2]), ("two", two, [2, 2, 2])):
        kept, lines, _ = cleaned(tmp_path / name, rows, settings)
        assert lines == []
        found = sorted(kept, key=lambda one: len(one.tools))
        assert [one.tools for one in found] == tools[:3]
        assert [len(one.responses) for one in found] == num_responses
        assert all("tools" not in one.metadata for one in found)


def test_nothing_is_removed_where_all_rules_are_off(tmp_path):
    off = CurationSettings(exact_duplicates=False, merge_prompts=False, near_duplicates=None, decontamination=None)
    rows = mixture()
    kept, lines, report = cleaned(tmp_path / "out", rows, off, tests=[sentence(200)])
    assert (len(kept), lines) == (len(rows), [])
    assert report["duplicate_responses"] == 0


def test_chains_of_similar_texts_keep_what_differs_from_all_that_is_kept(tmp_path):
    """The first and the second row share 32 of 40 5-grams, as do the second and the third; the ends 28 of 44."""
    words, first, last = (sentence(seed, number).split() for seed, number in ((1, 40), (2, 4), (3, 4)))
    chain = [words, [*words[:36], *last], [*first, *words[4:36], *last]]
    rows = [("a", group(" ".join(each), ("x", 9.0 - at), ("y", 0.0))) for at, each in enumerate(chain)]
    near = NearDuplicateSettings(threshold=0.75)
    kept, lines, _ = cleaned(tmp_path / "out", rows, CurationSettings(near_duplicates=near))
    assert {one.prompt[0].content for one in kept} == {" ".join(chain[0]), " ".join(chain[2])}
    assert [line["similarity"] for line in lines] == [pytest.approx(32 / 40)]


SYNONYMS = {"car": "automobile", "fast": "quickly", "buy": "purchase", "large": "big", "help": "aid"}


def by_words(texts):
    """Sums of a random vector for each word, equal for synonyms and independent of the order of words."""
    found = []
    for text in texts:
        words = [SYNONYMS.get(word, word) for word in text.lower().replace(".", " ").replace("?", " ").split()]
        vectors = [np.random.default_rng(list(word.encode())).normal(size=64) for word in words]
        found.append(np.sum(vectors, axis=0))
    return np.array(found, np.float32)


SIMILAR = ("How can I buy a large car and drive it fast?", "How can I purchase a big automobile and drive it quickly?")
OPPOSITE = "How can I not buy a large car and drive it fast?"


@pytest.mark.parametrize("action", ["report", "remove"])
def test_rewordings_are_listed_or_removed_and_negations_are_kept(tmp_path, action):
    rows = [("a", Prompt(user(text))) for text in (*SIMILAR, OPPOSITE, "What is the capital of this country?")]
    settings = CurationSettings(semantic_duplicates=SemanticSettings(action=action))
    kept, lines, report = cleaned(tmp_path / "out", rows, settings, models=Models(encode=by_words))
    listed = [json.loads(line) for line in (tmp_path / "out" / SIMILAR_FILE).read_text().splitlines()]
    others = [line for line in listed if line["reason"] == "other task: negations"]
    assert [(line["text"], line["other"]["text"]) for line in others] in ([(OPPOSITE, text)] for text in SIMILAR)
    found = lines if action == "remove" else [line for line in listed if line not in others]
    (line,) = found
    assert (line["reason"], line["text"], line["other"]["text"]) == ("semantic duplicates", *SIMILAR)  # longer is kept
    assert line["similarity"] == pytest.approx(1, abs=1e-6)
    assert len(kept) == (3 if action == "remove" else 4)
    assert report["similar"] == {"other task": 1, **({} if action == "remove" else {"semantic duplicates": 1})}


def test_test_prompts_in_other_words_are_removed_where_their_tasks_agree(tmp_path):
    rows = [("a", Prompt(user(text))) for text in (SIMILAR[1], SIMILAR[1].replace("can I", "can I not"), "What is it?")]
    rule = DecontaminationSettings(tests=["test"], neighbours=NeighbourSettings(nearest=2, threshold=0.8))
    settings = CurationSettings(decontamination=rule)
    models = Models(encode_tests=by_words)
    kept, lines, report = cleaned(tmp_path / "out", rows, settings, tests=SIMILAR[:1], models=models)
    (line,) = lines
    assert (line["reason"], line["text"], line["other"]["text"]) == ("test items: neighbours", *reversed(SIMILAR))
    assert len(kept) == 2
    assert report["tests"]["test"]["rows"] == {"a": 1}
    models = Models(encode_tests=by_words, confirm=lambda pairs: [None] * len(pairs))
    kept, _, report = cleaned(tmp_path / "unclear", rows, settings, tests=SIMILAR[:1], models=models)
    assert (len(kept), report["unclear_neighbours"]) == (3, 2)


def test_all_rows_of_a_test_prompt_in_other_words_are_removed_and_count_as_one_of_the_nearest(tmp_path):
    rows = [("a", shown(SIMILAR[1], f"answer {number}")) for number in range(3)]
    rule = DecontaminationSettings(tests=["test"], neighbours=NeighbourSettings(nearest=1, threshold=0.8))
    settings = CurationSettings(decontamination=rule, near_duplicates=None)
    models = Models(encode_tests=by_words)
    kept, lines, report = cleaned(tmp_path, [*rows, ("a", shown("What?"))], settings, tests=SIMILAR[:1], models=models)
    assert (len(kept), len(lines), report["tests"]["test"]["rows"]) == (1, 3, {"a": 3})


def test_groups_without_signal_are_dropped_and_others_keep_the_chosen_responses(tmp_path):
    rows = [
        ("a", group("First?", *((f"r{at}", float(at)) for at in range(6)), origins=list("abcdef"), models=[*"uvwxyz"])),
        ("a", group("Second?", ("x", 1.0), ("y", 1.0))),
        ("a", group("Third?", ("x", None), ("y", None), chosen=1)),
        ("a", group("Fourth?", ("x", 2.0), ("y", 1.0), ("z", 0.0), chosen=1)),
        ("a", group("Fifth?", ("x", 1.0), ("y", 1.0), chosen=0)),  # losses on labels learn from it
    ]
    settings = CurationSettings(groups=GroupChoiceSettings(keep="most_variance", responses=2))
    kept, lines, _ = cleaned(tmp_path / "out", rows, settings)
    assert [line["reason"] for line in lines] == ["groups without a reward difference"]
    found = {one.prompt[0].content: one for one in kept}
    assert [one.content for one in found["First?"].responses] == ["r5", "r0"]
    assert found["First?"].metadata["origins"] == ["f", "a"]
    assert found["First?"].metadata["models"] == ["z", "u"]
    assert (len(found["Third?"].responses), found["Third?"].chosen) == (2, 1)
    assert found["Fifth?"].chosen is not None
    fourth = found["Fourth?"]
    assert [one.content for one in fourth.responses] == ["y", "z"]
    assert fourth.chosen == 0


def test_ranks_are_written_to_the_rows_and_the_best_share_is_kept(tmp_path):
    rows = [("a", shown(sentence(seed))) for seed in range(8)]

    def rank(records):
        scores = [float(sentence(3) in record.messages[0].content) for record in records]
        return Ranking(scores, sorted(range(len(scores)), key=lambda row: -scores[row]))

    scored, lines, _ = cleaned(
        tmp_path / "all", rows, CurationSettings(rank=RankSettings(by="ifd")), models=Models(rank=rank)
    )
    assert (len(scored), lines) == (8, [])
    assert sorted(one.metadata["curated"]["ifd"] for one in scored) == [0.0] * 7 + [1.0]
    settings = CurationSettings(rank=RankSettings(by="ifd", keep=0.125))
    (best,), lines, _ = cleaned(tmp_path / "best", rows, settings, models=Models(rank=rank))
    assert best.messages[0].content == sentence(3)
    assert {(line["reason"], line["similarity"]) for line in lines} == {("below the kept share", 0.0)}
