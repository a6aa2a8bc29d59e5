import math
import subprocess
import sys

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from align.config import build
from align.errors import InputError
from align.models.settings import LoraSettings, PolicySettings
from align.train.objectives.settings import PreferenceSettings
from align.train.passes.early_stopping import EarlyStopping
from align.train.settings import TrainSettings
from align.train.sharding.snapshots import SnapshotSettings

# Rate of step 0 to 11 with a warm-up of 4 and a learning rate of 8, worked out by hand where that is easy
BY_HAND = [
    ({"schedule": "constant"}, {0: 2.0, 1: 4.0, 3: 8.0, 4: 8.0, 11: 8.0}),
    ({"schedule": "linear"}, {0: 2.0, 3: 8.0, 4: 8.0, 5: 7.0, 8: 4.0, 11: 1.0}),
    ({"schedule": "linear", "min_lr_ratio": 0.5}, {3: 8.0, 4: 8.0, 8: 6.0, 11: 4.5}),
    ({"schedule": "cosine"}, {0: 2.0, 3: 8.0, 4: 8.0, 6: 4 + math.sqrt(8), 8: 4.0, 10: 4 - math.sqrt(8)}),
    ({"schedule": "cosine", "min_lr_ratio": 0.25}, {4: 8.0, 8: 5.0}),
]


@pytest.mark.parametrize(("changes", "rates"), BY_HAND)
def test_the_learning_rate_warms_up_and_falls_as_worked_out_by_hand(changes, rates):
    settings = TrainSettings(learning_rate=8.0, warmup_steps=4, **changes)
    assert {step: settings.learning_rate_at(step, 12) for step in rates} == pytest.approx(rates)


@pytest.mark.parametrize("warmup", [0, 1, 5, 19, 30])
@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"schedule": "cosine"}, get_cosine_schedule_with_warmup),
        ({"schedule": "linear"}, get_linear_schedule_with_warmup),
        (
            {"schedule": "cosine", "min_lr_ratio": 0.1},
            lambda *args: get_cosine_with_min_lr_schedule_with_warmup(*args, min_lr_rate=0.1),
        ),
    ],
)
def test_the_schedule_is_that_of_transformers_one_step_ahead_while_it_warms_up(changes, theirs, warmup):
    settings = TrainSettings(learning_rate=0.5, warmup_steps=warmup, **changes)
    scheduler = theirs(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5), warmup, 20)
    expected = []
    for _ in range(21):
        expected.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    # Their first step has a rate of 0 and changes nothing; ours has 1 / warmup.
    ahead = [expected[step + (step < warmup)] for step in range(20)]
    assert [settings.learning_rate_at(step, 20) for step in range(20)] == pytest.approx(ahead)


NUM_STEPS = [
    # groups, groups a step, settings, steps
    (10, 4, {}, 3),
    (10, 4, {"epochs": 2}, 6),
    (10, 4, {"epochs": 1.5}, 5),
    (8, 4, {"epochs": 0.5}, 1),
    (8, 4, {"epochs": 0.01}, 1),
    (3, 64, {"epochs": 4}, 4),
    (50, 1, {"epochs": 1.1}, 55),  # 1.1 * 50 is a little more than 55 in floating point
    (10, 1, {"epochs": 0.1}, 1),
    (10, 4, {"epochs": 2, "max_steps": 5}, 5),
    (10, 4, {"epochs": 1, "max_steps": 5}, 3),
]


@pytest.mark.parametrize(("groups", "per_step", "changes", "steps"), NUM_STEPS)
def test_a_run_has_as_many_steps_as_its_epochs_ask_for(groups, per_step, changes, steps):
    assert TrainSettings(learning_rate=1.0, prompts_per_step=per_step, **changes).num_steps(groups) == steps


IN_PYTHON = [
    (TrainSettings, {"lr": 1e-4}, "lr: unknown key; did you mean 'learning_rate'?"),
    (
        TrainSettings,
        {"learning_rate": 1.0, "warmup_ratio": 0.1},
        "warmup_ratio: unknown key; did you mean 'warmup_steps'? (in optimizer steps)",
    ),
    (TrainSettings, {"learning_rate": 0.0}, "learning_rate: Input should be greater than 0 (got 0.0)"),
    (TrainSettings, {}, "learning_rate: this key is required"),
    (LoraSettings, {"r": 8}, "r: unknown key; did you mean 'rank'?"),
    (PolicySettings, {"path": "m", "lora": {"lora_alpha": 8.0}}, "lora.lora_alpha: unknown key; did you mean 'alpha'?"),
    (SnapshotSettings, {"last": 2, "evry": 3}, "evry: unknown key; did you mean 'every'? available: every, last"),
]


@pytest.mark.parametrize(("settings", "values", "line"), IN_PYTHON)
def test_wrong_settings_in_python_are_an_error_of_one_line(settings, values, line):
    with pytest.raises(InputError) as wrong:
        settings(**values)
    assert str(wrong.value) == line
    assert wrong.value.__suppress_context__  # pydantic's error of several lines is not printed


