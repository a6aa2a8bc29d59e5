"""Runs of several seeds as one table, on runs whose numbers are known."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # as `python -m tests.benchmarks.seeds` finds it

from tests.benchmarks.seeds import differences, pooled  # noqa: E402 - after the line above


def run_of(folder, passed):
    """A run that has evaluated two policies on one task: {policy: verdicts}."""
    folder.mkdir()
    for policy, verdicts in passed.items():
        step = folder / f"evaluate-{policy}"
        step.mkdir()
        lines = [json.dumps({"parts": {"correct": [verdict, 1]}}) for verdict in verdicts]
        (step / "words.jsonl").write_text("\n".join(lines))
        told = {"columns": {"words": ["words", "correct"]}, "scores": {policy: {}}}
        (step / "manifest.json").write_text(json.dumps(told))
    (folder / "changes.json").write_text(json.dumps({"dpo": {"words": {"from": "sft"}}}))
    return folder


def test_prompts_of_all_seeds_count_alike_and_seeds_alone_tell_more_widely(tmp_path):
    first = run_of(tmp_path / "a", {"sft": [0] * 40 + [1] * 60, "dpo": [1] * 100})
    second = run_of(tmp_path / "b", {"sft": [0] * 60 + [1] * 40, "dpo": [0] * 20 + [1] * 80})
    table = pooled([first, second])
    sft, dpo = table["sft"]["words"], table["dpo"]["words"]
    assert (sft["value"], sft["n"], sft["seeds"]) == (0.5, 200, [0.6, 0.4])
    assert sft["low"] == pytest.approx(0.5 - 1.96 * (0.25 / 200) ** 0.5, abs=0.02)  # normal approximation
    assert sft["half_width"] == pytest.approx(12.706 * 0.1, abs=1e-3)  # of two values 0.1 from their mean
    assert (dpo["value"], dpo["change"], dpo["from"]) == (0.9, pytest.approx(0.4), "sft")
    assert dpo["change_low"] < 0.4 < dpo["change_high"]


def test_the_difference_of_two_policies_is_paired_and_of_each_run(tmp_path):
    first = run_of(tmp_path / "a", {"one": [0, 1] * 50, "other": [0, 1] * 50})
    second = run_of(tmp_path / "b", {"one": [1] * 100, "other": [0] * 50 + [1] * 50})
    (same, better, together) = differences([first, second], "one", "other")["words"]
    assert same == (0.0, 0.0, 0.0), "answers that agree on every prompt have no spread"
    assert better[0] == 0.5 and better[1:] == pytest.approx((0.4, 0.6), abs=0.02)  # 1.96 * sqrt(0.25 / 100)
    assert together[0] == 0.25 and together[1:] == pytest.approx((0.19, 0.31), abs=0.01)  # 1.96 * sqrt(0.1875 / 200)


def test_a_row_that_one_policy_has_not_answered_is_left_out_of_the_difference(tmp_path):
    run = run_of(tmp_path / "a", {"one": [1, 0, 1, 1], "other": [0, 0, 1, 1]})
    file = run / "evaluate-other" / "words.jsonl"
    lines = [{"row": row, **json.loads(line)} for row, line in enumerate(file.read_text().splitlines())]
    file.write_text("\n".join(json.dumps(line) for line in lines[1:]))
    assert differences([run], "one", "other")["words"][-1] == (0.0, 0.0, 0.0)
