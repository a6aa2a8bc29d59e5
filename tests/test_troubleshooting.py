"""The errors of docs/troubleshooting.md are the ones that the commands print."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from pages import blocks

from align.cli import main
from align.models.policy import save_policy
from align.testing import tiny_policy

RECIPE = """
run: my-model
policy: {path: model}
data:
  pairs: {path: pairs.jsonl}
  prompts: {path: prompts.jsonl}
steps:
  dpo:
    stage: preference
    data: pairs
    loss: {name: dpo}
    train: {learning_rate: 1.0e-3, KEY: 4}
"""
PAIRS = [{"prompt": f"say {row}", "chosen": "yes", "rejected": "no"} for row in range(20)]
ON_POLICY = """  rpo:
    {stage: preference, policy: dpo, on_policy: true, rounds: 3, data: prompts, train: {learning_rate: 1.0e-3},
     generate: {prompts: {prompts: NUMBER}, sampling: {max_new_tokens: 4}, judges: [{name: verifier}]}}
"""
TASK = "  evaluate:\n    {stage: evaluate, policies: all, tasks: {gsm8k: {data: pairs, task: gsm8k}}}\n"
RUN = ("run", "my-recipe.yaml")
SERVER = "engine.server={base_url: 'http://localhost:9/v1', retries: 0}"
PROGRAM = shlex.join([sys.executable, "-S", str(Path(__file__).parent / "inference" / "stub_engine.py")])
CRASHING = f"engine.vllm={{command: {PROGRAM}, env: {{STUB_FAULT: crash}}}}"
GENERATE = ("generate", "--data", "prompts.jsonl", "--policy")
DIVERGES = ("steps.dpo.train.learning_rate=1e30", "steps.dpo.train.max_grad_norm=0", "steps.dpo.train.epochs=5")

# Part of the message -> changes of the recipe, and the command
CASES = {
    "unknown key": ({"KEY": "prompts_per_stp"}, RUN),
    "since version 0.2": ({"KEY": "groups_per_step"}, RUN),
    "no chat template": ({"path: model": "path: base"}, RUN),
    "no format matches": ({"path: pairs.jsonl": "path: odd.jsonl"}, RUN),
    "a response is empty": ({"path: pairs.jsonl": "path: bad.jsonl"}, RUN),
    "no row is left": ({}, (*RUN, "data.pairs.max_length=3")),
    "has held_out 0.1 for training": ({"": TASK}, (*RUN, "data.pairs.held_out=0.1")),
    "takes prompts": ({"": ON_POLICY.replace("NUMBER", "8")}, ("check", "my-recipe.yaml")),
    "can score any": ({"": ON_POLICY.replace("NUMBER", "2")}, (*RUN, "steps.rpo.rounds=1")),
    "norm is nan": ({}, (*RUN, *DIVERGES)),
    "no tracker": ({"KEY: 4": "trackers: [wandb]"}, RUN),
    "no server answers": ({}, (*GENERATE, "my-model", "--out", "groups.jsonl", SERVER)),
    "before it was ready": ({}, (*GENERATE, "model", "--out", "served.jsonl", CRASHING)),
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two models and rows."""
    found = tmp_path_factory.mktemp("troubleshooting")
    policy, tokenizer = tiny_policy()
    save_policy(policy, tokenizer, found / "model")
    tokenizer.chat_template = None
    policy.hf.save_pretrained(found / "base")
    tokenizer.save_pretrained(found / "base")
    write_rows(found / "pairs.jsonl", PAIRS)
    write_rows(found / "prompts.jsonl", [{"prompt": f"say {row}"} for row in range(20)])
    write_rows(found / "odd.jsonl", [{"question_text": "why?", "answer_text": "because"}])
    write_rows(found / "bad.jsonl", [*PAIRS[:1], {"prompt": "say", "chosen": "", "rejected": "no"}])
    return found


def messages():
    return [block.strip() for block in blocks("docs/troubleshooting.md", "text") if block.startswith("align: ")]


@pytest.mark.parametrize("message", messages())
def test_the_message_is_printed(message, folder, monkeypatch, capsys):
    (part,) = [part for part in CASES if part in message]
    changes, command = CASES[part]
    recipe = RECIPE
    for old, new in changes.items():
        recipe = recipe.replace(old, new) if old else recipe + new
    (folder / "my-recipe.yaml").write_text(recipe.replace("KEY", "prompts_per_step").strip() + "\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("align.stages.costs.measured.PRODUCT_SIDE", 64)  # so that measuring the device takes no time
    monkeypatch.setattr(sys, "argv", ["align", *command])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (1, 2)
    (printed,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("align: ")]
    assert re.fullmatch(".*".join(map(re.escape, message.split("…"))), printed), printed


def test_every_case_is_on_the_page():
    assert len(messages()) == len(CASES)
