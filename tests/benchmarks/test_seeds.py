"""Runs of several seeds as one table, on runs whose numbers are known."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # as `python -m tests.benchmarks.seeds` finds it

from tests.benchmarks.seeds import pooled  # noqa: E402 - after the line above


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
