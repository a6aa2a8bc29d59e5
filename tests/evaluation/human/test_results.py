"""Results of filled forms, by counting, and their agreement, by published examples."""

import csv
import io
import json
import random

import pytest

from align.commands.human.sheets import export, import_ratings
from align.errors import InputError
from align.evaluation.human.ratings import Rating, read_ratings
from align.evaluation.human.results import agreement, human_results
from align.evaluation.human.scales import LENGTHS

# Krippendorff 2011 (Computing Krippendorff's alpha-reliability), sec. C: 4 observers, 12 units
OBSERVERS = {
    "A": "1 2 3 3 2 1 4 1 2 . . .",
    "B": "1 2 3 3 2 2 4 1 2 5 . 3",
    "C": ". 3 3 3 2 3 4 2 2 5 1 .",
    "D": "1 2 3 3 2 4 4 1 2 5 1 .",
}


KEY = {"sheet": "s", "responses": {name: {"item": name[0], "model": name[2]} for name in ("1.a", "1.b", "2.a")}}
FULL = {"helpfulness": 2, "truthfulness": 5}


def read(folder, ratings, *, sheet="s", times=1):
    path = folder / "ratings.json"
    path.write_text(json.dumps({"sheet": sheet, "annotator": "ann", "ratings": ratings}))
    return read_ratings([str(path)] * times, KEY)


def rating(annotator, item, model, helpfulness, truthfulness=3, length="just right"):
    return Rating(annotator, item, model, {"helpfulness": helpfulness, "truthfulness": truthfulness}, length)


def test_agreement_is_krippendorffs_alpha_with_ordinal_differences():
    ratings = [
        rating(name, str(number), "m", int(level))
        for name, levels in OBSERVERS.items()
        for number, level in enumerate(levels.split())
        if level != "."
    ]
    found = agreement(ratings)
    assert found["helpfulness"] == pytest.approx(0.815, abs=5e-4)
    assert found["truthfulness"] is None  # all ratings are equal
    assert agreement(ratings[:9])["helpfulness"] is None  # one annotator


