"""Every recipe of the project: it loads, and with a tiny model and rows of its form `align check` has an answer."""

import json
import re
from pathlib import Path

import pytest
from test_cli import align

from align.data.tokenizer import train_tokenizer
from align.procedural.tasks import corpus
from align.workflow.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))
FRESH = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"

NUMBER = 60  # rows of each file
RATED = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 3)


def pair(row):
    return {"prompt": f"say {row}", "chosen": "yes", "rejected": "no", "score_chosen": 8.0, "score_rejected": 4.0}


def completions(row):
    said = [{"response": f"{word} {row}", "overall_score": float(score)} for score, word in enumerate("abcd", start=2)]
    return {"instruction": f"say {row}", "completions": said}


def chat(row):
    return [{"role": "user", "content": f"say {row}"}, {"role": "assistant", "content": "yes"}]


# The form of each hub set's rows, as their cards give it.
FORMS = {
    "HuggingFaceH4/ultrafeedback_binarized": pair,
    "openbmb/UltraFeedback": completions,
    "allenai/reward-bench": pair,
    "nvidia/HelpSteer2": lambda row: {"prompt": f"say {row}", "response": "yes", **RATED},
    "allenai/tulu-3-sft-mixture": lambda row: {
        "messages": [{"role": "user", "content": f"say {row}"}, {"role": "assistant", "content": "yes"}]
    },
    "sahil2801/CodeAlpaca-20k": lambda row: {"instruction": f"write {row}", "input": "", "output": "print(1)"},
    "openai/gsm8k:main": lambda row: {"question": f"what is {row}?", "answer": f"it is #### {row}"},
    "google-research-datasets/mbpp:full": lambda row: {
        "task_id": row, "text": f"return {row}", "code": f"def f():\n    return {row}",
        "test_list": [f"assert f() == {row}"], "test_setup_code": "", "challenge_test_list": [],
    },
    "openai/openai_humaneval": lambda row: {
        "task_id": f"HumanEval/{row}", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f",
    },
    "google/IFEval": lambda row: {
        "key": row, "prompt": f"say {row} without commas",
        "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}],
    },
}  # fmt: skip
FORMS |= {
    "google-research-datasets/mbpp": FORMS["google-research-datasets/mbpp:full"],
    "m-a-p/Code-Feedback": FORMS["allenai/tulu-3-sft-mixture"],
    "tatsu-lab/alpaca": FORMS["sahil2801/CodeAlpaca-20k"],
    "tatsu-lab/alpaca_eval": FORMS["sahil2801/CodeAlpaca-20k"],
    "HuggingFaceH4/self-instruct-seed": FORMS["sahil2801/CodeAlpaca-20k"],
    "allenai/c4:realnewslike": lambda row: {"text": f"It is {row} o'clock.", "timestamp": "", "url": f"a/{row}"},
    "wikimedia/wikipedia:20231101.en": lambda row: {"id": row, "url": "a", "title": f"Entity {row}", "text": "It is."},
    "lmsys/lmsys-chat-1m": lambda row: {
        "conversation_id": row, "model": "a", "conversation": chat(row), "turn": 1, "language": "English",
        "openai_moderation": [{"flagged": False}] * 2, "redacted": False,
    },
    "Aeala/ShareGPT_Vicuna_unfiltered": lambda row: {
        "id": row, "conversations": [{"from": "human", "value": f"say {row}"}, {"from": "gpt", "value": "yes"}]
    },
    "DigitalLearningGmbH/MATH-lighteval": lambda row: {
        "problem": f"what is {row}?", "solution": f"it is \\boxed{{{row}}}", "level": "Level 1", "type": "Algebra"
    },
    "dreamerdeo/finqa": lambda row: {
        "id": row, "pre_text": ["Sales."], "post_text": ["All."], "table": [["year", "sales"], ["2020", "1"]],
        "question": f"what is {row}?", "answer": "1", "final_result": "1.0", "program_re": "", "gold_inds": [],
    },
    "stanfordnlp/wikitablequestions": lambda row: {
        "id": row, "question": f"what is {row}?", "answers": ["1"],
        "table": {"header": ["year"], "rows": [["1"]], "name": "a"},
    },
    "garage-bAInd/Open-Platypus": lambda row: {
        "instruction": f"say {row}", "input": "", "output": "yes",
        "data_source": ("MATH/PRM-800K", "scibench", "ARB", "airoboros")[row % 4],
    },
    "glaiveai/glaive-function-calling-v2": lambda row: {
        "system": "SYSTEM: You are helpful.", "chat": f"USER: say {row}\n\n\nASSISTANT: yes <|endoftext|>"
    },
    "nvidia/CantTalkAboutThis-Topic-Control-Dataset": lambda row: {
        "domain": "a", "scenario": "b", "system_instruction": "Talk of trains.", "conversation": chat(row),
        "distractors": [{"bot turn": "yes", "distractor": "And ships?"}], "conversation_with_distractors": [],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(), vocab_size=512, chat_template="").save_pretrained(str(folder))
    return folder


def without_other_runs(recipe):
    """Return the overrides by which steps import the recipe's policy in place of one that another recipe makes."""
    imported = [name for name, step in recipe.steps.items() if step.stage == "import" and step.path]
    return [f"steps.{name}.path=null" for name in imported if recipe.steps[name].path.startswith("runs/")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_can_be_checked_with_rows_of_its_form(name, tokenizer, tmp_path):
    recipe = load_recipe(ROOT / name)
    overrides = without_other_runs(recipe)
    for source, settings in recipe.data.items():
        if settings.path.startswith("tasks:"):
            overrides += [f"data.{source}.limit=80"] if settings.limit is not None else []
            continue
        if settings.made_by is not None:
            continue
        assert settings.path in FORMS, f"{name}: the form of {settings.path} is not known here"
        rows = tmp_path / f"{source}.jsonl"
        rows.write_text("".join(json.dumps(FORMS[settings.path](row)) + "\n" for row in range(NUMBER)))
        overrides += [f"data.{source}.path={rows}", f"data.{source}.split=null", f"data.{source}.skip=0"]
    if recipe.policy.path is not None:
        overrides += ["policy.path=null", f"policy.from_config={FRESH}", f"policy.tokenizer={tokenizer}"]
        overrides += ["policy.chat_template=chatml", "policy.gradient_checkpointing=false"]
    for step_name, step in recipe.steps.items():
        if getattr(step, "engine", None) is not None and step.engine.managed is not None:
            overrides += [f"steps.{step_name}.engine.vllm=null"]
            overrides += [f"steps.{step_name}.engine.server.base_url=http://localhost:8000/v1"] if step.models else []
        for source in getattr(step, "prompts", None) or {}:
            origin = next(each for each in recipe.steps if recipe.steps[each] is step)
            place = ".".join(map(str, recipe.location(origin, ("prompts", source))))
            overrides.append(f"{place}=4")
    ended = align("check", name, *dict.fromkeys(overrides))
    assert ended.returncode == 0, ended.stderr
    for step in recipe.steps:
        assert f"{step}  {recipe.steps[step].stage}" in ended.stdout
        for family in getattr(recipe.steps[step], "families", ()):
            assert re.search(rf"^  {family} +at most .* items, .* requests, .* tokens", ended.stdout, re.MULTILINE)


def test_there_are_recipes():
    assert len(RECIPES) >= 10
