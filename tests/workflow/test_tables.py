"""The table of results: shares in %, other values as they are."""

import json

from align.workflow.results import tables


def test_lengths_and_log_probabilities_are_not_shown_in_percent(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_cost_table", lambda made, whole: None)

    def score(value, low, high):
        return {"value": value, "low": low, "high": high, "n": 40}

    scores = {"pass rate": score(0.5, 0.4, 0.6), "length": score(61.5, 60, 63), "chat nll": score(0.7, 0.6, 0.8)}
    (tmp_path / "table.json").write_text(json.dumps({"sft": scores}))
    (tmp_path / "changes.json").write_text(json.dumps({"sft": {"length": score(-2.5, -3, -2)}}))
    (tmp_path / "ledger.json").write_text(json.dumps({"steps": {}, "total": {}}))
    results = list(tables.run_tables({"sft": {"stage": "sft"}}, tmp_path))[-1]
    cells = [next(iter(column.cells)) for column in results.columns]
    assert cells == [
        "sft",
        "50.0 [40.0, 60.0]",
        "61.500 [60.000, 63.000]\n-2.500 [-3.000, -2.000]",
        "0.700 [0.600, 0.800]",
    ]