def test_results_are_the_counts_of_each_comparison():
    """The report's 115, 190 and 103 of 408 comparisons: 136 prompts with three annotators each."""
    outcomes = ["win"] * 115 + ["tie"] * 190 + ["loss"] * 103
    random.Random(0).shuffle(outcomes)
    levels = {"win": (4, 3), "tie": (3, 3), "loss": (2, 3)}
    ratings, categories, by_category = [], {}, {}
    for number, outcome in enumerate(outcomes):
        item, annotator = str(number // 3), str(number % 3)
        categories[item] = "rewrite" if number // 3 % 4 == 0 else "other"
        by_category.setdefault(categories[item], []).append(outcome)
        for model, level in zip(("ours", "base"), levels[outcome], strict=True):
            ratings.append(rating(annotator, item, model, level, length=LENGTHS[(number + (model == "ours")) % 3]))
    found = human_results(ratings, "base", categories)
    helpful = found["models"]["ours"]["helpfulness"]
    assert [round(100 * helpful[name]["value"], 2) for name in ("win", "tie", "loss")] == [28.19, 46.57, 25.25]
    assert (helpful["ratings"], helpful["win"]["n"]) == (408, 136)
    assert helpful["net"]["value"] == pytest.approx(12 / 408)
    assert helpful["net"]["low"] < 0 < helpful["net"]["high"]
    assert found["models"]["ours"]["truthfulness"]["tie"]["value"] == 1
    assert found["models"]["ours"]["overall"] == helpful
    for name, own in by_category.items():
        losses = found["models"]["ours"]["by_category"][name]["loss"]["value"]
        assert losses == pytest.approx(own.count("loss") / len(own))
    assert sum(found["length"]["ours"][name]["value"] for name in LENGTHS) == pytest.approx(1)


def test_the_interval_is_over_prompts():
    """Three annotators who always agree are one observation."""
    draw = random.Random(1)
    ratings = []
    for number in range(100):
        level = draw.choice([2, 4])
        for annotator in "abc":
            ratings += [rating(annotator, str(number), "ours", level), rating(annotator, str(number), "base", 3)]
    found = human_results(ratings, "base", {str(number): "" for number in range(100)})
    win = found["models"]["ours"]["overall"]["win"]
    assert win["high"] - win["low"] == pytest.approx(2 * 1.96 * 0.05, rel=0.2)


def test_a_complete_failure_is_below_every_level():
    ratings = [rating("a", "1", "ours", 0, 0), rating("a", "1", "base", 1, 1)]
    found = human_results(ratings, "base", {"1": ""})
    assert found["models"]["ours"]["overall"]["loss"]["value"] == 1
    assert (found["complete_failure"]["ours"]["value"], found["complete_failure"]["base"]["value"]) == (1, 0)


@pytest.fixture
def sheet(tmp_path):
    rows = [{"prompt": f"Question {number}", "category": "open QA"} for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("ours", "base", "old"):
        thought = "<think>I give myself away.</think>" * (name == "ours")
        lines = [json.dumps({"prompt": row["prompt"], "response": f"{thought}of {name}"}) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = [f"policy={tmp_path / 'ours.jsonl'}", str(tmp_path / "base.jsonl"), str(tmp_path / "old.jsonl")]
    summary = export(str(tmp_path / "prompts.jsonl"), files, tmp_path / "sheet", limit=None, seed=0)
    assert (summary["prompts"], summary["models"]) == (3, ["policy", "base", "old"])
    return tmp_path / "sheet"


def test_the_csv_and_the_json_of_a_form_give_the_same_results(sheet, tmp_path):
    """Annotators who see the texts, without thoughts, prefer the policy, at any position."""
    rows = list(csv.DictReader(io.StringIO((sheet / "form.csv").read_text())))
    key = json.loads((sheet / "key.json").read_text())
    ratings = {}
    for row in rows:
        level = {"of ours": "5", "of base": "3"}.get(row["response"])
        row |= {"helpfulness": level, "truthfulness": level, "length": "too long"}
        row |= {} if level else {"complete_failure": "x", "helpfulness": ""}
        answer = {"helpfulness": int(level), "truthfulness": int(level)} if level else {"complete_failure": True}
        ratings[row["response_id"]] = {**answer, "length": "too long"}
    with (tmp_path / "ann.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "bob.json").write_text(json.dumps({"sheet": key["sheet"], "annotator": "bob", "ratings": ratings}))
    by_file = [import_ratings(sheet / "key.json", [str(tmp_path / name)], "base") for name in ("ann.csv", "bob.json")]
    for found, annotator in zip(by_file, ("ann", "bob"), strict=True):
        assert found.pop("annotators") == [annotator]
    assert by_file[0] == by_file[1]
    assert by_file[0]["models"]["policy"]["overall"]["win"]["value"] == 1
    assert by_file[0]["models"]["old"]["overall"]["loss"]["value"] == 1
    assert by_file[0]["models"]["policy"]["by_category"]["open QA"]["win"]["n"] == 3
    both = import_ratings(sheet / "key.json", [str(tmp_path / "ann.csv"), str(tmp_path / "bob.json")], "base")
    assert both["agreement"]["helpfulness"] == 1
    assert both["agreement"]["length"] is None


def test_incomplete_answers_are_counted_and_left_out(tmp_path):
    found = read(tmp_path, {"1.a": FULL, "1.b": {"helpfulness": 3}})
    assert [(each.item, each.length) for each in found.ratings] == [("1", None)]
    assert found.incomplete == {"ann": 2}


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ({"9.a": FULL}, "no response '9.a'"),
        ({"1.a": {**FULL, "helpfulness": 6}}, "1.a: helpfulness is a level from 1 to 5, not '6'"),
        ({"1.a": {**FULL, "length": "long"}}, "length is one of too short"),
        ({"1.a": {"complete_failure": True, "length": "long"}}, "length is one of too short"),
        (
            {"1.a": {**FULL, "complete_failure": "y"}},
            "complete_failure is one of true, yes, 1, x, false, no, 0, not 'y'",
        ),
        ({"1.a": 3}, "ratings are {response: answers}"),
    ],
)
def test_answers_that_the_form_does_not_have_are_errors(tmp_path, ratings, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, ratings)


def test_a_response_in_two_rows_of_a_csv_is_an_error(tmp_path):
    path = tmp_path / "ann.csv"
    rows = "s,1.a,5,5,,too long\n" * 2
    path.write_text("sheet,response_id,helpfulness,truthfulness,complete_failure,length\n" + rows)
    with pytest.raises(InputError, match=r"two rows are of the response '1\.a'"):
        read_ratings([str(path)], KEY)


def test_files_of_another_sheet_and_of_one_annotator_twice_are_errors(tmp_path):
    with pytest.raises(InputError, match="is of sheet 'other'"):
        read(tmp_path, {}, sheet="other")
    with pytest.raises(InputError, match="annotator 'ann' also filled"):
        read(tmp_path, {"1.a": FULL}, times=2)


def test_a_baseline_that_is_not_in_the_key_is_an_error(sheet, tmp_path):
    with pytest.raises(InputError, match="--baseline: the key has no model 'ours'; it has base, old, policy"):
        import_ratings(sheet / "key.json", [], "ours")
