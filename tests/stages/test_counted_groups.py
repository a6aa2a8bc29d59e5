"""What the stages that make groups say of rows that did not become prompts."""

import json

from small_runs import RECIPE, run

from align.records import Message, Prompt
from align.synth.constraints import split_of

DROPPING = (
    RECIPE.partition("  sft: {{stage")[0].replace(
        "  pairs:",
        "  asked: {{path: {runs}/asked.jsonl, on_error: skip, constraints: {{split: train}}}}\n"
        "  given: {{path: {runs}/given.jsonl, on_error: skip}}\n"
        "  pairs:",
    )
    + """
  samples:
    stage: generate
    data: [asked, pairs]
    prompts: {{pairs: 2, asked: 3}}
    sampling: {{num_responses: 2, max_new_tokens: 2}}
    engine: {{local: {{precision: fp32}}}}
    judges: [{{name: "small_runs:longer"}}]
  rescored: {{stage: score, data: given, judges: [{{name: "small_runs:longer"}}]}}
"""
)


def test_rows_that_are_dropped_and_prompts_of_another_split_are_counted(tmp_path):
    (tmp_path / "runs").mkdir()
    asked = [{"prompt": f"Tell me about {what}."} for what in ("cats", "dogs", "rain", "snow", "tea", "figs", "oak")]
    left = [row for row in asked if split_of(Prompt((Message("user", row["prompt"]),))) == "train"]
    assert 3 <= len(left) < len(asked)  # some of both, so that the test can fail
    given = [{"prompt": "Say it.", "responses": [{"content": "a"}, {"content": text}]} for text in ("bb", "", "ccc")]
    for name, rows in (("asked", [*asked, {"prompt": ""}, {"prompt": 7}]), ("given", given)):
        (tmp_path / "runs" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, told = run(tmp_path, text=DROPPING)
    counts = made["samples"]["report"]["counts"]
    assert counts["prompts:not in constraints.split"] == len(asked) - len(left)
    assert sum(number for name, number in counts.items() if name.startswith("rows:dropped ")) == 2
    assert counts["prompts"] + counts.get("prompts:duplicate", 0) == 3 + 2
    counts = made["rescored"]["report"]["counts"]
    assert sum(number for name, number in counts.items() if name.startswith("rows:dropped ")) == 1
    assert counts["prompts"] + counts["prompts:duplicate"] == 2
    assert len([note for note in told.notes if "rows dropped" in note]) == 2
