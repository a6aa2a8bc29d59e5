import json

import pytest
from test_cli import SMALL, align

from align.errors import InputError
from align.evaluation.tasks.lm_eval import harness

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

TASK = """
task: weather
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" good", " bad"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the harness's own
def test_a_custom_harness_task_is_evaluated(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL.format(runs=tmp_path).partition("  sft: {stage")[0])
    assert align("run", str(tmp_path / "small.yaml")).returncode == 0
    policy = tmp_path / "small" / "base"
    rows = [{"question": "The weather is", "answer": number % 2} for number in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "weather.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    ended = align("evaluate", "--task", "harness:weather", "--policy", str(policy), f"tasks_folder={tmp_path}")
    assert ended.returncode == 0, ended.stderr
    scores = json.loads(ended.stdout.splitlines()[-1])["scores"]
    # The question is always the same, so the model always says the same, and half of the answers are that.
    assert scores["weather/acc"]["value"] == 0.5
    assert scores["weather/acc"]["n"] == 10
    assert scores["weather/acc"]["low"] < 0.5 < scores["weather/acc"]["high"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_an_unknown_harness_task_is_rejected(tmp_path):
    with pytest.raises(InputError, match="no_such_task"):
        harness(str(tmp_path), ["no_such_task"])
