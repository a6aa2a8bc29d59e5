"""`measures.json`: yields, samples of one size, rewards, the map and examples with their lineage."""

import json
import math
from random import Random

import numpy as np
import pytest

from align.artifacts import MEASURES, fingerprint
from align.data.reading import read
from align.synth.measures import write_measures
from align.synth.measures.hashed_words import hashed_words
from align.synth.measures.written import BINS, MAX_POINTS, MAX_ROWS, MIN_ROWS, Yields

WORDS = [f"word{number}" for number in range(300)]


def made(family, number, *, seed=0, **columns):
    draw = Random(f"{family} {number} {seed}")
    return {"id": f"{family}-{number}", "family": family, "text": " ".join(draw.choices(WORDS, k=30)), **columns}


def measured(folder, rows, **settings):
    path = write_measures(folder, rows, **settings)
    assert path == folder / MEASURES
    return json.loads(path.read_text())


ROWS = [
    *(made("open_qa", number, reward=number / 100 + 0.005, parents=[f"topic-{number % 7}"]) for number in range(100)),
    *(made("writing", number, topic=f"topic-{number % 3}") for number in range(240)),
]
TOPICS = [{"id": f"topic-{number}", "family": "topics", "text": f"topic {number}"} for number in range(7)]


def test_the_file_does_not_depend_on_the_order_of_the_rows(tmp_path):
    (tmp_path / "other").mkdir()
    first = measured(tmp_path, ROWS, ancestors=TOPICS)
    assert measured(tmp_path / "other", list(reversed(ROWS)), ancestors=TOPICS) == first


def test_asked_rows_are_kept_or_dropped_and_a_family_without_rows_is_shown(tmp_path):
    yields = Yields(
        asked={"open_qa": 110, "writing": 240, "maths": 5},
        dropped={"open_qa": {"refused": 7, "duplicate": 3}, "maths": {"too few": 5}},
    )
    found = measured(tmp_path, ROWS, yields=yields)["families"]
    assert {name: (one["rows"], one["asked"], sum(one["dropped"].values())) for name, one in found.items()} == {
        "open_qa": (100, 110, 10),
        "writing": (240, 240, 0),
        "maths": (0, 5, 5),
    }
    assert all(found["maths"][name] is None for name in ("distinct", "self_bleu", "vendi", "reward_mean"))


def test_every_family_is_measured_on_a_sample_of_the_same_size(tmp_path):
    found = measured(tmp_path, ROWS)
    assert found["sample"] == {"rows": 100, "embedded": 100, "words": 3000, "n": 2}
    assert {one["sampled"] for one in found["families"].values()} == {100} == {found["all"]["sampled"]}
    assert {one["words"] for one in found["families"].values()} == {3000}
    # Texts of one distribution have the same diversity in samples of one size, although one family is larger
    first, second = found["families"].values()
    assert first["vendi"] == pytest.approx(second["vendi"], rel=0.05)
    assert first["distinct"] == pytest.approx(second["distinct"], rel=0.02)


def test_copies_are_one_text(tmp_path):
    rows = [{**made("copies", 0), "id": f"copies-{number}"} for number in range(120)] + ROWS
    one = measured(tmp_path, rows)["families"]["copies"]
    assert (one["vendi"], one["self_bleu"]) == (pytest.approx(1), pytest.approx(1))
    assert (one["mean_distance"], one["nearest_distance"]) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


def test_a_small_family_does_not_reduce_the_sample_of_the_others_below_the_minimum(tmp_path):
    found = measured(tmp_path, [*ROWS, made("rare", 0)])
    assert found["sample"]["rows"] == MIN_ROWS
    assert {name: one["sampled"] for name, one in found["families"].items()} == {
        "open_qa": MIN_ROWS,
        "writing": MIN_ROWS,
        "rare": 1,
    }
    assert found["families"]["rare"]["vendi"] is None


def test_rewards_are_counted_in_bins_of_all_families(tmp_path):
    rows = [*ROWS, *(made("code", number, reward=2.0 * (number > 0)) for number in range(30))]
    found = measured(tmp_path, rows)
    edges, counts = found["rewards"]["edges"], found["rewards"]["counts"]
    assert (edges[0], edges[-1], len(edges)) == (0.0, 2.0, BINS + 1)
    assert {name: sum(each) for name, each in counts.items()} == {"code": 30, "open_qa": 100}
    assert counts["open_qa"][:10] == [10] * 10, "0.005 to 0.995 in steps of 0.01, in bins of 0.1"
    assert found["families"]["open_qa"]["reward_mean"] == pytest.approx(0.5)
    assert found["families"]["open_qa"]["reward_deviation"] == pytest.approx(math.sqrt((100**2 - 1) / 12) / 100)
    assert found["families"]["writing"]["rewarded"] == 0


