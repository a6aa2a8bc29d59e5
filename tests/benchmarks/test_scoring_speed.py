"""The benchmark of scoring runs and both of its sides give the same scores; how fast is not asserted anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from saved_models import SMALL_LLAMA, save_tokenizer

from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_both_ways_score_the_same_tokens_alike(tmp_path):
    settings = PolicySettings(from_config=SMALL_LLAMA, tokenizer=save_tokenizer(tmp_path))
    save_policy(*load_policy(settings), tmp_path / "model")
    rows = [{"prompt": f"say {row}", "chosen": f"yes {row}", "rejected": "x" * (5 + row)} for row in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--prompts", "5"]
    command = [sys.executable, "-m", "tests.benchmarks.scoring", *options, "--response-tokens", "4", "--threads", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["prompts"], found["responses"]) == (5, 4)
    # "yes " and "xxxx" are 4 tokens, of which the last of this turn and its end make one more; a letter is a token.
    prompt = len("user\nsay 0") + 2 + 1 + len("assistant\n")
    assert found["tokens_one_by_one"] == 5 * 4 * (prompt + 4 + 1)
    assert found["tokens_tree"] == 5 * (prompt + 2 * (4 + 1))  # two distinct responses
    assert found["max_score_difference"] <= 1e-5
    assert found["speedup"] > 0
