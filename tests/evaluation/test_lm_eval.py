import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from saved_models import save_reward_and_policy
from test_cli import SMALL, align

from align.commands.evaluate import EvaluateSettings, Request, evaluate
from align.distributed.progress import SilentProgress
from align.errors import InputError
from align.evaluation.statistics import Score
from align.evaluation.tasks import TASKS, lm_eval, pick_task
from align.evaluation.tasks.lm_eval import harness, scores_of, uses_chat_template
from align.stages.responses.tasks import TaskSettings

tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed")

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
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["chat_template"] is True
    scores = result["scores"]
    # The question is always the same, so the model always says the same, and half of the answers are that.
    assert scores["weather/acc"]["value"] == 0.5
    assert scores["weather/acc"]["n"] == 10
    assert scores["weather/acc"]["low"] < 0.5 < scores["weather/acc"]["high"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_an_unknown_harness_task_is_rejected(tmp_path):
    with pytest.raises(InputError, match="no_such_task"):
        harness(str(tmp_path), ["no_such_task"])


@pytest.fixture
def own_tasks_only(monkeypatch):
    """Leave out the thousands of tasks that come with the harness, which takes seconds to read."""
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a tiny policy that has a chat template, one that has none, and a folder of tasks."""
    folder = tmp_path_factory.mktemp("harness")
    save_reward_and_policy(folder)
    shutil.copytree(folder / "policy", folder / "base")
    (folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "base" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": None}))
    rows = [{"question": f"The weather {number}", "answer": number % 2} for number in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "of_mine").mkdir(parents=True)
    (folder / "tasks" / "of_mine" / "weather.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def test_a_chat_policy_is_asked_by_its_template_unless_the_setting_says_otherwise(folder):
    chat, base = str(folder / "policy"), str(folder / "base")
    assert [uses_chat_template(chat, asked) for asked in (None, True, False)] == [True, True, False]
    assert [uses_chat_template(base, asked) for asked in (None, False)] == [False, False]
    with pytest.raises(InputError, match="chat_template: .*base has no chat template; set chat_template: false"):
        uses_chat_template(base, True)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the harness's own
@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize("chat", [True, False])
def test_the_harness_asks_in_the_policys_chat_template(chat, folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - an extra, and slow to import

    asked, loglikelihood = [], HFLM.loglikelihood

    def record(self, requests, **more):
        asked.extend(request.args[0] for request in requests)
        return loglikelihood(self, requests, **more)

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    monkeypatch.chdir(folder)
    scores = harness("policy", ["weather"], folder=Path("tasks"), chat_template=chat)
    assert scores["weather/acc"].n == 3
    turn = "<|im_start|>user\nThe weather 0<|im_end|><|im_start|>assistant\n"
    assert asked[:2] == [turn if chat else "The weather 0"] * 2
    with pytest.raises(InputError, match="gives no metric of weather a standard error"):
        harness("policy", ["weather"], folder=Path("tasks"), chat_template=chat, limit=1)


def test_a_folder_without_the_task_is_named(tmp_path):
    with pytest.raises(InputError, match="tasks_folder: .*missing is not a folder of task files"):
        harness("policy", ["weather"], folder=tmp_path / "missing")


def test_the_limit_of_the_command_and_of_a_step_is_that_of_the_harness(folder, monkeypatch):
    """The command's was ignored: a task of the harness has no source that could have it."""
    limits = []

    def recorded(model, names, *, limit, **more):
        limits.append(limit)
        return {"weather/acc": Score(0.5, 0.0, 1.0, 2)}

    monkeypatch.setattr(lm_eval, "harness", recorded)
    for limit in (2, None):
        request = Request("harness:weather", policy=str(folder / "policy"), limit=limit)
        evaluate(request, None, settings=EvaluateSettings(), progress=SilentProgress())
    assert limits == [2, None]
    with pytest.raises(InputError, match="limit: has no effect on task nll; set the limit of its source"):
        TaskSettings(task="nll", data="rows", limit=2).check_used(TASKS["nll"])


@pytest.mark.filterwarnings("default")  # the harness's own
@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_harness_has_the_precision_of_the_task(precision, folder, monkeypatch):
    import lm_eval.evaluator  # noqa: PLC0415 - an extra, and slow to import

    given = {}

    def stop(**arguments):
        given.update(arguments["model_args"])
        raise OSError("enough")

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", stop)
    request = Request("harness:weather", policy=str(folder / "policy"))
    settings = EvaluateSettings(tasks_folder=str(folder / "tasks"), precision=precision)
    with pytest.raises(InputError, match="enough"):
        evaluate(request, None, settings=settings, progress=SilentProgress())
    assert given["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]


@pytest.mark.parametrize(
    ("settings", "is_used"),
    [
        ({"task": "nll"}, True),
        ({"task": "harness:weather"}, True),
        ({"task": "ifeval"}, True),
        ({"task": "ifeval", "engine": {"server": {"base_url": "http://localhost"}}}, False),
        ({"task": "sts"}, False),
    ],
)
def test_a_precision_that_nothing_uses_is_refused(settings, is_used):
    found = TaskSettings.model_validate({**settings, "precision": "bf16"})
    with nullcontext() if is_used else pytest.raises(InputError, match="precision: has no effect on task"):
        found.check_used(pick_task(settings["task"]))


def test_every_filter_of_a_metric_and_every_group_of_tasks_has_a_score():
    """Of gsm8k's two exact matches the last one was kept without its name, and a group such as mmlu was a KeyError."""
    sums = {"alias": "sums", "sample_len": 40, "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.01}
    sums |= {"exact_match,flexible": 0.5, "exact_match_stderr,flexible": 0.02, "f1,none": 0.5, "f1_stderr,none": "N/A"}
    words = {"alias": "words", "acc,none": 1.0, "acc_stderr,none": 0.0}
    found = {
        "results": {"all": {"acc,none": 0.75, "acc_stderr,none": 0.1}, "text": {"alias": " - text"}, "sums": sums}
        | {"words": words},
        "group_subtasks": {"all": ["sums", "text"], "text": ["words"]},
        "n-samples": {name: {"original": 50, "effective": number} for name, number in (("sums", 40), ("words", 3))},
    }
    assert {name: (score.value, round(score.high, 4), score.n) for name, score in scores_of(found).items()} == {
        "all/acc": (0.75, 0.946, 43),
        "sums/exact_match/strict": (0.25, 0.2696, 40),
        "sums/exact_match/flexible": (0.5, 0.5392, 40),
        "words/acc": (1.0, 1.0, 3),
    }
