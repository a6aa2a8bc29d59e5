"""A new user's trial: own files in TRL's and ShareGPT's forms to a trained LoRA policy that other libraries load.

Only commands of the README are used, from a shell, in a folder that holds nothing but the files and a model.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from align.models.policy import save_policy
from align.testing import tiny_policy, tiny_preferences

pytestmark = pytest.mark.slow

NUM_ROWS = 48
LORA = (
    "policy.lora.rank=4",
    "policy.lora.adapters=continued",
    "steps.dpo.train.learning_rate=5e-3",
    "steps.dpo.train.epochs=4",
)
STEPS = ("sft", "dpo", "rpo")


def align(folder, *arguments, given=""):
    """Run a command as a user does, without a terminal."""
    command = [sys.executable, "-m", "align", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, input=given, capture_output=True, text=True, check=False, env=environment
    )


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def question(row, at):
    """The prompt of a row, which no other row has: `align init` holds out a tenth of 20 or more."""
    return f"{at}. {row.prompt[-1].content}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder: a model, pairs for TRL, scored responses, and ShareGPT dialogues."""
    found = tmp_path_factory.mktemp("user")
    save_policy(*tiny_policy(), found / "model")
    pairs, scored = tiny_preferences(NUM_ROWS), tiny_preferences(NUM_ROWS, num_responses=4, seed=1)
    texts = [(question(row, at), [response.content for response in row.responses]) for at, row in enumerate(pairs)]
    best = [row.responses[row.chosen or 0].content for row in pairs]
    write_rows(
        found / "pairs.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": next(each for each in all_ if each != chosen)}],
            }
            for (prompt, all_), chosen in zip(texts, best, strict=True)
        ],
    )
    write_rows(
        found / "scored.jsonl",
        [
            {
                "prompt": question(row, at),
                "responses": [{"content": each.content, "reward": each.reward} for each in row.responses],
            }
            for at, row in enumerate(scored)
        ],
    )
    sharegpt = [
        {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": chosen}]}
        for (prompt, _), chosen in zip(texts, best, strict=True)
    ]
    (found / "chats.json").write_text(json.dumps(sharegpt))
    return found


@pytest.fixture(scope="module")
def finished(folder):
    """The recipe that `align init` writes, after its run with adapters; and what the run printed."""
    written = align(folder, "init", "chats.json", "pairs.jsonl", "scored.jsonl", "--policy", "./model")
    assert written.returncode == 0, written.stderr
    ended = align(folder, "run", "my-recipe.yaml", *LORA)
    assert ended.returncode == 0, ended.stderr
    return folder / "runs/my-model", ended


def test_the_recipe_that_init_writes_has_a_step_for_each_file_and_passes_the_check(folder, finished):
    recipe = yaml.safe_load((folder / "my-recipe.yaml").read_text())
    assert {name: step["data"] for name, step in recipe["steps"].items()} == {
        "sft": "chats",
        "dpo": "pairs",
        "rpo": "scored",
    }
    checked = align(folder, "check", "my-recipe.yaml", *LORA)
    assert checked.returncode == 0, checked.stderr
    headings = [line.split()[0] for line in checked.stdout.splitlines() if not line.startswith(" ")]
    assert headings == [*STEPS, "whole"]  # the prediction for the whole run, which follows from the one that finished


def test_the_first_try_in_the_words_of_trl_is_answered_with_everything_that_has_to_change(folder):
    (folder / "trl.yaml").write_text(
        "run: mine\n"
        "policy: {path: ./model, lora_alpha: 32}\n"
        "data: {pairs: {path: pairs.jsonl, batch_size: 8}}\n"
        "steps:\n"
        "  dpo: {stage: dpo, data: pairs, loss: {name: dpo, beta: 0.1}, train: {learning_rate: 1.0e-6}}\n"
    )
    ended = align(folder, "run", "trl.yaml")
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    named = ["policy.lora.alpha", "train.prompts_per_step", "stage: preference", "steps.dpo.loss.settings.beta"]
    assert len(lines) == len(named)
    assert all(name in line and line.startswith("align: trl.yaml:") for name, line in zip(named, lines, strict=True))


def test_the_log_of_a_run_is_our_own_lines_only(finished):
    _, ended = finished
    lines = ended.stderr.splitlines()
    for step in STEPS:
        assert any(re.match(rf"{step}: train \d+/\d+, loss [\d.]+, .*lr .*tokens/s", line) for line in lines), step
        assert any(re.match(rf"{step}: finished in .*held-out loss", line) for line in lines), step
    foreign = [line for line in lines if re.search(r"Warning|warn|it/s|\d%\|", line)]
    assert foreign == []
    assert "Written to runs/my-model" in ended.stdout


def logp_of(model, tokenizer, prompt, response):
    """Return the log-probability of a response, from the whole dialogue's logits."""
    messages = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(start + response, add_special_tokens=False, return_tensors="pt").input_ids
    num_prompt = len(tokenizer(start, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[num_prompt - 1 :].sum().item()


def accuracy(model, tokenizer, folder):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    right = [
        logp_of(model, tokenizer, row["prompt"][0]["content"], row["chosen"][0]["content"])
        > logp_of(model, tokenizer, row["prompt"][0]["content"], row["rejected"][0]["content"])
        for row in rows
    ]
    return sum(right) / len(right)


def test_peft_and_transformers_load_the_trained_policy_and_it_prefers_what_was_chosen(folder, finished):
    step = finished[0] / "dpo"
    tokenizer = AutoTokenizer.from_pretrained(step)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(step).eval()
    by_transformers = AutoModelForCausalLM.from_pretrained(step).eval()
    assert isinstance(by_peft, PeftModel)
    start = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    one = [logp_of(model, tokenizer, "What is it?", "The cat is red.") for model in (by_peft, by_transformers, start)]
    assert one[0] == pytest.approx(one[1], abs=1e-4)
    assert one[0] != pytest.approx(one[2], abs=1e-2)
    assert accuracy(by_peft, tokenizer, folder) > accuracy(start, tokenizer, folder) + 0.2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # TRL's own
def test_trl_trains_the_policy_further(folder, finished, tmp_path):
    step = finished[0] / "rpo"
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()[:8]]
    settings = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False
    )
    trainer = DPOTrainer(
        model=AutoPeftModelForCausalLM.from_pretrained(step, is_trainable=True),
        args=settings,
        processing_class=AutoTokenizer.from_pretrained(step),
        train_dataset=Dataset.from_list(rows),
    )
    assert 0 < trainer.train().training_loss < 2
    assert trainer.state.global_step == 1


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_lm_evaluation_harness_loads_the_policy(folder, finished):
    from lm_eval.api.instance import Instance  # noqa: PLC0415 - optional
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - optional

    step = finished[0] / "dpo"
    model = HFLM(pretrained=str(folder / "model"), peft=str(step), tokenizer=str(step), device="cpu", batch_size=1)
    request = Instance("loglikelihood", {}, ("the cat", " is red"), 0)
    ((logp, _),) = model.loglikelihood([request], disable_tqdm=True)
    tokenizer, policy = AutoTokenizer.from_pretrained(step), AutoPeftModelForCausalLM.from_pretrained(step).eval()
    ids = tokenizer("the cat is red", return_tensors="pt").input_ids
    num_context = len(tokenizer("the cat").input_ids)
    with torch.no_grad():
        logps = policy(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert logp == pytest.approx(logps[num_context - 1 :].sum().item(), abs=1e-3)


def test_the_policy_answers_in_the_terminal(folder, finished):
    ended = align(
        folder,
        "chat",
        "runs/my-model/rpo",
        "sampling.max_new_tokens=8",
        "sampling.temperature=0",
        given="Hello\nAgain\n",
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) >= 2
    assert "Warning" not in ended.stderr


def test_a_second_run_skips_what_is_finished(folder, finished):
    ended = align(folder, "run", "my-recipe.yaml", *LORA)
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stderr.splitlines() if "skipped" in line] == [
        f"{step}: finished before, skipped" for step in STEPS
    ]
