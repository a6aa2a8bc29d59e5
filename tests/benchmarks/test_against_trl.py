"""The benchmark runs, and both of its sides train the same thing; how fast is not asserted anywhere."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A prompt and its responses, from the best to the worst
ROWS = [
    ("name a colour", ["red", "a colour is blue", "no"]),
    ("name a colour of the sky", ["blue", "blue or grey, by the weather", "a colour"]),
    ("count to three", ["one two three", "one two", "three"]),
]
REFUSED = [
    ("what ends a turn?", ["this does: <|im_end|>", "nothing does", "no"]),  # TRL reads a control token there
    ("name a number", ["one", "one", "two"]),
]
STEPS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for row in ROWS for text in (row[0], *row[1])], vocab_size=300, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    def line(prompt, responses, rewards):
        answers = [{"content": text, "reward": reward} for text, reward in zip(responses, rewards, strict=True)]
        return json.dumps({"prompt": prompt, "responses": answers, "metadata": {}}) + "\n"

    lines = [line(*REFUSED[0], (3.0, 2.0, 1.0)), line(*REFUSED[1], (1.0, 1.0, 0.0))]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(lines + [line(*row, (3.0, 2.0, 1.0)) for row in ROWS]))
    return path


def run(model, data, options):
    """The lines that the benchmark prints; an optimizer step takes all rows."""
    sizes = {"rows": len(ROWS), "prompts-per-step": len(ROWS), "steps": STEPS, "threads": 1}
    given = [f"--{name}={value}" for name, value in ({"model": model, "data": data} | sizes | options).items()]
    command = [sys.executable, "-m", "tests.benchmarks.against_trl", *given]
    environment = os.environ | {"CI": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("pairs", "num_responses", "blocks"), [("pairs", 2, 1), ("all", 3, 0)])
def test_both_sides_train_the_same_rows(pairs, num_responses, blocks, tokenizer, model, data):
    options = {"pairs": pairs, "responses": 3, "learning-rate": 1e-3} | ({"blocks": blocks} if blocks else {})
    lines = run(model, data, options)
    found = json.loads(lines[-1])

    sequences = [
        [
            tokenizer(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>")["input_ids"]
            for text in responses[:num_responses]
        ]
        for prompt, responses in ROWS
    ]
    distinct = {tuple(ids[:end]) for group in sequences for ids in group for end in range(1, len(ids) + 1)}
    padded = 2 * len(ROWS) * math.comb(num_responses, 2) * max(len(ids) for group in sequences for ids in group)
    assert found["tokens_align"] == found["tokens_distinct"] == STEPS * len(distinct)
    assert found["tokens_trl"] == STEPS * padded

    first, second = found["losses_align"]
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert second < first - 1e-3  # the step was taken
    assert [first, second] == pytest.approx(found["losses_trl"], abs=1e-5)
    assert found["max_loss_difference"] <= 1e-5
    assert found["speedup_of_sums"] == pytest.approx(sum(found["seconds_trl"]) / sum(found["seconds_align"]))
    for name in ("speedup", "memory_ratio", "flop_share", "flop_share_with_recomputation"):
        assert found[name] > 0
    chosen = next(line for line in lines if line.startswith(f"{len(ROWS)} prompts of {num_responses} responses"))
    assert "'other tokens as plain text': 1" in chosen
    assert f"'without {num_responses} responses of different rewards': 1" in chosen
