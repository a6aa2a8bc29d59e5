"""What a check holds to be known before anything runs is what comes out when it runs."""

import json

import numpy as np
import pytest
import torch
from small_runs import SMALL_POLICY, written
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import align
from align.data.token_groups import TokenGroup, TokenSequence
from align.distributed.processes import Processes
from align.errors import InputError
from align.evaluation.likelihood_task import LikelihoodTask
from align.evaluation.sampled_task import SampledTask
from align.evaluation.task import Answer
from align.evaluation.tasks import IN_RECIPES, TASKS
from align.evaluation.tasks.pair_accuracy import RewardTask
from align.models.policy import Policy
from align.models.reward_model import RewardModel
from align.models.settings import PolicySettings, Rating
from align.procedural import tasks
from align.stages.evaluate import Evaluate
from align.stages.inputs.sources import SourceSettings
from align.stages.responses.tasks import TaskSettings
from align.workflow.estimate import ModelPlans, check_templates
from align.workflow.recipe.load import load_recipe
from align.workflow.recipe.schema import Recipe
from align.workflow.recipe.validation import check_columns

ROWS = {
    "ifeval": {"key": 1, "prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "gsm8k": {"question": "a", "answer": "#### 4"},
    "svamp": {"Body": "a", "Question": "b", "Answer": 4},
    "math": {"problem": "a", "answer": "4"},
    "humaneval": {"task_id": "a", "prompt": "def f():\n", "test": "def check(f):\n    pass\n", "entry_point": "f"},
    "mbpp": {"task_id": 1, "text": "a", "test_list": ["assert True"]},
    "mbpp_plus": {"task_id": 1, "text": "a", "test_list": ["assert True"], "test": "assert True"},
    **{
        kind: {"prompt": "a", **tasks.prompts(kind, num_rows=1, seed=0, split="test")[0].metadata}
        for kind in tasks.KINDS
    },
}


# Tasks with metrics that need a judge, a reference or log-probabilities beside answers, with tests of their own
OTHERS = {"mt_bench", "fidelity", "drift", "alignment", "uniformity", "sts", "topic_following", "mmlu"}
SAMPLED = [name for name, task in TASKS.items() if isinstance(task, SampledTask) and name not in OTHERS]


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampled_task_reports_the_metrics_it_declares(name):
    task, answers = TASKS[name], [Answer(0, "any answer")]
    grades = list(task.grade_answers([ROWS[name]], answers))
    assert set(task.scores(answers, grades)) == set(task.metrics)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, LikelihoodTask)])
def test_a_likelihood_task_reports_the_metrics_it_declares(name):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    torch.manual_seed(0)
    ids = [np.array([1, 2, last], np.int32) for last in (3, 4)]
    trained = np.array([False, False, True])
    group = TokenGroup(tuple(TokenSequence(each, trained) for each in ids), (1.0, 0.0), None, ({}, {}), 0)
    task, model = TASKS[name], Policy(LlamaForCausalLM(config))
    if isinstance(task, RewardTask):
        config.num_labels = 1
        model = RewardModel(LlamaForSequenceClassification(config), Rating(("reward",), (1.0,)))
    found = task.scores(list(task.measure(model, [group], precision="fp32", processes=Processes())))
    assert set(found) == {*task.metrics, *task.measures}


def test_every_task_that_a_recipe_may_use_is_tried_above():
    tried = {*SAMPLED, *(name for name, task in TASKS.items() if isinstance(task, LikelihoodTask))}
    assert tried | OTHERS == set(IN_RECIPES) == {name for name, task in TASKS.items() if "policy" in task.options}


SOURCES = {
    "sums": SourceSettings(path="sums.jsonl"),
    "same": SourceSettings(path="sums.jsonl"),
    "others": SourceSettings(path="others.jsonl"),
}


def checked(**steps):
    policy = PolicySettings(path="somebody/model")
    check_columns(Recipe(run="r", policy=policy, data=SOURCES, steps=steps, written={name: (name,) for name in steps}))


def evaluation(**asked):
    return Evaluate(stage="evaluate", policies=["sft"], tasks={name: TaskSettings(**of) for name, of in asked.items()})


GSM8K = {"data": "sums", "task": "gsm8k"}
ONE_COLUMN = {
    "other rows": (evaluation(maths=GSM8K), evaluation(maths=GSM8K | {"data": "others"})),
    "other settings": (evaluation(maths=GSM8K), evaluation(maths=GSM8K | {"max_new_tokens": 7})),
    "another task whose rate makes the name": (
        evaluation(text={"data": "sums", "task": "ifeval"}, **{"text prompt_strict": GSM8K}),
        evaluation(maths=GSM8K),
    ),
}


@pytest.mark.parametrize("case", ONE_COLUMN)
def test_two_evaluations_in_one_column_are_refused(case):
    one, other = ONE_COLUMN[case]
    with pytest.raises(InputError, match=r"^steps\.\w+\.tasks\.[\w ]+: results column '.*' is also used by steps\."):
        checked(one=one, other=other)


def test_the_same_evaluation_of_others_shares_its_column():
    checked(one=evaluation(maths=GSM8K), other=evaluation(maths=GSM8K | {"data": "same"}))
    strict = {"data": "sums", "task": "ifeval", "metrics": ["prompt_strict"]}
    checked(one=evaluation(**{"text": strict, "text prompt_strict": GSM8K}))


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LATER = {
    "an sft step": "later: {{stage: sft, data: others, train: {{learning_rate: 1.0e-3}}}}",
    "sampling": "later: {{stage: generate, data: others, judges: []}}",
}


@pytest.mark.parametrize("later", LATER)
def test_a_chat_template_that_fails_on_rows_of_a_later_step_is_reported_before_the_first(tmp_path, later):
    (tmp_path / "strict.jinja").write_text(NO_SYSTEM)
    chats = [[{"role": "user", "content": "ask"}, {"role": "assistant", "content": f"say {row}"}] for row in range(30)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    chats[20].insert(0, {"role": "system", "content": "be brief"})
    (tmp_path / "others.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    text = SMALL_POLICY.replace("chatml", f"{tmp_path}/strict.jinja") + (
        "data:\n"
        f"  shown: {{{{path: {tmp_path}/plain.jsonl}}}}\n"
        f"  others: {{{{path: {tmp_path}/others.jsonl}}}}\n"
        "steps:\n"
        "  base: {{stage: import, vocab_size: 300}}\n"
        "  first: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-3}}}}\n"
        f"  {LATER[later]}\n"
    )
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=r"small\.yaml:\d+: data\.others\.path: .*others\.jsonl: row 21: .*no system"):
        align.run(path)
    assert not (tmp_path / "runs").exists()
    check_templates(ModelPlans(load_recipe(path, ["data.others.on_error=skip"])))
    check_templates(ModelPlans(load_recipe(path)), until="first")
