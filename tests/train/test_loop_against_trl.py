"""Whole steps of the loop against those of TRL's own DPOTrainer: the same rows, the same order, the same optimizer."""

import importlib
import random

import pytest
from datasets import Dataset
from tiny_training import gap, group, llama, loop, metrics, policy, preference, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.data.batching import groups_of_step

pytestmark = [
    pytest.mark.slow,
    # TRL itself uses a name that transformers is about to drop
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

EOS, PAD, NUM_WORDS = 1, 0, 120
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
NUM_ROWS, PER_STEP = 14, 4  # the last step is a small one


def word_tokenizer():
    """A tokenizer to which token 17 is the word `w17`."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{token}": token for token in range(2, NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def text(tokens):
    return " ".join(f"w{token}" for token in tokens)


def rows():
    """(prompt, chosen, rejected) as token lists without the final EOS, of unequal lengths."""
    draw = random.Random(4)
    return [
        tuple([draw.randrange(2, NUM_WORDS) for _ in range(draw.randint(*size))] for size in ((2, 9), (1, 20), (1, 20)))
        for _ in range(NUM_ROWS)
    ]


OURS = {"learning_rate": 3e-3, "betas": (0.9, 0.98), "epsilon": 1e-7, "weight_decay": 0.1, "max_grad_norm": 0.7}
TRL_OPTIONS = {  # of a trainer's configuration, as `OURS`; one step a batch, in the given order
    "precompute_ref_log_probs": True,
    "train_sampling_strategy": "sequential",
    "num_train_epochs": 1,
    "learning_rate": OURS["learning_rate"],
    "lr_scheduler_type": "constant",
    "adam_beta1": OURS["betas"][0],
    "adam_beta2": OURS["betas"][1],
    "adam_epsilon": OURS["epsilon"],
    "weight_decay": OURS["weight_decay"],
    "max_grad_norm": OURS["max_grad_norm"],
    "gradient_checkpointing": False,
    "max_length": None,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def train_with_trl(folder, ordered):
    trl = importlib.import_module("trl")  # takes seconds, so not when tests are only collected
    config = trl.DPOConfig(
        output_dir=str(folder),
        beta=0.2,
        loss_type=["sigmoid"],
        **TRL_OPTIONS,
        per_device_train_batch_size=PER_STEP,
    )
    told = [{"prompt": text(a), "chosen": " " + text(b), "rejected": " " + text(c)} for a, b, c in ordered]
    trainer = trl.DPOTrainer(
        model=llama(**SPECIAL),
        args=config,
        train_dataset=Dataset.from_list(told),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], trainer.model.cpu().state_dict()


def test_the_losses_and_the_trained_weights_are_those_of_trl(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL's trainers report their use over the network, but not from tests
    made = rows()
    groups = [group(prompt, [[*a, EOS], [*b, EOS]], rewards=(1.0, 0.0)) for prompt, a, b in made]
    model = policy(**SPECIAL)
    changes = {"prompts_per_step": PER_STEP, "warmup_steps": 0, "schedule": "constant"} | OURS
    ours = loop(tmp_path, preference("dpo", beta=0.2), groups, model=model, **changes)
    ours.run()
    lines = metrics(tmp_path)
    order = [index for step in range(len(lines)) for index in groups_of_step(step, NUM_ROWS, PER_STEP, seed=0)]
    assert sorted(order) == list(range(NUM_ROWS))
    theirs, trained = train_with_trl(tmp_path / "trl", [made[index] for index in order])
    assert len(lines) == len(theirs) == 4
    for line, their in zip(lines, theirs, strict=True):
        assert line["loss"] == pytest.approx(their["loss"], rel=0, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-4)
        assert line["lr"] == their["learning_rate"]
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert line[name] == pytest.approx(their[name], rel=1e-5, abs=1e-4), name
    assert gap(weights(ours.policy), trained) <= 5e-5
    assert min(line["grad_norm"] for line in lines) > OURS["max_grad_norm"]  # every step was clipped
    assert abs(lines[-1]["rewards/margins"]) > 0.03  # and the policy has moved
