"""What a call of `align generate` is resumed with."""

from align.commands import generate as command
from align.distributed.progress import SilentProgress


def test_verdicts_of_other_columns_are_not_taken_over(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"q": "1 + 1?", "a": "2", "b": "3"}\n')
    found = []

    def noted(*step, identity, **more):
        found.append(identity)
        return {"report": {}, "tokens_per_s": {}}

    monkeypatch.setattr(command, "run_one_step", noted)
    for columns in ({}, {"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": "b"}):
        settings = command.GenerateSettings(rows=command.RowOptions(columns=columns))
        data, out = str(tmp_path / "rows.jsonl"), tmp_path / "groups.jsonl"
        command.generate(["served"], data, out, settings=settings, progress=SilentProgress())
    plain, one, other = found
    assert plain.keys() == {"policies", "data"}
    assert one != other and one["policies"] == other["policies"] == plain["policies"]