WRONG = [
    ({}, "train.learning_rate: this key is required"),
    ({"learning_rate": 0}, "train.learning_rate: Input should be greater than 0 (got 0)"),
    ({"learning_rate": math.inf}, "train.learning_rate: Input should be a finite number (got inf)"),
    ({"learning_rate": math.nan}, "train.learning_rate: Input should be"),
    ({"learning_rate": "1e-3"}, "train.learning_rate: Input should be a valid number (got '1e-3')"),
    ({"learnin_rate": 1}, "train.learnin_rate: unknown key; did you mean 'learning_rate'?"),
    ({"learning_rate": 1, "epochs": math.inf}, "train.epochs: Input should be a finite number"),
    ({"learning_rate": 1, "epochs": 0}, "train.epochs: Input should be greater than 0"),
    ({"learning_rate": 1, "betas": [0.9, 1.0]}, "train.betas.1: Input should be less than 1 (got 1.0)"),
    ({"learning_rate": 1, "betas": [0.9]}, "train.betas"),
    ({"learning_rate": 1, "schedule": "cosin"}, "train.schedule: Input should be 'constant', 'cosine' or 'linear'"),
    ({"learning_rate": 1, "precision": "fp16"}, "train.precision: Input should be 'fp32', 'bf16' or 'bf16-products'"),
    ({"learning_rate": 1, "warmup_steps": -1}, "train.warmup_steps"),
    ({"learning_rate": 1, "warmup_steps": 0.5}, "train.warmup_steps"),
    ({"learning_rate": 1, "min_lr_ratio": 2}, "train.min_lr_ratio"),
    (
        {"learning_rate": 1, "min_lr_ratio": 0.1},
        "train.min_lr_ratio: 0.1 has no effect with a constant schedule",
    ),
    ({"learning_rate": 1, "prompts_per_step": 0}, "train.prompts_per_step"),
    ({"learning_rate": 1, "tokens_per_micro_batch": 0}, "train.tokens_per_micro_batch"),
    ({"learning_rate": 1, "max_steps": 0}, "train.max_steps"),
    ({"learning_rate": 1, "checkpoint_minutes": 0}, "train.checkpoint_minutes"),
    ({"learning_rate": 1, "max_grad_norm": -1}, "train.max_grad_norm"),
    (
        {"learning_rate": 1, "keep": "best", "evaluate_every": 4, "until_step": 6},
        "train.until_step: evaluations decide the weights: use a multiple of evaluate_every",
    ),
    ({"learning_rate": 1, "average": {"last": 1, "every": 1}}, "train.average.last: Input should be greater than or"),
    ({"learning_rate": 1, "average": {"last": 2, "every": 0}}, "train.average.every: Input should be greater than or"),
    ({"learning_rate": 1, "average": {"last": 2}}, "train.average.every: this key is required"),
    (
        {"learning_rate": 1, "average": {"last": 3, "every": 5}, "max_steps": 10},
        "train.average: 3 snapshots, one every 5 steps, need 11 optimizer steps, and there are 10; use fewer",
    ),
    *(
        (
            {"learning_rate": 1, "average": {"last": 2, "every": 1}, name: value},
            f"train.{name}: cannot be combined with train.average, whose last snapshot follows the last planned step",
        )
        for name, value in {
            "keep": "best",
            "early_stopping": {"patience": 1},
            "callbacks": ["module:function"],
            "until_step": 5,
            "on_divergence": "stop",
        }.items()
    ),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_a_wrong_setting_is_named_in_one_line(values, said):
    with pytest.raises(InputError) as error:
        build(TrainSettings, values, ("train",))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_only_settings_that_change_no_number_are_left_out_of_the_identity():
    base = {"learning_rate": 1.0, "schedule": "linear", "precision": "bf16"}
    changed = {
        "schedule": "cosine",
        "warmup_steps": 1,
        "min_lr_ratio": 0.5,
        "epochs": 2.0,
        "max_steps": 7,
        "prompts_per_step": 3,
        "optimizer": "adamw_8bit",
        "optimizer_settings": {"amsgrad": True},
        "early_stopping": EarlyStopping(patience=1),
        "callbacks": ["module:function"],
        "weight_decay": 0.5,
        "betas": (0.1, 0.2),
        "epsilon": 0.1,
        "max_grad_norm": 7.0,
        "precision": "fp32",
        "compile": "pieces",
        "weights": "bf16_master",
        "tokens_per_micro_batch": 7,
        "sequence_parallel": 2,
        "evaluate_every": 7,
        "keep": "best",
        "checkpoint_steps": 7,
        "checkpoint_minutes": 7.0,
        "reduce": "each",
        "reduce_dtype": "bf16",
        "trackers": ["tensorboard"],
        "until_step": 7,
        "average": SnapshotSettings(last=2, every=1),
        "on_divergence": "stop",
    }
    assert {"learning_rate", *changed} == set(TrainSettings.model_fields)  # each setting was thought of
    identity = TrainSettings(**base).cache_key()
    without = {
        name for name, value in changed.items() if TrainSettings(**{**base, name: value}).cache_key() == identity
    }
    assert without == {
        "tokens_per_micro_batch",
        "sequence_parallel",
        "evaluate_every",
        "checkpoint_steps",
        "checkpoint_minutes",
        "reduce",
        "trackers",
    }
    assert not {"average", "until_step"} & identity.keys()  # settings that came later, in the keys of earlier steps
    # Where the best of the evaluated weights are kept, it matters which are evaluated.
    best = [TrainSettings(**base, keep="best", evaluate_every=every).cache_key() for every in (None, 7)]
    assert best[0] != best[1]


def test_how_a_training_ends_is_in_the_key_only_where_it_is_set():
    base = {"learning_rate": 1.0}
    key = TrainSettings(**base).cache_key()
    assert not {"until_step", "on_divergence"} & set(key)  # the keys of before there were these settings
    assert TrainSettings(**base, on_divergence="error").cache_key() == key
    assert TrainSettings(**base, on_divergence="stop").cache_key() == {**key, "on_divergence": "stop"}


def test_settings_are_imported_without_torch():
    code = "import sys, align.train.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [TrainSettings, PreferenceSettings])
def test_every_setting_is_described(kind):
    assert [name for name, field in kind.model_fields.items() if not field.description] == []
