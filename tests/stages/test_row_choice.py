"""Rows in a random order: the same ones wherever a source is read, disjoint where their ranges are, as in the file."""

import json
from collections import Counter

import pytest
from planned import inputs_of

from align.errors import InputError
from align.evaluation.tasks import TASKS
from align.records import Demonstration
from align.stages.embedder import Embedder
from align.stages.inputs.opening import first_records
from align.stages.inputs.row_choice import RowChoice
from align.stages.inputs.sources import SourceSettings, check_source, streamed
from align.stages.responses.tasks import task_rows

SUBJECTS, OF_EACH = 4, 25


@pytest.fixture
def file(tmp_path):
    """Rows that are sorted by subject, as MMLU's are."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": f"{number}?", "choices": list("abcd"), "answer": 0, "subject": f"s{number // OF_EACH}"}
        for number in range(SUBJECTS * OF_EACH)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(file, **settings):
    """The numbers of the rows of a task."""
    source = SourceSettings(path=str(file), order="random", **settings)
    check_source(source)
    return [int(row["question"].rstrip("?")) for row in task_rows(TASKS["mmlu"], "rows", inputs_of(source))]


def test_a_limit_of_a_sorted_file_takes_rows_of_all_subjects_in_the_order_of_the_file(file):
    taken = questions(file, limit=40)
    assert len(taken) == 40
    assert taken == sorted(taken)
    assert set(Counter(number // OF_EACH for number in taken)) == set(range(SUBJECTS))
    assert taken != questions(file, limit=40, seed=1)
    assert set(questions(file, limit=10)) < set(taken)  # a smaller limit takes some of them


def test_ranges_that_do_not_overlap_share_no_rows_and_cover_the_file(file):
    parts = [questions(file, skip=skip, limit=30) for skip in (0, 30, 60, 90)]
    assert [len(part) for part in parts] == [30, 30, 30, 10]
    assert sorted(sum(parts, [])) == list(range(100))


def test_rows_that_are_trained_on_are_those_of_a_task(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{number}", "completion": "yes"} for number in range(50)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceSettings(path=str(path), order="random", skip=5, limit=12)
    found = streamed(source, kind=Demonstration, seed=3)
    records = list(found.records)
    numbers = [int(each.record.messages[0].content) for each in records]
    assert numbers == sorted(source.choice.places(50))
    assert [each.row for each in records] == list(range(12))
    assert [each.place for each in records] == [f"{path}: row {number + 1}" for number in numbers]
    assert found.statistics.num_rows == 12
    assert len(list(first_records(source, 8))) == 8  # of the file, before a step runs
    with pytest.raises(InputError, match="skip is 50, and the source has no more rows"):
        list(streamed(source.model_copy(update={"skip": 50}), kind=Demonstration, seed=3).records)


def test_rows_of_one_item_are_taken_together():
    rows = [f"{item}-{part}" for item in "abcdefgh" for part in (1, 2)]
    taken = list(RowChoice(0, 3, 0).of(rows, item=lambda row: row[0]))
    assert len(taken) == 6
    assert [row[2] for row in taken] == ["1", "2"] * 3
    assert taken == sorted(taken)


def test_a_permutation_is_uniform():
    """Of two out of four rows, each pair is taken equally often: 600 draws (chi-squared test at 0.1 %)."""
    drawn = Counter(RowChoice(0, 2, seed).places(4) for seed in range(600))
    assert sum((drawn[pair] - 100) ** 2 / 100 for pair in drawn) < 20.5
    assert len(drawn) == 6


def test_an_encoder_is_trained_on_them_too_and_errors_name_the_row_of_the_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number}"}) + "\n" for number in range(30)))
    source = SourceSettings(path=str(path), order="random", skip=20, limit=4)
    stage = Embedder(data="rows")
    chosen = sorted(source.choice.places(30))
    assert [int(row["text"]) for row in stage.training_rows(source)] == chosen
    broken = [{"text": f"{number}"} if number != chosen[2] else {"text": 5} for number in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in broken))
    with pytest.raises(InputError, match=f"row {chosen[2] + 1} has text 5"):
        stage.training_rows(source)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"path": "tasks:code", "limit": 5, "order": "random"}, "procedural rows are random"),
        ({"path": "rows.jsonl", "order": "random"}, "it is for skip and limit"),
        ({"path": "rows.jsonl", "seed": 2}, "it is only for tasks:KIND, constraints or a random order"),
    ],
)
def test_an_order_without_effect_is_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        check_source(SourceSettings(**settings))
