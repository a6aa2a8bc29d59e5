"""`RPOTrainer` against `align`'s own objective and loop on the same batches, and what it rejects."""

import doctest
import math
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_training import gap, group, llama, loop, metrics, policy, preference, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from align.data.batching import groups_of_step
from align.errors import InputError, RunError
from align.integrations import trl_checks
from align.integrations.trl import RPOTrainer
from align.losses.table import LOSSES, CustomLoss, preference_loss
from align.losses.unpaired import UnpairedLoss
from align.models.policy import response_logps
from align.models.tree.batch import tree_batch
from align.train.objectives.batch import group_batch

pytestmark = [
    pytest.mark.slow,
    # TRL uses a deprecated name of transformers
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

PAD, EOS, NUM_WORDS = 0, 1, 120
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
COLUMNS = ("chosen_reward", "rejected_reward")
NUM_ROWS, PER_STEP = 14, 4


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends telemetry otherwise


def word_tokenizer():
    """Return a tokenizer whose token 17 is the word `w17`."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{token}": token for token in range(2, NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def token_rows():
    """(prompt, chosen, rejected, rewards) with token lists of unequal lengths; some rewards prefer the rejected one."""
    draw = random.Random(4)
    rows = []
    for _ in range(NUM_ROWS):
        tokens = [
            [draw.randrange(2, NUM_WORDS) for _ in range(draw.randint(*size))] for size in ((2, 9), (1, 20), (1, 20))
        ]
        rows.append((*tokens, (draw.gauss(1, 1), draw.gauss(0, 1))))
    assert 0 < sum(chosen < rejected for *_, (chosen, rejected) in rows) < NUM_ROWS
    return rows


ROWS = token_rows()


def text(tokens):
    return " ".join(f"w{token}" for token in tokens)


def dataset(rows=ROWS):
    columns = [
        {"prompt": text(prompt), "chosen": f" {text(chosen)}", "rejected": f" {text(rejected)}"}
        for prompt, chosen, rejected, _ in rows
    ]
    rewards = [dict(zip(COLUMNS, row[-1], strict=True)) for row in rows]
    return Dataset.from_list([first | second for first, second in zip(columns, rewards, strict=True)])


def groups(rows=ROWS):
    return [
        group(prompt, [[*chosen, EOS], [*rejected, EOS]], rewards=rewards, chosen=0, row=index)
        for index, (prompt, chosen, rejected, rewards) in enumerate(rows)
    ]


def config(folder, **changes):
    values = {
        "per_device_train_batch_size": PER_STEP,
        "per_device_eval_batch_size": PER_STEP,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "max_length": None,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return DPOConfig(output_dir=str(folder), **(values | changes))


def trainer(folder, *, ref_model=None, model=None, kind=RPOTrainer, settings=None, rows=None, **options):
    return kind(
        model=model or llama(1, **SPECIAL),
        ref_model=ref_model or llama(2, **SPECIAL),
        args=config(folder, **(settings or {})),
        train_dataset=dataset() if rows is None else rows,
        processing_class=word_tokenizer(),
        **options,
    )


def cubic(beta=0.1):
    """A user's own loss: the cube of the distance between implicit and explicit reward gaps."""
    return lambda policy, reference, rewards, lengths, mask: (
        ((beta * (policy - reference) - rewards).diff(dim=1)[:, 0]).abs() ** 3
    )


PAIRED = {name: loss for name, loss in LOSSES.items() if not isinstance(loss, UnpairedLoss)}
CASES = {name: (loss, 0.0, False) for name, loss in PAIRED.items()} | {
    "rpo_bwd_kl with a supervised term": (LOSSES["rpo_bwd_kl"], 0.01, False),
    "dpo with a supervised term per token": (LOSSES["dpo"], 0.5, True),
    "a loss of the user": (CustomLoss(cubic()), 0.0, False),
}


def ours(loss, sft_weight, sft_per_token):
    """Loss, gradient and metrics of `align`'s objective on the first rows."""
    objective = preference("dpo", sft_weight=sft_weight, sft_per_token=sft_per_token)
    objective.loss = loss
    model, reference = policy(1, **SPECIAL), policy(2, **SPECIAL)
    model.use_forward("tree")
    reference.use_forward("tree")
    with torch.no_grad():
        logps_BK = response_logps(reference, groups()[:PER_STEP])
    batch = group_batch(groups()[:PER_STEP], logps_BK.tolist(), tree_batch)
    step = objective(model, batch)
    found = step.loss / PER_STEP
    found.backward()
    gradient = {name: value.grad for name, value in model.hf.named_parameters()}
    return found.item(), gradient, {name: float(tally.total / tally.count) for name, tally in step.tallies.items()}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_are_those_of_the_objective(case, tmp_path):
    loss, sft_weight, sft_per_token = CASES[case]
    theirs = trainer(tmp_path, loss=loss, sft_weight=sft_weight, sft_per_token=sft_per_token)
    batch = next(iter(theirs.get_train_dataloader()))
    assert ("rewards" in batch) == loss.uses_rewards
    value = theirs.compute_loss(theirs.model, batch)
    value.backward()
    expected, gradient, tallies = ours(loss, sft_weight, sft_per_token)
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    largest = max(each.abs().max().item() for each in gradient.values())
    for name, each in theirs.model.named_parameters():
        torch.testing.assert_close(each.grad, gradient[name], rtol=1e-4, atol=1e-5 * max(1, largest), msg=name)
    logged = {name: values[0] for name, values in theirs._metrics["train"].items()}
    for name, expected in tallies.items():
        assert logged[name] == pytest.approx(expected, rel=1e-4, abs=1e-4), name


OURS = {"learning_rate": 3e-3, "betas": (0.9, 0.98), "epsilon": 1e-7, "weight_decay": 0.1, "max_grad_norm": 0.7}
THEIRS = {
    "learning_rate": OURS["learning_rate"],
    "lr_scheduler_type": "constant",
    "adam_beta1": OURS["betas"][0],
    "adam_beta2": OURS["betas"][1],
    "adam_epsilon": OURS["epsilon"],
    "weight_decay": OURS["weight_decay"],
    "max_grad_norm": OURS["max_grad_norm"],
}


@pytest.mark.parametrize("precompute", [False, True])
def test_whole_steps_are_those_of_the_loop(precompute, tmp_path):
    changes = {"prompts_per_step": PER_STEP, "warmup_steps": 0, "schedule": "constant"} | OURS
    objective = preference("rpo_bwd_kl", sft_weight=1e-3)
    run = loop(tmp_path, objective, groups(), model=policy(1, **SPECIAL), **changes)
    run.run()
    lines = metrics(tmp_path)
    order = [index for step in range(len(lines)) for index in groups_of_step(step, NUM_ROWS, PER_STEP, seed=0)]
    theirs = trainer(
        tmp_path / "trl",
        ref_model=llama(1, **SPECIAL),
        settings=THEIRS | {"precompute_ref_log_probs": precompute},
        rows=dataset([ROWS[index] for index in order]),
        sft_weight=1e-3,
    )
    theirs.train()
    steps = [line for line in theirs.state.log_history if "loss" in line]
    assert len(lines) == len(steps) == 4
    for line, step in zip(lines, steps, strict=True):
        for name in ("loss", "loss/preference", "rewards/margins", "rewards/accuracies"):
            assert step[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), name
        assert step["logps/chosen"] == pytest.approx(line["logps/chosen"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
    assert gap(weights(run.policy), theirs.model.cpu().state_dict()) <= 5e-5


def test_it_logs_every_metric_of_trl_with_the_same_values(tmp_path):
    logged = []
    for kind, options in ((DPOTrainer, {}), (RPOTrainer, {"loss": "dpo"})):
        one = trainer(tmp_path, kind=kind, rows=dataset(), **options)
        metrics = one.evaluate(dataset())
        one.compute_loss(one.model.train(), next(iter(one.get_train_dataloader())))
        logged.append(({**metrics}, {name: values[0] for name, values in one._metrics["train"].items()}))
    for trl, align in zip(*logged, strict=True):
        assert align.keys() >= trl.keys()
        timed = {name for name in trl if name.endswith(("runtime", "per_second", "preparation_time"))}
        for name in trl.keys() - timed:
            assert align[name] == pytest.approx(trl[name], rel=1e-5, abs=1e-5), name


def mixture_of_experts(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(vocab_size=NUM_WORDS, **sizes, **heads, **SPECIAL))


def test_the_auxiliary_loss_of_a_mixture_of_experts_is_added_as_in_trl(tmp_path):
    losses, auxiliary = [], []
    for kind, options in ((DPOTrainer, {}), (RPOTrainer, {"loss": "dpo"})):
        models = {"model": mixture_of_experts(1), "ref_model": mixture_of_experts(2)}
        one = trainer(tmp_path, kind=kind, **models, **options)
        losses.append(one.compute_loss(one.model, next(iter(one.get_train_dataloader()))).item())
        auxiliary += one._metrics["train"]["aux_loss"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert auxiliary[1] == pytest.approx(auxiliary[0], rel=1e-5) and auxiliary[0] > 0.1


def test_adapters_train_against_the_model_without_them(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    one = RPOTrainer(
        model=llama(1, **SPECIAL),
        args=config(tmp_path, learning_rate=1e-2),
        train_dataset=dataset(),
        processing_class=word_tokenizer(),
        peft_config=lora,
    )
    one.train()
    steps = [line for line in one.state.log_history if "loss" in line]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)  # the adapters start at zero
    assert abs(steps[-1]["rewards/margins"]) > 1e-3
    changed = [name for name, value in one.model.named_parameters() if value.requires_grad and value.abs().sum() > 0]
    assert changed and all("lora_" in name for name in changed)


def test_a_loss_without_a_reference_computes_none(tmp_path):
    one = trainer(tmp_path, loss="simpo", rows=dataset().remove_columns(list(COLUMNS)))
    assert one.ref_model is None
    one.train()
    assert all(math.isfinite(line["loss"]) for line in one.state.log_history if "loss" in line)


def test_unknown_releases_of_trl_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("align.integrations.trl.version", lambda name: "1.17.0")
    with pytest.raises(RunError, match=r"RPOTrainer supports trl 1\.16, and 1\.17\.0 is installed"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"beta": 0.3},
        {"loss_type": ["ipo"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"label_smoothing": 0.1},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "forward_kl"},
    ],
)
def test_settings_of_trls_losses_are_rejected(changed, tmp_path):
    name = next(iter(changed))
    with pytest.raises(InputError, match=rf"DPOConfig\.{name} is .*, and RPOTrainer does not read it"):
        trainer(tmp_path, settings=changed)


def test_the_rejected_settings_exist():
    known = {field.name for field in DPOConfig.__dataclass_fields__.values()}
    assert set(trl_checks.TRL_LOSS_SETTINGS) <= known


def test_a_missing_reward_column_is_reported_with_the_columns_of_the_dataset(tmp_path):
    with pytest.raises(InputError, match="the train dataset has no reward column 'score'; .* prompt, chosen, rejected"):
        trainer(tmp_path, reward_columns=("score", "rejected_reward"))


@pytest.mark.parametrize("value", [None, math.nan, True])
def test_a_reward_that_is_not_a_finite_number_is_rejected(value):
    collator = trl_checks.RewardCollator(lambda examples: {}, COLUMNS)
    with pytest.raises(InputError, match=f"rejected_reward is {str(value).lower() if value is math.nan else value}"):
        collator([{"chosen_reward": 1, "rejected_reward": value}])


def test_a_loss_of_the_wrong_shape_is_rejected(tmp_path):
    one = trainer(tmp_path, loss=lambda *inputs: preference_loss("dpo")(*inputs).mean())
    with pytest.raises(InputError, match=r"returned shape \[\] for 4 prompts; it must return one value a prompt"):
        one.train()


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - PAIRED.keys()))
def test_a_loss_on_labels_is_rejected(name, tmp_path):
    with pytest.raises(InputError, match="for a loss on labels use TRL's KTOTrainer"):
        trainer(tmp_path, loss=name)


def test_a_negative_weight_is_rejected(tmp_path):
    with pytest.raises(InputError, match="sft_weight must be a number of at least 0, not -1"):
        trainer(tmp_path, sft_weight=-1)


def test_docstring_examples_run():
    found = doctest.testmod(trl_checks, optionflags=doctest.ELLIPSIS)
    assert (found.failed, found.attempted) == (0, 2)
