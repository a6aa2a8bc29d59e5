"""The examples of CONTRIBUTING.md: each is found by its dotted path and does what the text says."""

import importlib
import json
import re
import sys

import pytest
import torch
import yaml
from pages import ROOT, blocks, text
from scripted_teacher import ScriptedTeacher
from synthetic_runs import make
from transformers import AutoModelForCausalLM

import align
from align.data.reading import read
from align.evaluation.sampled_task import Graded
from align.evaluation.tasks import pick_task
from align.inference.engines import load_engine
from align.inference.samples import prompt_key
from align.inference.settings import EngineSettings, SamplingSettings
from align.losses.table import preference_loss
from align.models.policy import save_policy
from align.records import Demonstration, Message, Prompt
from align.rewards.settings import JudgeSettings
from align.testing import check_loss, tiny_policy

PROGRAMS = {re.match(r"# (\w+)\.py", block)[1]: block for block in blocks("CONTRIBUTING.md", "python")}
PROMPT = Prompt((Message("user", "say something"),))


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Every example as a module on the Python path."""
    for name, program in PROGRAMS.items():
        (tmp_path / f"{name}.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in PROGRAMS:
        sys.modules.pop(name, None)


def test_every_kind_of_variant_has_an_example_and_a_table():
    row = r"^\| \[\w+\]\(#an?-\w+\) \| .*?(my_\w+):.* \| `(\w+)` in `align/([\w/.]+)`"
    rows = re.findall(row, text("CONTRIBUTING.md"), re.MULTILINE)
    assert {module for module, _, _ in rows} == set(PROGRAMS)
    for _, table, place in rows:
        path = ROOT / "align" / place
        assert path.exists()
        module = importlib.import_module(f"align.{place.removesuffix('.py').strip('/').replace('/', '.')}")
        assert len(getattr(module, table)) >= 2


def test_the_loss_is_the_squared_error_of_the_implicit_reward():
    policy_BK, reference_BK, rewards_BK = torch.tensor([[[-3.0, -5.0]], [[-4.0, -4.0]], [[1.0, -0.5]]]).double()
    lengths_BK, mask_BK = torch.ones(1, 2).double(), torch.ones(1, 2).bool()
    loss = preference_loss("my_losses:squared", beta=0.5)
    found_B = loss(policy_BK, reference_BK, rewards_BK, lengths_BK, mask_BK)
    assert found_B.tolist() == pytest.approx([((0.5 - 1.0) ** 2 + (-0.5 + 0.5) ** 2) / 2])
    assert [result for result in check_loss(loss) if result.status == "failed"] == []


def test_the_judge_prefers_short_responses():
    judge = JudgeSettings(name="my_judges:make", settings={"max_words": 2}).make()
    (verdicts,) = judge([(PROMPT, ["one two", "one two three"])])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0]


def test_the_verifier_checks_the_instruction_of_the_row():
    shown = json.loads(re.search(r'`(\{"prompt".*?\]\})`', text("CONTRIBUTING.md"))[1])
    (instruction,) = shown["instructions"]
    judge = JudgeSettings(name="verifier", settings={"verifiers": {instruction["id"]: "my_verifiers:at_most"}}).make()
    (verdicts,) = judge([(Prompt(PROMPT.messages, {"instructions": [instruction]}), ["1 2 3", "1234"])])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0]


def test_the_task_asks_the_question_and_grades_the_responses():
    task, row = pick_task("my_tasks:TASK"), {"question": "what is 6 * 7?", "answer": 42}
    assert task.question(row) == "what is 6 * 7?"
    grades = task.grade([Graded(row, "it is 42"), Graded(row, "it is 41")])
    assert [grade.reward for grade in grades] == [1.0, 0.0]


def test_the_reader_yields_demonstrations(tmp_path):
    path = tmp_path / "faq.jsonl"
    path.write_text(json.dumps({"question": "why?", "reply": "because"}) + "\n")
    (record,) = read(str(path), format="my_readers:READER").records
    assert record == Demonstration((Message("user", "why?"), Message("assistant", "because")))


def test_the_engine_answers_what_is_not_finished():
    settings = EngineSettings.model_validate({"custom": {"name": "my_engines:Echo", "settings": {"prefix": "so: "}}})
    engine = load_engine("policy", settings)
    samples = engine.sample(
        [PROMPT, PROMPT], SamplingSettings(num_responses=2), finished={(prompt_key(PROMPT), 0): None}
    )
    assert [(sample.number, sample.text) for sample in samples] == [(1, "so: say something")]


def test_the_stage_averages_the_weights_of_two_steps(tmp_path):
    steps = {
        "one": {"stage": "import"},
        "two": {"stage": "sft", "data": "rows", "train": {"learning_rate": 1e-3, "max_steps": 1}},
        "average": {"stage": "my_stages:Average", "policies": ["one", "two"]},
    }
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, tmp_path / "tiny")
    recipe = {"run": "run", "runs": str(tmp_path), "policy": {"path": str(tmp_path / "tiny")}}
    data = {"rows": {"path": "tasks:general", "limit": 8}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"data": data, "steps": steps}, sort_keys=False))
    align.run(tmp_path / "recipe.yaml")
    one, two, average = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in steps)
    for name, weight in average.named_parameters():
        expected = (one.get_parameter(name) + two.get_parameter(name)) / 2
        torch.testing.assert_close(weight, expected)


def test_a_family_of_the_example_makes_prompts_about_each_topic(tmp_path):
    families = {
        "topics": {"family": "topics", "number": 2, "also": ["Bridges"]},
        "riddles": {"family": "my_families:Riddles", "of": "topics", "number": 3},
    }
    teacher = ScriptedTeacher()
    report = make(tmp_path, teacher, families)
    assert report["entries"]["riddles"] == {"asked": 9, "kept": 9}
    assert "Write 3 riddles whose answer has to do with Bridges." in teacher.asked[1]["messages"][0]["content"]
