"""`where` keeps rows with certain values, counts the others, and names values that do not occur."""

from pathlib import Path

import pytest
from format_rows import chat, demonstration
from public_rows import moderation

from align.data.reading import read, stream
from align.errors import InputError
from align.models.settings import PolicySettings
from align.records import Prompt
from align.stages.embedder import Embedder
from align.stages.inputs.context import StepInputs
from align.stages.inputs.sources import SourceSettings, check_source, streamed
from align.stages.responses.tasks import TaskSettings

SOURCES = ["MATH", "ARB", "scibench", "ARB", "leetcode"]
ROWS = [
    {"instruction": f"ask {number}", "output": "say", "data_source": source} for number, source in enumerate(SOURCES)
]


def kept(path, where, **settings):
    return [record.messages[0].content for record in read(path, where=where, **settings).records]


def test_rows_with_one_of_the_values_are_kept_and_the_others_counted(lines):
    found = stream(lines(*ROWS), where={"data_source": ["ARB", "scibench"]})
    reading = found.read()
    assert reading.records == [
        demonstration(f"ask {number}", "say", data_source=SOURCES[number]) for number in (1, 2, 3)
    ]
    assert (reading.num_rows, reading.dropped) == (5, {"data_source not in where": 2})
    assert not found.statistics.unused_columns, "the column is used by where"


def test_a_single_value_needs_no_list_and_the_limit_counts_kept_rows(lines):
    assert kept(lines(*ROWS), {"data_source": "ARB"}) == ["ask 1", "ask 3"]
    assert kept(lines(*ROWS), {"data_source": ["ARB", "leetcode"]}, limit=2) == ["ask 1", "ask 3"]


def test_all_columns_must_have_a_wanted_value(lines):
    rows = [{**row, "level": number % 2} for number, row in enumerate(ROWS)]
    assert kept(lines(*rows), {"data_source": ["ARB", "MATH"], "level": [1]}) == ["ask 1", "ask 3"]


def test_a_row_that_is_left_out_is_not_read(lines):
    broken = {"instruction": "ask", "output": "", "data_source": "other"}
    assert kept(lines(broken, *ROWS), {"data_source": "MATH"}) == ["ask 0"]


@pytest.mark.parametrize("value, text", [(3, "3"), (True, "true"), (True, "True"), (0.5, "0.5"), ("x", "x")])
def test_a_number_or_truth_value_matches_its_text(tmp_path, value, text):
    (tmp_path / "rows.csv").write_text(f"prompt,level\nfirst,{text}\nsecond,other\n")
    assert kept(str(tmp_path / "rows.csv"), {"level": value}) == ["first"]


def test_true_is_not_one(lines):
    rows = [{"prompt": "a", "level": 1}, {"prompt": "b", "level": True}]
    assert kept(lines(*rows), {"level": [True]}) == ["b"]
    assert kept(lines(*rows), {"level": [1]}) == ["a"]


def test_metadata_that_a_format_adds_is_looked_at_after_reading(lines):
    rows = [
        {"conversation": chat(f"ask {number}", "say"), "openai_moderation": moderation(flag, False)}
        for number, flag in enumerate((True, False, False))
    ]
    found = read(lines(*rows), where={"flagged": False})
    assert [record.messages[0].content for record in found.records] == ["ask 1", "ask 2"]
    assert found.dropped == {"flagged not in where": 1}


def test_columns_are_those_of_the_file_not_of_the_format(lines):
    rows = [{"q": "ask", "a": "say", "kind": kind} for kind in "xy"]
    columns = {"prompt": "q", "completion": "a"}
    assert kept(lines(*rows), {"kind": "y"}, columns=columns) == ["ask"]
    assert kept(lines(*rows), {"q": "ask", "kind": "x"}, columns=columns) == ["ask"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"source": "ARB"}, "row 1: where names 'source', and the row has data_source, instruction, output"),
        (
            {"data_source": ["ARB", "SciBench"]},
            "no row has data_source 'SciBench', which where names; other values are: 'MATH', 'scibench', 'leetcode'",
        ),
        (
            {"data_source": "arb"},
            "no row has data_source 'arb', which where names; other values are: 'MATH', 'ARB', 'scibench', 'leetcode'",
        ),
    ],
)
def test_columns_and_values_that_do_not_occur_are_errors(lines, where, message):
    with pytest.raises(InputError) as caught:
        read(lines(*ROWS), where=where)
    assert message in str(caught.value)


def test_a_limit_that_is_reached_leaves_no_time_to_miss_a_value(lines):
    assert kept(lines(*ROWS), {"data_source": ["ARB", "unseen"]}, limit=2) == ["ask 1", "ask 3"]


def test_joined_rows_cannot_be_selected(lines):
    with pytest.raises(InputError, match="where cannot select rows of format vicuna_eval, which joins several rows"):
        read(lines({"question_id": 1, "text": "ask"}), where={"question_id": 1})


def test_a_source_selects_its_rows_before_it_skips(lines):
    source = SourceSettings(path=lines(*ROWS), where={"data_source": ["ARB", "leetcode"]}, skip=1)
    found = [located.record.messages[0].content for located in streamed(source, kind=Prompt, seed=0).records]
    assert found == ["ask 3", "ask 4"]


def test_readers_of_a_files_columns_refuse_it():
    source = SourceSettings(path="a.csv", where={"level": 3})
    graded = TaskSettings(data="sums", task="gsm8k")
    with pytest.raises(InputError, match="data: sums has where, which does not select the rows of task gsm8k"):
        graded.resolve(source)
    assert graded.resolve(source.model_copy(update={"format": "native"})).name == "gsm8k"  # read as records
    assert TaskSettings(data="sums", task="nll").resolve(source).name == "nll"
    inputs = StepInputs(seed=0, policy=PolicySettings(), sources={"texts": source}, folders={}, run=Path())
    with pytest.raises(InputError, match="data: texts has where, which does not select rows of texts"):
        Embedder(data="texts").validate_inputs(inputs)


def test_rows_that_the_project_generates_cannot_be_selected():
    with pytest.raises(InputError, match="has no effect on tasks:code: procedural rows are not read from a file"):
        check_source(SourceSettings(path="tasks:code", limit=3, where={"kind": "x"}))