def test_difficulties_are_averaged(tmp_path):
    rows = [made("a", number, ifd=0.5 + number, pass_rate=number / 2) for number in range(3)]
    one = measured(tmp_path, rows)["families"]["a"]
    assert (one["ifd_mean"], one["ifd_above_one"]) == (pytest.approx(1.5), pytest.approx(2 / 3))
    assert (one["pass_rate_mean"], one["pass_rate_between"]) == (pytest.approx(0.5), pytest.approx(1 / 3))


def test_topics_without_rows_are_not_covered(tmp_path):
    asked = {f"topic-{number}": 100 for number in range(4)}
    found = measured(tmp_path, ROWS, yields=Yields(topics=asked))["topics"]
    assert (found["num"], found["covered"]) == (4, 0.75)
    assert found["lowest"][0] == ["topic-3", 0.0]
    assert measured(tmp_path, [made("a", 0)])["topics"] is None


def test_the_map_separates_families_that_have_no_word_in_common(tmp_path):
    rows = [
        {"id": f"{family}-{number}", "family": family, "text": f"{' '.join([family] * 5)} {number}"}
        for family in ("red", "blue")
        for number in range(400)
    ]
    found = measured(tmp_path, rows)["map"]
    assert (len(found["points"]), found["rows"]) == (MAX_POINTS, 800)
    assert {name for name, *_ in found["points"]} == {"red", "blue"}
    sides = {family: {x > 0 for name, x, _, _ in found["points"] if name == family} for family in ("red", "blue")}
    assert sorted(map(len, sides.values())) == [1, 1] and sides["red"] != sides["blue"]


def test_examples_show_their_line_of_first_parents(tmp_path):
    rows = [
        {"id": "b", "family": "revised", "text": "longer", "parents": ["a", "x"]},
        {"id": "a", "family": "open_qa", "text": "short", "parents": ["topic-1", "topic-2"]},
    ]
    found = {one["id"]: one for one in measured(tmp_path, rows, ancestors=TOPICS)["examples"]}
    assert [one["text"] for one in found["b"]["lineage"]] == ["short", "topic 1"]
    assert (found["b"]["parents"], found["a"]["parents"]) == (2, 2)
    assert [one["family"] for one in found["a"]["lineage"]] == ["topics"]


def test_parents_that_are_unknown_or_run_in_a_circle_end_the_lineage(tmp_path):
    rows = [made("a", 0, parents=["a-1"]), made("a", 1, parents=["a-0"])]
    found = measured(tmp_path, rows)["examples"]
    assert [len(one["lineage"]) for one in found] == [1, 1]
    assert measured(tmp_path, [made("a", 0, parents=["gone"])])["examples"][0]["lineage"] == []


def test_the_embedder_sees_each_row_once_and_is_named(tmp_path):
    seen = []

    def embedder(texts):
        seen.extend(texts)
        return np.eye(8)[[index % 8 for index in range(len(texts))]]

    found = measured(tmp_path, ROWS, embedder=embedder, embedding="hidden states of sft")
    texts = [row["text"] for row in ROWS]
    assert len(seen) == len(set(seen)) and set(seen) <= set(texts)
    assert len(seen) >= 200, "100 of each family"
    assert found["embedding"] == "hidden states of sft"
    assert found["all"]["vendi"] <= 8


def test_measures_are_neither_rows_nor_part_of_the_fingerprint_of_a_folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ask"}\n')
    before = fingerprint(tmp_path)
    measured(tmp_path, ROWS)
    assert fingerprint(tmp_path) == before
    assert len(read(str(tmp_path)).records) == 1


def test_no_rows_are_measured_as_none(tmp_path):
    found = measured(tmp_path, [], yields=Yields(asked={"a": 3}, dropped={"a": {"empty": 3}}))
    assert (found["families"]["a"]["asked"], found["map"], found["rewards"], found["examples"]) == (3, None, None, [])


def test_thousands_of_rows_take_seconds(tmp_path):
    rows = [made("a", number) for number in range(5000)]
    found = measured(tmp_path, rows, embedder=lambda texts: hashed_words(texts, width=64))
    assert found["map"]["rows"] == MAX_ROWS and found["all"]["rows"] == 5000


def test_many_families_are_embedded_in_equal_numbers(tmp_path):
    sizes = {f"family_{number}": 120 + 40 * number for number in range(25)}
    rows = [made(family, number) for family, size in sizes.items() for number in range(size)]
    found = measured(tmp_path, rows, embedder=lambda texts: hashed_words(texts, width=64))
    assert found["sample"]["embedded"] == 2000 // 25
    assert {one["embedded"] for one in (*found["families"].values(), found["all"])} == {2000 // 25}
