"""What `align check` says of test items among the training rows."""

import subprocess
import sys

import pytest

from align.data.writing import write
from align.records import Demonstration, Message
from align.workflow.recipe.load import load_recipe
from align.workflow.recipe.overlap import MAX_ROWS, overlap_warnings

RECIPE = """
run: small
policy: {{path: nowhere/model}}
data:
  rows: {{path: "{folder}/rows.jsonl"}}
  test: {{path: "{folder}/test.jsonl"}}
steps:
  base: {{stage: import}}
  sft: {{stage: sft, data: {data}, train: {{learning_rate: 1.0e-3}}}}
  scores: {{stage: evaluate, policies: [sft], tasks: {{nll: {{data: {test}, task: nll}}}}}}
"""
TEST = "Which of the planets is the largest of them all?"


def shown(prompt, answer="Certainly."):
    return Demonstration((Message("user", prompt), Message("assistant", answer)))


@pytest.fixture
def folder(tmp_path):
    rows = [shown(f"Row {number} of the file") for number in range(MAX_ROWS + 1)]
    rows[:3] = [shown(TEST.upper()), shown(f"Say, please: {TEST}"), shown(TEST.replace("largest", "smallest"))]
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "test.jsonl", [shown(TEST, "Jupiter, by far.")])
    return tmp_path


def recipe(folder, data="rows", test="test", more=""):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, data=data, test=test) + more)
    return path


def test_planted_items_are_counted_by_how_they_were_found(folder):
    assert list(overlap_warnings(load_recipe(recipe(folder)))) == [
        f"rows: 2 of the first {MAX_ROWS:,} rows contain test items of test (1 by an equal prompt, 1 by n-grams); "
        "a step with stage: curate removes such rows"
    ]


def test_curated_rows_held_out_rows_and_clean_rows_give_no_warning(folder):
    more = "  clean: {stage: curate, data: rows}\n"
    assert list(overlap_warnings(load_recipe(recipe(folder, data="clean", more=more)))) == []
    write(folder / "test.jsonl", [shown("Who was the first person on the far side of the moon?")])
    assert list(overlap_warnings(load_recipe(recipe(folder)))) == []


def test_a_test_set_that_cannot_be_read_as_records_is_named(folder):
    (folder / "test.jsonl").write_text('{"test_list": ["assert f(1) == 2"], "task_id": 1}\n')
    path = recipe(folder, more="")
    path.write_text(path.read_text().replace("task: nll", "task: mbpp"))
    (line,) = overlap_warnings(load_recipe(path))
    assert line.startswith("test: was not compared with the training rows:")


def test_the_comparison_imports_no_torch(folder):
    code = (
        "import sys; from pathlib import Path; from align.workflow.recipe.load import load_recipe; "
        "from align.workflow.recipe.overlap import overlap_warnings; "
        "print(len(list(overlap_warnings(load_recipe(Path(sys.argv[1])))))); "
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(recipe(folder))], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr
